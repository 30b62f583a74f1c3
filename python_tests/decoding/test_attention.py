"""The two ways of attending agree, and a model that needs the mask gets it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stand_ins import OracleHeads
from tiny_models import VOCAB, generated, prompt, tiny_model
from transformers import MambaConfig, PreTrainedModel

from cerberus_ext import attention
from cerberus_ext.attention import MaskAttention, TreeAttention, UnsupportedAttention, find_attention, layer_windows
from cerberus_ext.base_model import BaseModel
from cerberus_ext.decode import decode
from cerberus_ext.tree import DraftTree

TREE = DraftTree.from_paths([(0, 0, 0), (0, 1), (1, 0), (2,)])


def step_logits(model: PreTrainedModel, device: str, way: Any) -> torch.Tensor:
    """(1, N, V) of a step with TREE after the prompt, attending the given way."""
    tokens = torch.arange(TREE.size, device=device)[None] + 3
    with torch.inference_mode(), BaseModel(model, 64, 1) as base:
        base.prefill(prompt(device))
        base._use(way)
        return base.step(tokens, TREE.on(tokens.device))[1]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen2-window", "mistral", "gpt2"])
def test_both_ways_agree_with_each_path_on_its_own(name: str, implementation: str, device: str) -> None:
    model = tiny_model(name, device)
    windows = layer_windows(model.config)
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        ours = step_logits(model, device, TreeAttention(windows))
        theirs = step_logits(model, device, MaskAttention(model, windows))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        for node, parent in enumerate(TREE.parents):
            path = [node]
            while parent >= 0:
                path.insert(0, parent)
                parent = TREE.parents[parent]
            alone = torch.cat([prompt(device), torch.tensor([path], device=device) + 3], 1)
            with torch.inference_mode():
                torch.testing.assert_close(ours[0, node], model(alone).logits[0, -1], atol=1e-4, rtol=1e-4)
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize(
    ("name", "windows"),
    [("llama", (0, 0, 0)), ("qwen2", (0, 0, 0)), ("qwen2-window", (0, 6, 6)), ("mistral", (6, 6, 6)), ("gpt2", (0, 0))],
)
def test_windows(name: str, windows: tuple[int, ...]) -> None:
    assert layer_windows(tiny_model(name).config) == windows


def attentions_used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes, from here on, the way of every step."""
    used: list[str] = []
    for way in (TreeAttention, MaskAttention):
        real = way.arguments

        def arguments(self: Any, *args: Any, real: Any = real, name: str = way.__name__) -> Any:
            used.append(name)
            return real(self, *args)

        monkeypatch.setattr(way, "arguments", arguments)
    return used


@pytest.mark.parametrize(
    ("name", "way"), [("llama", TreeAttention), ("gpt2", TreeAttention), ("gemma2", MaskAttention)]
)
def test_way_of_a_model(name: str, way: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """gemma2's soft caps show only when its attention is called: the first step is done twice, the others once."""
    used = attentions_used(monkeypatch)
    text = generated(name, "cpu", 6)
    heads = OracleHeads(text, 1, VOCAB)
    out = decode(tiny_model(name), heads, prompt(), max_new_tokens=6, tree=DraftTree.chain(1), streamer=heads)
    assert out.sequences.equal(text)
    assert used == ["TreeAttention"] * (name == "gemma2") + [way.__name__] * out.stats.steps


def test_model_without_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    assert isinstance(find_attention(model, (0, 0, 0)), MaskAttention)
    used = attentions_used(monkeypatch)
    text = generated("llama", "cpu", 12)
    heads = OracleHeads(text, 3, VOCAB)
    out = decode(model, heads, prompt(), max_new_tokens=12, tree=TREE, streamer=heads)
    assert out.sequences.equal(text) and set(used) == {"MaskAttention"} and out.stats.tokens_per_step > 2


def test_mask_needs_an_attention_that_takes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="attention implementation 'sdpa' or 'eager'.* got 'flash_attention_2'"):
        MaskAttention(model, (0, 0, 0))


QUERY, CACHE = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 4, 8)
STEP = attention.TreeStep(torch.zeros(1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64), (0, 6))


def layer(index: int | None) -> torch.nn.Module:
    module = torch.nn.Identity()
    if index is not None:
        module.layer_idx = index
    return module


@pytest.mark.parametrize(
    ("index", "arguments", "message"),
    [
        (0, {}, "does not hand keyword arguments down"),
        (0, {"tree_step": STEP, "softcap": 30.0}, "calls its attention with softcap"),
        (0, {"tree_step": STEP, "s_aux": torch.zeros(4)}, "calls its attention with s_aux"),
        (0, {"tree_step": STEP, "is_causal": False}, "calls its attention with is_causal"),
        (0, {"tree_step": STEP, "sliding_window": 6}, "does not say which window layer 0 has"),
        (1, {"tree_step": STEP}, "does not say which window layer 1 has"),
        (None, {"tree_step": STEP}, "does not say which window layer None has"),
    ],
)
def test_what_the_op_cannot_do_is_noticed(index: int | None, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedAttention, match=message):
        attention.tree_attention_forward(layer(index), QUERY, CACHE, CACHE, None, **arguments)


def test_arguments_that_do_not_matter() -> None:
    harmless = {"softcap": None, "is_causal": True, "position_ids": torch.zeros(1, 1), "output_attentions": False}
    output, weights = attention.tree_attention_forward(
        layer(1), QUERY, CACHE, CACHE, None, 1.0, sliding_window=6, tree_step=STEP, **harmless
    )
    assert output.shape == (1, 1, 4, 8) and weights is None


def test_other_caches_are_refused() -> None:
    with pytest.raises(
        ValueError, match="key/value cache in every layer.* layer 0 of mamba has a LinearAttentionLayer"
    ):
        layer_windows(MambaConfig(num_hidden_layers=2))
    chunked = type(tiny_model("llama").config)(num_hidden_layers=2)
    chunked.attention_chunk_size = 8
    with pytest.raises(ValueError, match="full or sliding attention, llama has chunked attention"):
        layer_windows(chunked)


def test_implementation_is_restored_also_inside() -> None:
    model = tiny_model("llama")
    before = model.config._attn_implementation
    with pytest.raises(KeyError), attention.attention_implementation(model, attention.NAME):
        assert model.config._attn_implementation == attention.NAME
        raise KeyError
    assert model.config._attn_implementation == before
