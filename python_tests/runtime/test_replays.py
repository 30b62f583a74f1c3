"""Replayed steps give the same text as the model alone, and the same counts as steps that run op by op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from stand_ins import AdversarialHeads, LastDraftHeads, OracleHeads, RandomGate, RandomHeads
from static_stand_ins import StaticHeads
from tape import TapeRecorder, check_replayed
from tiny_models import VOCAB, generated, prompt, tiny_model

from cerberus_ext.drafting.gate import AlwaysClosed, AlwaysOpen, ConfidenceGate, EntropyGate, Gate, Signals
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.engine.decode import decode
from cerberus_ext.runtime.stats import DecodeOutput

NEW = 24
TABLE = [[0.6, 0.3, 0.1, 0.05]] * 4
TREES = {
    "chain": StaticPolicy.chain(4),
    "16": StaticPolicy.from_accuracies(TABLE, 16),
    "65": StaticPolicy.from_accuracies(TABLE, 65),  # two words of ancestors
}
HEADS = {"random": RandomHeads, "adversarial": AdversarialHeads, "oracle": OracleHeads, "last draft": LastDraftHeads}
RANKS = {"oracle": [0] * 4, "second": [1] * 4, "mixed": [1, 0, 2, 0], "never": [-1] * 4}
GATES = {
    "open": AlwaysOpen,
    "closed": AlwaysClosed,
    "random": RandomGate,
    "entropy": lambda: EntropyGate(3.04),  # about the median of all of these models
    "confidence": lambda: ConfidenceGate({1: 1.0, 5: 1.2, 65: 3.0}),
}


def both(model: Any, heads: Any, *args: Any, gate: Any = AlwaysOpen, **options: Any) -> tuple[DecodeOutput, ...]:
    """The same decode, replayed and op by op."""
    outs = []
    for graphs in (True, False):
        streamer = heads if hasattr(heads, "put") else None
        outs.append(decode(model, heads, *args, gate=gate(), streamer=streamer, graphs=graphs, **options))
    return tuple(outs)


def check(replayed: DecodeOutput, eager: DecodeOutput, text: torch.Tensor | None = None) -> None:
    assert replayed.sequences.tolist() == eager.sequences.tolist()
    if text is not None:
        assert replayed.sequences.tolist() == text.tolist()
    check_replayed(replayed.stats, eager.stats)


@pytest.mark.pairwise
@pytest.mark.parametrize("gate", ["open", "closed", "random"])
@pytest.mark.parametrize("tree", ["16", "65"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gpt2"])
def test_heads_between_the_replays(name: str, heads: str, tree: str, gate: str, recorders: list[TapeRecorder]) -> None:
    """Heads that cannot be recorded draft before every replay."""
    text = generated(name, "cpu", NEW)
    stand_in = HEADS[heads](text, 4, VOCAB)
    replayed, _ = both(tiny_model(name), stand_in, prompt(), max_new_tokens=NEW, tree=TREES[tree], gate=GATES[gate])
    assert replayed.sequences.tolist() == text.tolist()
    assert recorders[0].replays == replayed.stats.steps == replayed.stats.graphed_steps
    # The root alone, and the tree, whatever is cut off it near the end.
    stats = replayed.stats
    kinds = (stats.open_steps > 0) + (stats.open_steps < stats.steps)
    assert stats.captures == len(recorders[0].tapes) == kinds and stats.capture_seconds > 0


@pytest.mark.pairwise
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("heads", RANKS)
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen2-window", "mistral", "gpt2"])
def test_heads_inside_the_replays(name: str, heads: str, gate: str, recorders: list[TapeRecorder]) -> None:
    model, text = tiny_model(name), generated(name, "cpu", NEW)
    stand_in = StaticHeads(model, text, RANKS[heads], every=3)
    replayed, eager = both(model, stand_in, prompt(), max_new_tokens=NEW, tree=TREES["16"], gate=GATES[gate])
    check(replayed, eager, text)
    if gate in ("random", "entropy") or (name, gate) == ("llama", "confidence"):
        assert 0 < eager.stats.open_steps < eager.stats.steps, "the gate does both"


class NotingGate(Gate):
    """Notes what it is shown, and answers so that every kind of step happens."""

    def __init__(self, needs: frozenset[str]) -> None:
        self.needs = needs  # type: ignore[misc]
        self.notes: list[Any] = []

    def decide(self, signals: Signals) -> int:
        note: list[Any] = []
        if signals.hidden is not None:
            note.append(tiny_model("llama").lm_head(signals.hidden).argmax(-1).tolist())
        if signals.entropy is not None:
            assert isinstance(signals.entropy, float)
            note.append(round(signals.entropy, 3))
        if signals.expected_tokens is not None:
            assert signals.max_nodes == 16 >= len(signals.expected_tokens)
            note.append(signals.expected_tokens.tolist())
        assert len(note) == len(self.needs)
        self.notes.append(note)
        return [16, 5, 0][len(self.notes) % 3]


NEEDS = ["entropy", "hidden", "expected_tokens"]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("needs", [[], *([one] for one in NEEDS), NEEDS[:2], NEEDS[1:], NEEDS[::2], NEEDS], ids=str)
def test_gates_are_shown_the_same(needs: list[str], inside: bool, recorders: list[TapeRecorder]) -> None:
    model, text = tiny_model("llama"), generated("llama", "cpu", NEW)
    heads = StaticHeads(model, text, RANKS["mixed"]) if inside else OracleHeads(text, 4, VOCAB)
    made: list[NotingGate] = []

    def gate() -> NotingGate:
        made.append(NotingGate(frozenset(needs)))
        return made[-1]

    check(*both(model, heads, prompt(), max_new_tokens=NEW, tree=TREES["16"], gate=gate), text)
    replayed, eager = made
    assert replayed.notes == eager.notes and len(eager.notes) >= 5


@pytest.mark.parametrize("gate", ["open", "closed", "entropy", "confidence"])
def test_one_wait_a_step(gate: str, recorders: list[TapeRecorder], monkeypatch: pytest.MonkeyPatch) -> None:
    """After the prompt the host reads nothing but what a step's one copy has brought."""
    model, text = tiny_model("llama"), generated("llama", "cpu", NEW)
    heads = StaticHeads(model, text, RANKS["mixed"])
    options: dict[str, Any] = {"max_new_tokens": NEW, "tree": TREES["16"], "gate": GATES[gate](), "graphs": True}
    decode(model, heads, prompt(), **options)  # records
    copied: set[int] = set()
    elsewhere: list[str] = []
    waits = 0

    def fetch(recorder: TapeRecorder, source: torch.Tensor, host: torch.Tensor) -> None:
        nonlocal waits
        waits += 1
        copied.add(host.untyped_storage().data_ptr())
        host.copy_(source)

    def watch(name: str) -> None:
        real = getattr(torch.Tensor, name)

        def read(tensor: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
            if waits and tensor.untyped_storage().data_ptr() not in copied:
                elsewhere.append(name)
            return real(tensor, *arguments, **keywords)

        monkeypatch.setattr(torch.Tensor, name, read)

    monkeypatch.setattr(TapeRecorder, "fetch", fetch)
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__"):
        watch(name)
    stats = decode(model, heads, prompt(), **options).stats
    monkeypatch.undo()
    assert waits == stats.steps and elsewhere == [] and stats.captures == 0


def test_heads_inside_are_not_called_by_the_host(recorders: list[TapeRecorder]) -> None:
    model, text = tiny_model("llama"), generated("llama", "cpu", NEW)
    heads = StaticHeads(model, text, RANKS["never"])
    stats = decode(model, heads, prompt(), max_new_tokens=NEW, tree=TREES["16"], graphs=True).stats
    assert stats.open_steps == NEW - 2 and heads.drafts == 3  # warm-up, warm-up, recording
