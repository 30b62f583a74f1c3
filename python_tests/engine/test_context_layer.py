"""Heads with a context layer: the text is the model's, and what the heads read depends on the text alone.

Neither on how the tokens came into it: one by one, as accepted drafts, with drafts beside them that were wrong, in
steps run op by op, replayed or fused, or in one pass over the finished text.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from context_stand_ins import accepting, heads_for
from proposer_stand_ins import KnowingMaker, right, wrong
from stand_ins import RandomGate
from tiny_families import EXACT, tiny_family
from tiny_models import VOCAB, generated, prompt, tiny_model
from torch import Tensor
from transformers import DynamicCache

from cerberus_ext import CerberusConfig, CerberusHeads
from cerberus_ext.calibration.trace import Answer, trace
from cerberus_ext.drafting import dynamic_policy
from cerberus_ext.drafting.context_layer import BoundContext, attention_sizes, rotate
from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.gate import AlwaysClosed, AlwaysOpen, ConfidenceGate, EntropyGate
from cerberus_ext.drafting.heads_drafter import HeadsDrafter
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.drafting.tree import ALONE
from cerberus_ext.engine.decode import decode
from cerberus_ext.io.transformers_names import cache_argument
from cerberus_ext.runtime.fused.context import ContextProgram, FusedContext
from cerberus_ext.runtime.runtime import runtime_of
from cerberus_ext.runtime.stats import DecodeOutput
from cerberus_ext.target.model import TargetModel

NEW = 40
GATES = {
    "open": AlwaysOpen,
    "closed": AlwaysClosed,
    "random": RandomGate,
    "entropy": lambda: EntropyGate(3.04),
    "confidence": lambda: ConfidenceGate({1: 1.0, 8: 1.1, 64: 1.3}),
}
TREES = {"static": StaticPolicy.from_widths([3, 2, 1]), "dynamic": DynamicPolicy(12, 4)}


@pytest.mark.parametrize("name", EXACT)
def test_sizes_are_those_of_the_models_cache(name: str) -> None:
    model = tiny_family(name)
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=prompt(), use_cache=True, **{cache_argument(model): cache})
    keys = cache.layers[0].keys
    assert attention_sizes(model)[1:] == (keys.shape[1], keys.shape[3])


class Spy:
    """What the heads read, by the number of tokens before the root. They are asked at every step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dynamic_policy, "_fills", lambda *arguments: False)
        self.read: dict[int, Tensor] = {}
        self.drafts: dict[int, tuple[Tensor, Tensor]] = {}
        drafted, reads = HeadsDrafter.draft, BoundContext.read
        place = 0

        def read(layer: Any, cache: Any, *arguments: Any) -> Tensor:
            nonlocal place
            place = int(cache.length)
            self.read[place] = reads(layer, cache, *arguments)[0, 0].clone()
            return self.read[place][None, None]

        def draft(drafter: HeadsDrafter, hidden: Tensor, pending: Tensor, drafts: int) -> tuple[Tensor, Tensor]:
            assert torch.equal(hidden[0], self.read[place])
            self.drafts[place] = drafted(drafter, hidden, pending, drafts)
            return self.drafts[place]

        monkeypatch.setattr(BoundContext, "read", read)
        monkeypatch.setattr(HeadsDrafter, "draft", draft)


def run(name: str, device: str = "cpu", new: int = NEW, **options: Any) -> DecodeOutput:
    model = tiny_model(name, device)
    heads = options.pop("heads", None) or heads_for(model)
    out = decode(model, heads, prompt(device), max_new_tokens=new, **options)
    assert out.sequences.tolist() == generated(name, device, new).tolist()
    return out


@pytest.mark.pairwise
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gpt2", "gemma2"])
def test_equals_generate(name: str, tree: str, gate: str, device: str) -> None:
    run(name, device, tree=TREES[tree], gate=GATES[gate]())


def one_by_one(name: str, spy: Spy) -> dict[int, Tensor]:
    """What the heads read where no draft is ever accepted."""
    run(name, tree=DynamicPolicy(9, 2), proposers=[KnowingMaker(generated(name, "cpu", NEW), wrong(VOCAB))])
    every = dict(spy.read)
    assert len(every) == NEW - 2, "of every place but the last ones"
    spy.read.clear()
    return every


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gemma2"])
def test_what_heads_read_depends_on_the_text_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    every = one_by_one(name, spy)
    out = run(name, tree=DynamicPolicy(24, 2), proposers=accepting(generated(name, "cpu", NEW)))
    assert sum(map(bool, out.stats.accepted_histogram)) > 1 and 10 < len(spy.read) < NEW / 1.8
    for place, read in spy.read.items():
        torch.testing.assert_close(read, every[place], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(every[15], every[16], atol=0.1)


def test_pairs_are_kept_while_the_gate_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    spy = Spy(monkeypatch)
    every = one_by_one("llama", spy)
    run("llama", tree=TREES["static"], gate=RandomGate())
    assert 5 < len(spy.read) < len(every) / 1.5
    for place, read in spy.read.items():
        torch.testing.assert_close(read, every[place], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_pass_over_the_text_drafts_the_same(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same bits, where the model's own steps have them."""
    model, new = tiny_model(name, "cpu", dtype), 100  # more than one piece of the pass
    heads = heads_for(model, dtype)
    spy = Spy(monkeypatch)
    out = decode(model, heads, prompt(), max_new_tokens=new, tree=DynamicPolicy(6, 4), proposers=[])
    drafted = {place: (ids.clone(), logs.clone()) for place, (ids, logs) in spy.drafts.items()}
    monkeypatch.undo()
    length = prompt().shape[1]
    text = trace(model, heads, Answer(0, out.sequences, length, new))
    assert len(drafted) > 40
    for place, (ids, logprobs) in drafted.items():
        traced = text.logprobs[place - length, :, : logprobs.shape[-1]]
        if name == "llama":
            assert torch.equal(ids[0], text.ids[place - length, :, : ids.shape[-1]])
            assert torch.equal(logprobs[0], traced)
        else:
            torch.testing.assert_close(logprobs[0], traced, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_are_the_same_read_or_only_kept(dtype: torch.dtype) -> None:
    """Where nobody asks for queries, there are none; keys and values have the same bits."""
    model, ids = tiny_model("llama", "cpu", dtype), prompt()
    context = heads_for(model, dtype).bind(model).context
    assert context is not None
    tree = StaticPolicy.from_widths([3, 2]).tree.on(ids.device)
    tokens = torch.arange(len(tree.depths))[None] + 5
    kept = []
    with torch.inference_mode(), runtime_of(model).target(64, context=True) as base:
        base.prefill(ids)
        states, _ = base.step(tokens, tree)
        led = torch.cat([states[:, :1], states[:, tree.parents[1:]]], 1)
        for read in (True, False):
            for plane in base.cache.context_planes():
                plane.zero_()
            if read:
                context.read(base.cache, led, tokens, tree)
            else:
                context.keep_nodes(base.cache, states[:, 0], states, tokens, tree)
            kept.append(torch.stack(base.cache.context_planes()))
    assert torch.equal(*kept) and kept[0].any()


@pytest.mark.parametrize("waiting", [0, 1, 5, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_that_waited_are_those_of_one_pass(dtype: torch.dtype, waiting: int) -> None:
    """By the program, in several runs where they are many, to the bits of the layer op by op."""
    model = tiny_model("llama", "cpu", dtype)
    context = heads_for(model, dtype).bind(model).context
    assert context is not None
    tokens = torch.arange(waiting + 1)[None] % VOCAB
    with torch.inference_mode(), runtime_of(model).target(256, context=True) as base:
        base.prefill(prompt())
        states = torch.randn(1, waiting + 1, len(context.bias)).to(dtype)
        want = context.read(base.cache, states, tokens, StaticPolicy.chain(waiting).tree.on(tokens.device))
        planes = torch.stack(base.cache.context_planes())
        for plane in base.cache.context_planes():
            plane.zero_()
        fused = FusedContext(ContextProgram(context, base.cache))
        if waiting:
            root = ALONE.on(tokens.device)
            fused.keep_nodes(base.cache, states[0, :1], states[:, 1:2], tokens[:, :1], root)
            fused.keep_path(states[0, 1:], tokens[0], torch.tensor([*range(waiting), -1, -1]))
        base.cache.length += waiting
        read = [fused.read(base.cache, states[0, -1:], tokens[0, -1:]) for _ in range(2)]
        assert torch.equal(torch.cat(read), want[0, -1:].expand(2, -1))
        assert torch.equal(torch.stack(base.cache.context_planes()), planes) and planes.any()


def test_decodes_use_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless steps are not fused; of heads of another dtype than the model's, too."""
    calls: list[int] = []
    run_program = ContextProgram.run
    monkeypatch.setattr(ContextProgram, "run", lambda *arguments: (calls.append(0), run_program(*arguments))[1])
    model = tiny_model("llama")
    heads = heads_for(model)
    for options, used in (
        ({"heads": heads}, True), ({"heads": heads, "fuse": False}, False), ({"heads": heads}, True),
        ({"heads": heads_for(model, torch.bfloat16)}, True),
    ):  # fmt: skip
        calls.clear()
        run("llama", tree=TREES["dynamic"], **options)
        assert bool(calls) == used


@pytest.mark.parametrize("length", [1, 2, 9])
def test_short_prompts_and_texts(length: int, device: str) -> None:
    model = tiny_model("llama", device)
    ids = prompt(device, length=length)
    want = model.generate(ids, do_sample=False, max_new_tokens=6)
    for new in range(7):
        out = decode(model, heads_for(model), ids, max_new_tokens=new, tree=TREES["dynamic"])
        assert out.sequences.tolist() == want[:, : length + new].tolist()


def test_other_dtypes_than_the_models(device: str) -> None:
    run("llama", device, heads=heads_for(tiny_model("llama", device), torch.bfloat16), tree=TREES["static"])


def test_a_rotation_turns_by_the_distance() -> None:
    """The product of two turned vectors depends on how far apart they are."""
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float32)
    at = lambda place: torch.tensor([[place]])  # noqa: E731
    products = [float((rotate(q, at(place + 5)) * rotate(k, at(place))).sum()) for place in (0, 3, 200)]
    torch.testing.assert_close(products[0], products[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(products[0], products[2], rtol=1e-3, atol=1e-3)
    assert torch.equal(rotate(q, at(0)), q)
    turned = rotate(torch.tensor([[[[1.0, 0.0]]]]), at(1))
    torch.testing.assert_close(turned.flatten(), torch.tensor([1.0, 1.0]).mul(torch.tensor([0.540302, 0.841471])))


def test_heads_for_another_attention_are_refused() -> None:
    model = tiny_model("llama")
    config = CerberusConfig("tiny", 32, VOCAB, context_layer=True, context_heads=[4, 4, 8])
    with pytest.raises(ValueError, match=r"context layer is for .* \(4, 4, 8\), the model has \(4, 2, 8\)"):
        decode(model, CerberusHeads(config), prompt(), tree=TREES["static"])


def test_a_model_that_hides_its_states_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does something between its body and its LM head; it is left as it was."""
    model = copy.deepcopy(tiny_model("llama"))
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    with pytest.raises(ValueError, match="decode: heads must have no context layer with this model"):
        decode(model, heads_for(model), prompt(), max_new_tokens=4, tree=TREES["static"])
    assert not model.model._forward_hooks
    assert decode(model, heads_for(model), prompt(), max_new_tokens=4, tree=StaticPolicy.root()).stats.new_tokens == 4


def test_nothing_is_done_for_it_where_heads_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TargetModel, "prefill_all", None)
    run("llama", gate=AlwaysClosed())


def test_another_source_is_right() -> None:
    """A text that another proposer drafts to its end."""
    text = generated("llama", "cpu", NEW)
    assert run("llama", tree=DynamicPolicy(16), proposers=[KnowingMaker(text, right())]).stats.tokens_per_step > 5
