"""The context layer of heads as launches of the CUDA kernels, under emulation: against the layer op by op, in decodes
that are recorded, and how many launches it takes."""

from __future__ import annotations

from copy import copy
from typing import Any

import pytest
import torch
from attention_paths import path_to
from context_stand_ins import accepting, heads_for
from device_steps import device, launches
from op_cases import assert_same_bits
from tape import Tape, TapeRecorder, recorders
from tiny_models import VOCAB, generated, prompt, tiny_model
from torch import Tensor

from cerberus_ext import CerberusConfig, CerberusHeads, Decoder
from cerberus_ext.drafting.context_layer import BoundContext
from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.gate import ConfidenceGate
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.drafting.tree import ALONE, Tree, tree_of_ranks
from cerberus_ext.engine.decode import decode
from cerberus_ext.runtime import runtime
from cerberus_ext.runtime.fused.device_context import DeviceContext
from cerberus_ext.target.cache import TreeCache

__all__ = ["device", "recorders"]
pytestmark = pytest.mark.usefixtures("simt", "device")
CPU = torch.device("cpu")
BUSH = tree_of_ranks([-1, 0, 0, 1, 1, 2, 3, 6, 0, 8, 5], [0] * 11)
NEW = 8  # the emulation takes its time
TREES = {"static": StaticPolicy.from_widths([2, 1]), "dynamic": DynamicPolicy(5, 4)}


class Layer:
    """A context layer behind a prompt, with pairs in the cache, and what a forward over BUSH gave."""

    def __init__(self, dtype: torch.dtype, capacity: int = 300) -> None:
        self.model = tiny_model("llama", "cpu", dtype)
        drafter: Any = heads_for(self.model, dtype).bind(self.model)
        self.context: BoundContext = drafter.context
        self.tokens = (torch.arange(BUSH.size) * 7 % VOCAB)[None]
        with torch.inference_mode(), runtime.runtime_of(self.model).target(capacity, context=True) as target:
            target.prefill(prompt())
            self.hidden, _ = target.step(self.tokens, BUSH.on(CPU))
            self.cache: TreeCache = target.cache
        self.before = torch.randn(1, self.hidden.shape[-1]).to(dtype)

    @property
    def planes(self) -> Tensor:
        return torch.stack(self.cache.context_planes())

    def forget(self) -> None:
        """What was written, and puts other pairs there for those of the prompt."""
        torch.manual_seed(1)
        for plane in self.cache.context_planes():
            plane.normal_()

    def on_device(self) -> BoundContext:
        layer = copy(self.context)
        layer.fused = DeviceContext(self.context, self.cache)
        return layer

    def keep(self, layer: BoundContext, tree: Tree, nodes: list[int]) -> None:
        """The pairs of these nodes, as the tree."""
        hidden, tokens = self.hidden[:, nodes].contiguous(), self.tokens[:, nodes].contiguous()
        layer.keep_nodes(self.cache, self.before, hidden, tokens, tree.on(CPU))

    def read(self, layer: BoundContext, token: int) -> Tensor:
        pending = torch.tensor([[token]])
        return layer.read(self.cache, self.before[:, None], pending, ALONE.on(CPU))[0].clone()


@pytest.mark.parametrize("tree", [ALONE, BUSH], ids=["root", "bush"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_is_the_layer_op_by_op(dtype: torch.dtype, tree: Tree) -> None:
    layer, found = Layer(dtype), []
    for way in (layer.context.like(layer.context.tensors), layer.on_device()):
        layer.forget()
        layer.keep(way, tree, list(range(tree.size)))
        found.append((layer.planes, layer.read(way, 17)))
    for want, got in zip(*found, strict=True):
        apart = float((got.float() - want.float()).norm() / want.float().norm())
        assert apart < {torch.float32: 1e-6, torch.bfloat16: 0.01, torch.float16: 0.001}[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_what_heads_read_depends_on_the_text_alone(dtype: torch.dtype) -> None:
    """A node's pair has the bits that it has behind its path token by token."""
    layer = Layer(dtype)
    way, path = layer.on_device(), path_to(BUSH.parents.tolist(), 7)
    layer.forget()
    layer.keep(way, BUSH, list(range(BUSH.size)))
    begin, before = layer.cache.committed, layer.before
    kept = layer.planes[:, :, :, begin:]
    for place, node in enumerate(path):
        layer.keep(way, ALONE, [node])
        assert_same_bits(layer.planes[:, :, :, begin + place].contiguous(), kept[:, :, :, node].contiguous())
        layer.before = layer.hidden[:, node].contiguous()
        layer.cache.extend(1)
    layer.cache.extend(-len(path))
    layer.before = before


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("tree", TREES)
def test_decodes(tree: str, rank: int | None, recorders: list[TapeRecorder], monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's text and as many steps, recorded or launched each time."""
    model, text = tiny_model("llama"), generated("llama", "cpu", NEW)
    heads, counts, reads = heads_for(model, conditional_rank=rank, draft_vocab=60), [], []
    run = DeviceContext.read
    monkeypatch.setattr(DeviceContext, "read", lambda *given: (reads.append(0), run(*given))[1])
    options: dict[str, Any] = {"gate": ConfidenceGate({1: 1.0, 5: 1.1}), "tree": TREES[tree]}
    for replay in (False, True, True):
        proposers = accepting(text) if tree == "dynamic" else None
        out = decode(
            model, heads, prompt(), max_new_tokens=NEW, proposers=proposers, graphs=replay, **options
        )  # fmt: skip
        assert out.sequences.tolist() == text.tolist() and out.stats.fused
        assert out.stats.graphed_steps == (out.stats.steps if replay else 0)
        counts.append((out.stats.accepted_histogram, out.stats.open_steps))
    assert counts[0] == counts[1] == counts[2] and reads and out.stats.captures == 0


def test_heads_take_turns(recorders: list[TapeRecorder]) -> None:
    """What is recorded of some heads serves them again after others."""
    model = tiny_model("llama")
    first, second = heads_for(model), heads_for(model)
    for parameter in second.parameters():
        parameter.mul_(0.5)
    options: dict[str, Any] = {"max_new_tokens": 3, "tree": TREES["static"], "proposers": [], "graphs": True}
    found = [decode(model, heads, prompt(), **options).stats for heads in (first, second) * 3]
    assert [stats.captures > 0 for stats in found] == [True, True, False, False, False, False]
    assert all(stats.fused for stats in found)


def test_heads_that_change_in_place(recorders: list[TapeRecorder]) -> None:
    """What was recorded reads their new values, of a copy in another dtype, too, as heads that were never recorded."""
    model, reads = tiny_model("llama", "cpu", torch.bfloat16), []
    heads = heads_for(model)
    options: dict[str, Any] = {"max_new_tokens": 3, "tree": TREES["static"], "proposers": [], "graphs": True}
    for anew in (True, False, True):
        if anew:
            runtime._runtimes.clear()
        captures = decode(model, heads, prompt(), **options).stats.captures
        assert (captures > 0) == anew
        drafter = next(kind.drafter for kind in runtime.runtime_of(model)._recordings._steps)
        reads.append(drafter.context.fused._reads._results[1].clone())
        if len(reads) == 1:
            for parameter in heads.parameters():
                parameter.mul_(1.5)
    assert not reads[0].equal(reads[1])
    assert_same_bits(reads[1], reads[2])


def launches_of(tape: Tape) -> int:
    """Of a replay, as in test_device_models.py."""
    ours = {"cerberus_simt::run_device_step": 0, "cerberus_ext::draft": 3, "cerberus_ext::settle": 2, "aten::empty": 0}
    before = launches()
    with torch.inference_mode():
        tape.replay()
    ops = [call[0].name().split(".")[0] for call in tape.operations]
    return launches() - before + sum(ours.get(op, 1) for op in ops)


def steps_launches(heads: CerberusHeads, tree: Any, recorders: list[TapeRecorder]) -> list[int]:
    """Of the recorded steps of one node and of 4, in a cache that attention takes in one piece."""
    runtime._runtimes.clear()
    with Decoder(tiny_model("llama"), heads, tree=tree, proposers=[]) as decoder:
        decoder.warm_up()
        return [launches_of(tape) for tape in recorders[-1].tapes]


@pytest.mark.parametrize(("tree", "more"), [(StaticPolicy.chain(3), [3, 14]), (DynamicPolicy(4, 4), [11, 14])])
def test_launches(tree: Any, more: list[int], recorders: list[TapeRecorder]) -> None:
    """More than with heads without a context layer: 3, and for several nodes 3 of torch's, for the pairs that are kept;
    8 for what is read, 9 where attention takes its keys in pieces."""
    without = CerberusHeads(CerberusConfig("tiny", 32, VOCAB, num_heads=3))
    counts = [steps_launches(heads, tree, recorders) for heads in (without, heads_for(tiny_model("llama")))]
    assert [with_layer - other for other, with_layer in zip(*counts, strict=True)] == more


def test_launches_of_a_whole_step(recorders: list[TapeRecorder]) -> None:
    """With heads as the packaged ones are: 9 a layer and 39, one more each where attention takes its keys in pieces."""
    model = tiny_model("llama")
    heads = heads_for(model, conditional_rank=8, draft_vocab=60)
    counts = steps_launches(heads, DynamicPolicy(4, 4), recorders)
    assert counts[-1] == 9 * model.config.num_hidden_layers + 39
