"""Steps of tiny models as launches of the CUDA kernels, under emulation: against the program on the CPU, in a decode,
and how many launches they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_paths import path_to
from batches import NEW, equal, prompts, texts_of
from device_steps import EmulatedStep, device, launches
from fused_steps import every_call_seen
from op_cases import assert_same_bits
from stand_ins import OracleHeads
from tape import TapeRecorder, recorders
from tiny_families import tiny_family
from tiny_models import VOCAB, generated, prompt, tiny_model
from torch import Tensor

from cerberus_ext import CerberusConfig, CerberusHeads, Decoder
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.drafting.tree import ALONE, Tree, tree_of_ranks
from cerberus_ext.engine.decode import decode
from cerberus_ext.ops.step import NativeStep
from cerberus_ext.runtime import runtime
from cerberus_ext.runtime.fused.step import NATIVE, FusedStep
from cerberus_ext.runtime.fused.trace import NotFused

FAMILIES = ["llama", "qwen2", "qwen3", "gemma", "gemma3_text", "gpt_neox", "gpt2", "phi3", "mixtral", "qwen3_moe"]
BUSH = tree_of_ranks([-1, 0, 0, 1, 1, 2, 3, 6, 0, 8, 5], [0] * 11)
TREES = {"root": StaticPolicy.chain(0).tree, "bush": BUSH}
__all__ = ["device", "recorders"]
pytestmark = pytest.mark.usefixtures("simt")


def step(model: Any, tree: Tree, tokens: Tensor) -> tuple[list[Tensor], int]:
    """Hidden states, logits and the cache of a fused step, and its launches."""
    # More slots than are attended to in one piece.
    with torch.inference_mode(), every_call_seen(model, capacity=300) as target:
        target.prefill(prompt())
        target.fused = FusedStep(target, pack=False)
        before = launches()
        hidden, logits = target.step(tokens[None], tree.on(torch.device("cpu")))
        assert target.cache.tensor is not None
        return [hidden.clone(), logits.clone(), target.cache.tensor.clone()], launches() - before


def tokens_of(tree: Tree) -> Tensor:
    return torch.arange(tree.size) * 7 % VOCAB


def apart(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm())


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", FAMILIES)
def test_float32(name: str, tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_family(name), tokens_of(TREES[tree])
    want, _ = step(model, TREES[tree], tokens)
    monkeypatch.setitem(NATIVE, "cpu", EmulatedStep)
    for got, right in zip(step(model, TREES[tree], tokens)[0], want, strict=True):
        assert apart(got, right) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FAMILIES)
def test_is_as_near_to_float32_as_on_the_cpu(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values in between are rounded where the model rounds them: else it would be nearer, or further away."""
    model, tokens = tiny_family(name, dtype), tokens_of(BUSH)
    wide = tiny_family(name)
    kept = {key: value.clone() for key, value in wide.state_dict().items()}
    try:
        wide.load_state_dict(model.state_dict())
        exact, _ = step(wide, BUSH, tokens)
    finally:
        wide.load_state_dict(kept)
    native, _ = step(model, BUSH, tokens)
    monkeypatch.setitem(NATIVE, "cpu", EmulatedStep)
    ours, _ = step(model, BUSH, tokens)
    for got, theirs, right in zip(ours, native, exact, strict=True):
        assert 0.6 * apart(theirs, right) < apart(got, right) < 1.5 * apart(theirs, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_node_does_not_depend_on_those_it_does_not_see(name: str, dtype: torch.dtype, device: None) -> None:
    """Bit for bit: node 8 and what hangs below it are other tokens."""
    model, tokens = tiny_family(name, dtype), tokens_of(BUSH)
    changed = tokens.clone()
    changed[[8, 9]] += 1
    (first, _), (second, _) = step(model, BUSH, tokens), step(model, BUSH, changed)
    others = [node for node in range(BUSH.size) if node not in (8, 9)]
    for one, other in zip(first[:2], second[:2], strict=True):
        assert_same_bits(other[:, others].contiguous(), one[:, others].contiguous())
        assert not other[:, [8, 9]].equal(one[:, [8, 9]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3_text", "gpt2"])
def test_a_tree_has_the_bits_of_its_paths_token_by_token(name: str, dtype: torch.dtype, device: None) -> None:
    """Behind prompts that end within a tile of attention, and before the next one."""
    model, tokens = tiny_family(name, dtype), tokens_of(BUSH)
    for length in (5, 62):
        with torch.inference_mode(), every_call_seen(model, capacity=300) as target:
            target.prefill(torch.arange(length)[None] * 5 % VOCAB)
            target.fused = FusedStep(target, pack=False)
            hidden, logits = (each.clone() for each in target.step(tokens[None], BUSH.on(torch.device("cpu"))))
            for leaf in (7, 10):
                path = path_to(BUSH.parents.tolist(), leaf)
                for node in path:
                    alone = target.step(tokens[None, node : node + 1], ALONE.on(torch.device("cpu")))
                    target.cache.extend(1)
                    assert_same_bits(alone[0][0, 0], hidden[0, node])
                    assert_same_bits(alone[1][0, 0], logits[0, node])
                target.cache.extend(-len(path))


@pytest.mark.parametrize(
    ("name", "each", "more"),
    [("llama", 10, 2), ("qwen3", 10, 2), ("gemma3_text", 10, 2), ("gpt2", 10, 2), ("mixtral", 12, 2)],
)
def test_launches(name: str, each: int, more: int, device: None) -> None:
    """Of a layer: q, k and v; rows; attention, and what puts its pieces together; o; rows; gate and up; rows; down;
    rows. A router and experts have some more."""
    model = tiny_family(name)
    found = step(model, BUSH, tokens_of(BUSH))[1]
    assert found <= each * model.config.num_hidden_layers + more
    if name == "llama":
        assert found == each * model.config.num_hidden_layers + more


def test_joined_products_read_the_models_own_weights(device: None) -> None:
    model = tiny_family("llama")
    own = {parameter.data_ptr() for parameter in model.parameters()}
    with torch.inference_mode(), every_call_seen(model) as target:
        target.prefill(prompt())
        fused = FusedStep(target)
        assert fused._weights is not None
        assert {weight.data_ptr() for weight in fused._weights} <= own and not fused.packed


def test_says_what_there_is_no_kernel_for(device: None) -> None:
    with torch.inference_mode(), every_call_seen(tiny_family("gpt_oss")) as target:
        target.prefill(prompt())
        with pytest.raises(NotFused, match="its program was refused: .* must not be transposed on CUDA"):
            FusedStep(target)


@pytest.mark.parametrize("graphs", [True, False])
def test_decodes(graphs: bool, device: None, recorders: list[TapeRecorder]) -> None:
    """Recorded once and replayed, or launched each time: the model's own text."""
    model, text = tiny_model("llama"), generated("llama", "cpu", 12)
    options: dict[str, Any] = {"max_new_tokens": 12, "tree": StaticPolicy.chain(3), "proposers": []}
    for round_ in range(2):
        before, heads = launches(), OracleHeads(text, 4, VOCAB)
        out = decode(model, heads, prompt(), streamer=heads, graphs=graphs, **options)
        stats = out.stats
        assert out.sequences.tolist() == text.tolist()
        assert stats.fused and stats.not_fused_because is None and stats.fallback is None
        assert stats.exact and stats.inexact_because is None
        assert launches() > before
        if graphs:
            assert stats.graphed_steps == stats.steps and (stats.captures > 0) == (round_ == 0)
            ops = {call[0].name() for tape in recorders[0].tapes for call in tape.operations}
            assert "cerberus_simt::run_device_step" in ops and "cerberus_simt::plan_device_step" not in ops
            assert not any(op.startswith("aten::linear") or op.startswith("aten::mm") for op in ops)


def test_launches_of_heads(device: None, recorders: list[TapeRecorder]) -> None:
    """A recorded step has at most 30 more than its model: heads, choice, verification, move of the cache.

    Two ops of a CPU stand for several of a GPU: `draft` for head_stack and draft_topk, which is two launches, and
    `settle` for verify_tree and commit_cache.
    """
    heads = CerberusHeads(CerberusConfig("tiny", 32, VOCAB, num_heads=3))
    options: dict[str, Any] = {"max_new_tokens": 12, "tree": StaticPolicy.chain(3), "proposers": [], "graphs": True}
    assert decode(tiny_model("llama"), heads, prompt(), **options).stats.graphed_steps > 0
    ours = {"cerberus_simt::run_device_step": 0, "cerberus_ext::draft": 3, "cerberus_ext::settle": 2}
    for tape in recorders[0].tapes:
        ops = [call[0].name().split(".")[0] for call in tape.operations]
        assert "cerberus_simt::run_device_step" in ops and "cerberus_ext::draft" in ops
        assert sum(ours.get(op, 0 if op == "aten::empty" else 1) for op in ops) <= 30


@pytest.mark.parametrize("graphs", [None, False])
def test_several_texts_are_forwards_of_their_own(graphs: bool | None, device: None, recorders: Any) -> None:
    """A program is planned for the cache of one text: those of a batch are not fused, and each is the text alone."""
    model, rows = tiny_model("llama"), prompts([4, 9, 2])
    options: dict[str, Any] = {"max_new_tokens": NEW, "graphs": graphs}
    one_by_one = [decode(model, None, row, **options) for row in rows]
    out = decode(model, None, rows, slots=2, **options)
    equal(texts_of(out.sequences, rows), [one.sequences for one in one_by_one])
    assert all(one.stats.fused for one in one_by_one)
    assert not out.stats.fused and "several texts are decoded at once" in str(out.stats.not_fused_because)
    with pytest.raises(ValueError, match="decode: fuse must be None or False here, got True: several texts"):
        decode(model, None, rows, fuse=True, **options)
    again = decode(model, None, rows[0], **options)
    assert again.stats.fused and again.sequences.equal(one_by_one[0].sequences)


def test_weights_that_change_are_recorded_anew(device: None, recorders: list[TapeRecorder]) -> None:
    """A fused step may hold copies of them."""
    model = tiny_family("gpt2")
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    options: dict[str, Any] = {"max_new_tokens": 3, "graphs": True}
    try:
        first = decode(model, None, prompt(), **options)
        with torch.no_grad():
            model.lm_head.weight.neg_()
        second = decode(model, None, prompt(), **options)
        assert first.stats.captures > 0 and second.stats.captures > 0 and second.stats.fused
        with torch.inference_mode():
            want = model(second.sequences[:, :-1]).logits[:, -3:].argmax(-1)
        assert second.sequences[:, -3:].tolist() == want.tolist()
    finally:
        model.load_state_dict(kept)


def test_not_fused_where_the_user_says_so_or_it_cannot_be(device: None, recorders: list[TapeRecorder]) -> None:
    model = tiny_model("llama")
    for fuse, fused in ((False, False), (None, True), (False, False)):
        stats = decode(model, None, prompt(), max_new_tokens=2, graphs=True, fuse=fuse).stats
        assert stats.fused is fused and stats.not_fused_because is None and stats.graphed_steps == stats.steps
    stats = decode(tiny_family("gpt_oss"), None, prompt(), max_new_tokens=2, graphs=True).stats
    assert not stats.fused and "transposed" in str(stats.not_fused_because) and stats.graphed_steps == stats.steps
    with pytest.raises(ValueError, match="decode: fuse must be None or False here, got True: .*transposed"):
        decode(tiny_family("gpt_oss"), None, prompt(), max_new_tokens=2, graphs=True, fuse=True)


def test_explains(device: None) -> None:
    runtime._runtimes.clear()
    text = Decoder(tiny_family("llama"), None).explain(2)
    assert "weights: the model's own" in text and " us " not in text
    assert "self_attn.k_proj" in text and text.count("product ") == 2 * 7 + 1
    assert NATIVE["cpu"] is not NativeStep
