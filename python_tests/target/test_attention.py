"""A tree's nodes attend to what their paths say, in the place of the attention that the model names or calls."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from stand_ins import OracleHeads
from tiny_families import make_family, tiny_family
from tiny_models import VOCAB, generated, prompt, tiny_model
from transformers import MambaConfig, PreTrainedModel

from cerberus_ext import ops
from cerberus_ext.drafting.gate import AlwaysClosed
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.engine.decode import decode
from cerberus_ext.runtime.runtime import runtime_of
from cerberus_ext.target import attention
from cerberus_ext.target.attention import UnsupportedAttention, attention_switch, check_attention, layer_windows
from cerberus_ext.target.stand_ins import TreeStep, running

TREE = StaticPolicy.from_paths([(0, 0, 0), (0, 1), (1, 0), (2,)])


def step_logits(model: PreTrainedModel, device: str) -> torch.Tensor:
    """(1, N, V) of a step with TREE after the prompt."""
    tokens = torch.arange(TREE.size, device=device)[None] + 3
    with torch.inference_mode(), runtime_of(model).target(64) as base:
        base.prefill(prompt(device))
        return base.step(tokens, TREE.tree.on(tokens.device))[1]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen2-window", "mistral", "gpt2", "gemma2"])
def test_nodes_agree_with_each_path_on_its_own(name: str, implementation: str, device: str) -> None:
    model = tiny_model(name, device)
    if name == "gemma2":
        implementation = "eager"  # torch's function has no soft caps
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        ours = step_logits(model, device)
        for node, parent in enumerate(TREE.parents):
            path = [node]
            while parent >= 0:
                path.insert(0, parent)
                parent = TREE.parents[parent]
            alone = torch.cat([prompt(device), torch.tensor([path], device=device) + 3], 1)
            with torch.inference_mode():
                torch.testing.assert_close(ours[0, node], model(alone).logits[0, -1], atol=1e-4, rtol=1e-4)
        assert model.config._attn_implementation == implementation
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize(
    ("name", "windows"),
    [("llama", (0, 0, 0)), ("qwen2", (0, 0, 0)), ("qwen2-window", (0, 6, 6)), ("mistral", (6, 6, 6)), ("gpt2", (0, 0))],
)
def test_windows(name: str, windows: tuple[int, ...]) -> None:
    assert layer_windows(tiny_model(name).config) == windows


def test_windows_of_layers_that_share_keys() -> None:
    assert layer_windows(tiny_family("gemma3n-shared").config) == (6, 0, 6, 0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_text(name: str) -> None:
    text = generated(name, "cpu", 12)
    heads = OracleHeads(text, 3, VOCAB)
    out = decode(tiny_model(name), heads, prompt(), max_new_tokens=12, tree=TREE, streamer=heads)
    assert out.sequences.equal(text) and out.stats.tokens_per_step > 2


QUERY, CACHE = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 4, 8)
MASK = torch.zeros(1, 1, 1, 1)


def a_step() -> TreeStep:
    step = TreeStep(torch.zeros(1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64), (0, 6), MASK)
    step.planes[CACHE.data_ptr()] = 1
    return step


def layer(index: int | None) -> torch.nn.Module:
    module = torch.nn.Identity()
    if index is not None:
        module.layer_idx = index
    return module


class TestByName:
    @pytest.mark.parametrize(
        ("index", "arguments", "message"),
        [
            (0, {"head_mask": torch.zeros(4)}, "calls its attention with head_mask"),
            (0, {"is_causal": False}, "calls its attention with is_causal"),
            (0, {"sliding_window": 6}, "does not say which window layer 0 has"),
            (1, {}, "does not say which window layer 1 has"),
            (None, {}, "does not say which window layer None has"),
            (0, {"attention_mask": MASK}, "makes an attention mask of its own"),
        ],
    )
    def test_what_the_op_cannot_do_is_noticed(self, index: int | None, arguments: dict[str, Any], message: str) -> None:
        mask = arguments.pop("attention_mask", None)
        with running(a_step()), pytest.raises(UnsupportedAttention, match=message):
            attention.tree_attention_forward("sdpa", layer(index), QUERY, CACHE, CACHE, mask, **arguments)

    def test_a_module_that_is_not_causal(self) -> None:
        module = layer(0)
        module.is_causal = False
        with running(a_step()), pytest.raises(UnsupportedAttention, match="Identity is not causal"):
            attention.tree_attention_forward("sdpa", module, QUERY, CACHE, CACHE, None)

    def test_arguments_that_do_not_matter(self) -> None:
        harmless = {"softcap": None, "is_causal": True, "position_ids": torch.zeros(1, 1), "output_attentions": False}
        with running(a_step()) as step:
            output, weights = attention.tree_attention_forward(
                "sdpa", layer(1), QUERY, CACHE, CACHE, None, 1.0, sliding_window=6, **harmless
            )
        assert output.shape == (1, 1, 4, 8) and weights is None and step.attended == 1

    @pytest.mark.parametrize("takes", [True, False])
    def test_a_soft_cap_that_the_model_s_own_leaves_out(self, takes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """As torch's function does with older versions of transformers: `generate` writes the text without it."""

        def with_cap(module: Any, query: Any, key: Any, value: Any, mask: Any, softcap: Any = None) -> None: ...
        def without(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> None: ...

        monkeypatch.setattr(attention, "_own_attention", lambda *_: with_cap if takes else without)
        query, cache = 9 * torch.randn(1, 4, 1, 8), 9 * torch.randn(1, 2, 4, 8)
        step = TreeStep(torch.full((1,), 3), torch.ones(1, 1, dtype=torch.int64), (0,))
        with running(step):
            capped = attention.tree_attention_forward("any", layer(0), query, cache, cache, None, softcap=0.5)[0]
            plain = attention.tree_attention_forward("any", layer(0), query, cache, cache, None)[0]
        assert capped.equal(plain) is not takes

    @pytest.mark.parametrize("own", ["sdpa", "eager"])
    def test_outside_of_a_step_it_is_the_model_s_own(self, own: str) -> None:
        model = tiny_model("llama")
        module = model.model.layers[0].self_attn
        query, key, value = torch.randn(3, 1, 4, 5, 8, generator=torch.Generator().manual_seed(0))
        key, value = key[:, :2], value[:, :2]
        mask = torch.ones(5, 5).tril().log()[None, None]
        arguments = (module, query, key, value, mask)
        if own == "sdpa":
            want = attention._ATTENTIONS["sdpa"](*arguments, scaling=0.3)[0]
        else:
            want = sys.modules[type(module).__module__].eager_attention_forward(*arguments, scaling=0.3)[0]
        got = attention.tree_attention_forward(own, *arguments, scaling=0.3)[0]
        assert got.equal(want)

    def test_an_implementation_that_is_not_there(self) -> None:
        with pytest.raises(UnsupportedAttention, match="Identity has no attention implementation 'flash_attention_9'"):
            attention.tree_attention_forward("flash_attention_9", layer(0), QUERY, CACHE, CACHE, None)


class TestByCall:
    """Of models that call torch's scaled_dot_product_attention themselves."""

    def test_with_a_layer_of_the_cache(self) -> None:
        query = torch.randn(1, 4, 1, 8)
        with running(a_step()) as step:
            output = attention.tree_attention_call(query, CACHE, CACHE, MASK)
        assert output.shape == (1, 4, 1, 8) and step.attended == 1

    def test_with_anything_else_it_is_torch_s(self) -> None:
        assert attention.tree_attention_call(QUERY, CACHE, CACHE) is NotImplemented
        with running(a_step()) as step:
            assert attention.tree_attention_call(QUERY, CACHE.clone(), CACHE) is NotImplemented
        assert step.attended == 0

    def test_a_bias_is_noticed(self) -> None:
        with running(a_step()), pytest.raises(UnsupportedAttention, match="adds something to its attention scores"):
            attention.tree_attention_call(QUERY, CACHE, CACHE, MASK + 0.0)

    def test_falcon_attends_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """In both layers of every step."""
        model = tiny_family("falcon")
        decode(model, None, prompt(), max_new_tokens=1)  # what it can is found
        calls: list[int] = []
        real = ops.tree_attention

        def tree_attention(query: torch.Tensor, *rest: Any) -> torch.Tensor:
            calls.append(query.shape[1])
            return real(query, *rest)

        monkeypatch.setattr(attention.ops, "tree_attention", tree_attention)
        assert decode(model, None, prompt(), max_new_tokens=8, tree=2, gate=AlwaysClosed()).stats.steps == 7
        assert calls == [1] * 14


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("falcon-alibi", "ALiBi, which goes by the place in the cache"),
        ("mpt", "neither transformers' attention interface nor torch's scaled_dot_product_attention"),
    ],
)
def test_attention_that_is_not_known(name: str, message: str) -> None:
    with pytest.raises(UnsupportedAttention, match=message):
        check_attention(tiny_family(name))


@pytest.mark.parametrize("name", ["llama", "falcon", "gpt_oss"])
def test_attention_that_is_known(name: str) -> None:
    check_attention(tiny_family(name))


def test_a_layer_that_does_not_attend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of its layers attend in a way of their own: found before anything is printed."""
    model = make_family("llama")
    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", lambda hidden_states, **_: (hidden_states, None))
    with pytest.raises(ValueError, match="^decode: model must have .* LlamaForCausalLM has not: 1 of its 2"):
        decode(model, None, prompt(), max_new_tokens=3)
    assert model.config._attn_implementation == "sdpa"


def test_other_caches_are_refused() -> None:
    with pytest.raises(
        ValueError, match="key/value cache in every layer.* layer 0 of mamba has a LinearAttentionLayer"
    ):
        layer_windows(MambaConfig(num_hidden_layers=2))
    chunked = type(tiny_model("llama").config)(num_hidden_layers=2)
    chunked.attention_chunk_size = 8
    with pytest.raises(ValueError, match="full or sliding attention, llama has chunked attention"):
        layer_windows(chunked)


class TestSwitch:
    def test_implementation_is_restored_after_an_error(self) -> None:
        model = tiny_model("llama")
        before = model.config._attn_implementation
        with pytest.raises(KeyError), attention_switch(model):
            assert model.config._attn_implementation == f"{attention.NAME}_{before}"
            raise KeyError
        assert model.config._attn_implementation == before

    def test_the_last_one_out_switches_back(self) -> None:
        """Of two models that share a config."""
        first = tiny_model("llama")
        second = type(first)(first.config)
        assert second.config is first.config
        outer, inner = attention_switch(first), attention_switch(second)
        with outer:
            inner.__enter__()
        assert first.config._attn_implementation == f"{attention.NAME}_sdpa"
        inner.__exit__(None, None, None)
        assert first.config._attn_implementation == "sdpa"

    def test_no_name_that_transformers_treats_in_its_own_way(self) -> None:
        assert "flash" not in attention._stand_in("flash_attention_2")
