"""Replayed steps with trees new: the same text and counts as op by op, from few recordings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from proposer_stand_ins import KINDS, KnowingMaker, anything, proposers_of, right
from stand_ins import LastDraftHeads, RandomGate, RandomHeads
from static_stand_ins import StaticHeads
from tape import TapeRecorder, check_replayed
from tiny_models import VOCAB, generate, generated, prompt, tiny_model

from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.gate import AlwaysOpen, ConfidenceGate, EntropyGate, Gate, Signals
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.drafting.suffix import SuffixProposer
from cerberus_ext.drafting.tree import filled_size
from cerberus_ext.engine.decode import decode
from cerberus_ext.runtime.runtime import runtime_of
from cerberus_ext.runtime.stats import DecodeOutput

NEW = 24
RANKS = {"oracle": [0] * 4, "mixed": [1, 0, 2, 0], "never": [-1] * 4}


class Sizes(Gate):
    """Every size in turn, the root alone included; notes what it is asked."""

    needs = frozenset({"expected_tokens"})

    def __init__(self) -> None:
        self.notes: list[list[float]] = []

    def decide(self, signals: Signals) -> int:
        assert signals.expected_tokens is not None
        self.notes.append(signals.expected_tokens.tolist())
        return 1 + len(self.notes) % 12


GATES = {
    "open": AlwaysOpen,
    "random": RandomGate,
    "entropy": lambda: EntropyGate(3.04),
    "confidence": lambda: ConfidenceGate({1: 1.0, 4: 1.2, 70: 2.0}),
    "sizes": Sizes,
}


def both(model: Any, heads: Any, text: torch.Tensor, ids: torch.Tensor, kind: str, **options: Any) -> DecodeOutput:
    """The same decode, replayed and op by op -> the former. text: what it has to give, also the heads'."""
    gate, outs, notes = options.pop("gate", AlwaysOpen), [], []
    for replay in (True, False):
        if isinstance(heads, RandomHeads):
            heads.generator.manual_seed(0)
        streamer, asked = heads if hasattr(heads, "put") else None, gate()
        outs.append(
            decode(model, heads, ids, gate=asked, streamer=streamer, graphs=replay,
                   proposers=proposers_of(kind, text, VOCAB), **options)
        )  # fmt: skip
        notes.append(getattr(asked, "notes", []))
    replayed, eager = outs
    assert replayed.sequences.tolist() == eager.sequences.tolist() == text.tolist()
    check_replayed(replayed.stats, eager.stats)
    assert notes[0] == notes[1]
    return replayed


def check_recordings(out: DecodeOutput, policy: DynamicPolicy, recorders: list[TapeRecorder]) -> None:
    """One for each size that the trees are filled up to."""
    kinds = {filled_size(nodes, policy.sizes) for nodes, _ in out.stats.trace}
    assert out.stats.captures == len(recorders[0].tapes) == len(kinds)
    assert recorders[0].replays == out.stats.steps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [RandomHeads, LastDraftHeads, None])
def test_heads_between_the_replays(heads: Any, kind: str, recorders: list[TapeRecorder]) -> None:
    """Heads that cannot be recorded draft before every replay; or there are none, and the host brings all tokens."""
    text = generated("llama", "cpu", NEW)
    stand_in = heads(text, 4, VOCAB) if heads else None
    tree = DynamicPolicy(13)
    out = both(tiny_model("llama"), stand_in, text, prompt(), kind, max_new_tokens=NEW, tree=tree)
    check_recordings(out, tree, recorders)


@pytest.mark.pairwise
@pytest.mark.parametrize("kind", ["none", "suffix", "several"])
@pytest.mark.parametrize("heads", ["mixed", "never"])
@pytest.mark.parametrize("gate", GATES)
def test_heads_inside_the_replays(gate: str, heads: str, kind: str, recorders: list[TapeRecorder]) -> None:
    """What they draft for the next step comes with the step's one copy."""
    model, text = tiny_model("llama"), generated("llama", "cpu", NEW)
    stand_in = StaticHeads(model, text, RANKS[heads], every=3)
    tree = DynamicPolicy(33, drafts=4)
    out = both(model, stand_in, text, prompt(), kind, gate=GATES[gate], max_new_tokens=NEW, tree=tree)
    check_recordings(out, tree, recorders)


@pytest.mark.parametrize("name", ["qwen2", "qwen2-window", "mistral", "gpt2"])
def test_other_models(name: str, recorders: list[TapeRecorder]) -> None:
    model, text = tiny_model(name), generated(name, "cpu", NEW)
    for heads in (StaticHeads(model, text, RANKS["mixed"], every=3), LastDraftHeads(text, 4, VOCAB), None):
        both(model, heads, text, prompt(), "several", gate=Sizes, max_new_tokens=NEW, tree=DynamicPolicy(70))


@pytest.mark.parametrize("inside", [True, False])
def test_drafts_are_the_same_as_op_by_op(inside: bool, recorders: list[TapeRecorder]) -> None:
    """The proposer notes what it is asked; the gate what it is shown, which is all that the heads and it promise."""
    model, text = tiny_model("llama"), generated("llama", "cpu", NEW)
    heads = StaticHeads(model, text, RANKS["mixed"]) if inside else LastDraftHeads(text, 4, VOCAB)
    asked = []
    for replay in (True, False):
        maker, gate = KnowingMaker(text, right(0.2)), Sizes()
        streamer = None if inside else heads
        decode(
            model, heads, prompt(), max_new_tokens=NEW, tree=DynamicPolicy(20), gate=gate, proposers=[maker],
            graphs=replay, streamer=streamer,
        )  # fmt: skip
        asked.append((gate.notes, [proposer.asked for proposer in maker.made]))
    assert asked[0] == asked[1] and len(asked[0][0]) > 4


def test_few_recordings_for_many_sizes(recorders: list[TapeRecorder]) -> None:
    """Sizes 1 to 40 share those of 1, 4, 8, 16, 32 and 40 nodes; a later decode of the same kind records nothing."""
    model, text = tiny_model("llama"), generate(tiny_model("llama"), prompt(), max_new_tokens=90)

    class Growing(Gate):
        size = 0

        def decide(self, signals: Signals) -> int:
            self.size = self.size % 40 + 1
            return self.size

    found = []
    for _ in range(2):
        maker = KnowingMaker(text, anything(VOCAB))
        heads = RandomHeads(text, 4, VOCAB)
        out = decode(
            model, heads, prompt(), max_new_tokens=90, tree=DynamicPolicy(40), gate=Growing(), graphs=True,
            proposers=[maker], streamer=heads,
        )  # fmt: skip
        assert out.sequences.tolist() == text.tolist()
        found.append((len({nodes for nodes, _ in out.stats.trace}), out.stats.captures))
    assert found[0][0] > 20 and [captures for _, captures in found] == [6, 0]
    without = decode(model, None, prompt(), max_new_tokens=90, tree=DynamicPolicy(40), gate=Growing(), graphs=True)
    assert without.sequences.tolist() == text.tolist() and without.stats.captures == 0, "nor does one without heads"


def test_static_and_dynamic_trees_take_turns(recorders: list[TapeRecorder]) -> None:
    """Over the same tensors: each finds its own tree there, and the drafts of its own step."""
    model, text = tiny_model("llama"), generated("llama", "cpu", NEW)
    heads = StaticHeads(model, text, [1, 0, 1, 0], every=5)
    static = StaticPolicy.from_accuracies([[0.5, 0.3, 0.1, 0.05]] * 4, 16)
    for tree in (
        static,
        DynamicPolicy(16, drafts=4),
        static,
        DynamicPolicy(16, drafts=2),
        StaticPolicy.chain(1),
        static,
    ):
        for given in (heads, LastDraftHeads(text, 4, VOCAB)):
            out = decode(
                model, given, prompt(), max_new_tokens=NEW, tree=tree, graphs=True,
                streamer=given if hasattr(given, "put") else None,
            )  # fmt: skip
            assert out.sequences.tolist() == text.tolist() and out.stats.graphed_steps == out.stats.steps


def test_one_wait_a_step(recorders: list[TapeRecorder], monkeypatch: pytest.MonkeyPatch) -> None:
    """The tree is made of what the one copy of the step before has brought; later steps call no heads."""
    model, text = tiny_model("llama"), generated("llama", "cpu", NEW)
    heads = StaticHeads(model, text, RANKS["mixed"])
    options: dict[str, Any] = {"max_new_tokens": NEW, "tree": DynamicPolicy(8), "graphs": True}
    decode(model, heads, prompt(), proposers=[SuffixProposer()], **options)  # records
    waits: list[int] = []
    real = TapeRecorder.fetch
    monkeypatch.setattr(TapeRecorder, "fetch", lambda *arguments: (waits.append(1), real(*arguments)))
    heads.drafts = 0
    stats = decode(model, heads, prompt(), proposers=[SuffixProposer()], **options).stats
    assert stats.captures == 0 and len(waits) == stats.steps and heads.drafts == 1, "the first tree's only"


def test_goes_on_in_the_middle(recorders: list[TapeRecorder], monkeypatch: pytest.MonkeyPatch) -> None:
    """A later recording fails, after replays: what follows runs op by op, from where the text is."""
    model, text = tiny_model("llama"), generated("llama", "cpu", NEW)
    real, calls = TapeRecorder.record, []

    def record(recorder: TapeRecorder, step: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            step()
            raise torch.OutOfMemoryError("no memory")
        return real(recorder, step)

    monkeypatch.setattr(TapeRecorder, "record", record)
    try:
        for heads in (StaticHeads(model, text, RANKS["mixed"], every=3), None):
            runtime_of(model).release()
            calls.clear()
            gate, proposers = Sizes(), proposers_of("several", text, VOCAB)
            out = decode(
                model, heads, prompt(), max_new_tokens=NEW, tree=DynamicPolicy(16), gate=gate, proposers=proposers
            )
            assert out.sequences.tolist() == text.tolist()
            assert 0 < out.stats.graphed_steps < out.stats.steps and out.stats.captures == 2
            assert out.stats.fallback == "recording a step failed: OutOfMemoryError: no memory"
    finally:
        runtime_of(model).release()


def test_a_broken_source_leaves_the_recordings_usable(recorders: list[TapeRecorder]) -> None:
    model, text = tiny_model("llama"), generated("llama", "cpu", NEW)
    heads = StaticHeads(model, text, RANKS["mixed"])
    for answer in (([VOCAB], [0.5]), None):
        made = KnowingMaker(text, lambda follows, most, answer=answer: answer if len(follows) < 15 else ([1], [0.5]))
        with pytest.raises(ValueError, match="decode: proposers: KnowingProposer.propose must return"):
            decode(model, heads, prompt(), max_new_tokens=NEW, tree=DynamicPolicy(8), proposers=[made], graphs=True)
        out = decode(model, heads, prompt(), max_new_tokens=NEW, tree=DynamicPolicy(8), graphs=True)
        assert out.sequences.tolist() == text.tolist() and out.stats.graphed_steps == out.stats.steps
