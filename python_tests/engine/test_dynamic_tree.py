"""With trees new at every step, of whatever proposers draft, `decode` gives what the model alone gives."""

from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from proposer_stand_ins import KINDS, KnowingMaker, nothing, proposers_of, right, table, wrong
from stand_ins import AdversarialHeads, LastDraftHeads, OracleHeads, RandomGate, RandomHeads
from tiny_models import VOCAB, generate, generated, prompt, tiny_model
from transformers import PreTrainedModel

from cerberus_ext import CerberusConfig, CerberusHeads
from cerberus_ext.drafting import dynamic_policy
from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.gate import AlwaysClosed, AlwaysOpen, ConfidenceGate, EntropyGate, Gate, Signals
from cerberus_ext.drafting.suffix import SuffixProposer
from cerberus_ext.engine.decode import decode
from cerberus_ext.runtime.stats import DecodeOutput

NEW = 24
SIZES = [2, 3, 8, 33, 64, 70]
HEADS = {"random": RandomHeads, "adversarial": AdversarialHeads, "oracle": OracleHeads, "last draft": LastDraftHeads}
CORRECTIONS = ((1.5, 0.0), (0.5, -1.0), (-1.0, 0.5), (1.0, 3.0))


class RandomSizeGate(Gate):
    """Any size: none, one that is there, and more."""

    needs = frozenset({"expected_tokens"})

    def __init__(self) -> None:
        self.random = random.Random(0)

    def decide(self, signals: Signals) -> int:
        expected = signals.expected_tokens
        assert expected is not None and expected[0] == 1 and (np.diff(expected) >= 0).all()
        assert (np.diff(expected, n=2) <= 1e-12).all(), "best first"
        return self.random.randrange(len(expected) + 3)


GATES = {
    "open": AlwaysOpen,
    "closed": AlwaysClosed,
    "random": RandomGate,
    "entropy": lambda: EntropyGate(3.04),
    "confidence": lambda: ConfidenceGate({1: 1.0, 4: 1.1, 70: 2.0}),
    "rate": lambda: ConfidenceGate({1: 1.0, 4: 1.1, 70: 2.0}, rate=1.5),
    "margin": lambda: ConfidenceGate({1: 1.0, 70: 1.2}, margin=0.3),
    "sizes": RandomSizeGate,
}


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama")


def run(
    name: str, heads: str | None, kind: str, size: int, gate: str = "open", device: str = "cpu", **options: Any
) -> DecodeOutput:
    """A decode that has to give what the model alone gives."""
    model, text = tiny_model(name, device), generated(name, device, NEW)
    stand_in = HEADS[heads](text, 4, VOCAB) if heads else None
    tree = DynamicPolicy(size, drafts=6, platt=options.pop("platt", None))
    out = decode(
        model, stand_in, prompt(device), max_new_tokens=NEW, tree=tree, gate=GATES[gate](), streamer=stand_in,
        proposers=proposers_of(kind, text, VOCAB), **options,
    )  # fmt: skip
    assert out.sequences.tolist() == text.tolist(), (name, heads, kind, size, gate)
    check_stats(out, size)
    return out


def check_stats(out: DecodeOutput, size: int) -> None:
    stats = out.stats
    assert stats.steps == sum(stats.accepted_histogram) == len(stats.trace) == len(stats.trace_proposers)
    assert stats.step_tokens == sum((1 + accepted) * n for accepted, n in enumerate(stats.accepted_histogram))
    assert stats.nodes_per_step == pytest.approx(sum(nodes for nodes, _ in stats.trace) / stats.steps)
    for (nodes, path), proposers in zip(stats.trace, stats.trace_proposers, strict=True):
        assert 1 <= nodes <= size and len(path) == len(proposers)
        assert all(0 < node < nodes for node in path) and path == sorted(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [*HEADS, None])
def test_equals_generate(heads: str | None, kind: str, device: str) -> None:
    for size in SIZES[KINDS.index(kind) % 2 :: 2] if heads in ("oracle", None) else (8,):
        stats = run("llama", heads, kind, size, device=device).stats
        if heads == "oracle" and kind in ("none", "nothing", "right") and size >= 8:
            assert stats.tokens_per_step > 4
        if heads in ("adversarial", None) and kind in ("none", "wrong", "nothing"):
            assert stats.tokens_per_step == 1
        if heads is None and kind in ("none", "nothing"):
            assert stats.open_steps == 0 and stats.nodes_per_step == 1


@pytest.mark.parametrize("kind", ["none", "suffix", "wrong", "several"])
@pytest.mark.parametrize("gate", GATES)
def test_equals_generate_with_gates(gate: str, kind: str, device: str) -> None:
    for heads, size in (("oracle", 70), ("random", 8)):
        stats = run("llama", heads, kind, size, gate, device).stats
        if gate == "closed":
            assert stats.open_steps == 0 and stats.nodes_per_step == 1
        if gate in ("random", "entropy", "sizes") and (heads, kind) == ("random", "none"):
            assert 0 < stats.open_steps < stats.steps - 1


@pytest.mark.parametrize("name", ["qwen2", "qwen2-window", "mistral", "gpt2", "gemma2"])
def test_equals_generate_on_other_models(name: str, device: str) -> None:
    """Sliding windows, learned positions, attention that needs a mask."""
    for heads, kind, size in itertools.product(["last draft", "random", None], ["right", "several"], [33]):
        run(name, heads, kind, size, device=device)


def test_equals_generate_with_corrections(device: str) -> None:
    """Also one that turns a head's order round, and those of no heads."""
    for kind in ("none", "several"):
        run("llama", "last draft", kind, 33, device=device, platt=CORRECTIONS)
        run("llama", None, kind, 33, device=device, platt=())


def test_default_is_a_dynamic_tree_with_the_texts_own_past(llama: PreTrainedModel) -> None:
    """For heads of this package, and for none; a vocabulary of the heads smaller than the drafts is no error."""
    text = generated("llama", "cpu", NEW)
    torch.manual_seed(0)
    for draft_vocab in (None, 5):
        heads = CerberusHeads(CerberusConfig("tiny", 32, VOCAB, draft_vocab=draft_vocab))
        if draft_vocab:
            heads.draft_vocab.copy_(torch.arange(5) * 20)
        for options in ({}, {"proposers": []}, {"proposers": [SuffixProposer(2)], "tree": DynamicPolicy(70)}):
            out = decode(llama, heads, prompt(), max_new_tokens=NEW, **options)
            assert out.sequences.tolist() == text.tolist() and out.stats.open_steps > 0
    stats = decode(llama, None, prompt(), max_new_tokens=NEW).stats
    assert max(map(len, stats.trace_proposers)) > 2 and {1} == set(itertools.chain(*stats.trace_proposers))


# ---------------------------------------------------------------- how far a step gets


def test_paths_are_deeper_than_the_heads(llama: PreTrainedModel) -> None:
    """A document that holds the text gives 15 tokens a step, with 4 heads that are always wrong, or none."""
    text = generate(llama, prompt(), max_new_tokens=1 + 3 * 16)
    for heads in (AdversarialHeads(text, 4, VOCAB), None):
        options = {"max_new_tokens": 49, "tree": DynamicPolicy(16), "proposers": [KnowingMaker(text, right(0.995))]}
        out = decode(llama, heads, prompt(), streamer=heads, **options)
        assert out.sequences.tolist() == text.tolist()
        assert out.stats.accepted_histogram == [0] * 15 + [3]
        assert out.stats.trace == [(16, list(range(1, 16)))] * 3 and out.stats.trace_proposers == [[1] * 15] * 3


@pytest.mark.parametrize(("name", "tokens"), [("llama", [11, 12, 13] * 4), ("gpt2", [7] * 30), ("qwen2", [5])])
def test_text_that_repeats_itself(name: str, tokens: list[int], device: str) -> None:
    """The text's own past knows it, beyond the heads' depth."""
    model, ids = tiny_model(name, device), torch.tensor([tokens], device=device)
    want = generate(model, ids, max_new_tokens=60)
    for heads, size in itertools.product([LastDraftHeads, RandomHeads, None], [4, 16]):
        stand_in = heads(want, 2, VOCAB) if heads else None
        out = decode(model, stand_in, ids, max_new_tokens=60, tree=DynamicPolicy(size), streamer=stand_in)
        assert out.sequences.tolist() == want.tolist()
        if heads is None:
            assert len(out.stats.accepted_histogram) == size, "once, every draft was right"


# ---------------------------------------------------------------- who drafted what was accepted


def test_trace_sources_of_paths_and_places(llama: PreTrainedModel) -> None:
    """The second proposer is the one that is right. Tables are a proposer's, too, not the heads'."""
    text = generated("llama", "cpu", NEW)
    steps = {
        "path": (nothing, right()),
        "table": (nothing, table(VOCAB, 4, 3, 1)),
        "two tables": (table(VOCAB, 4, 3, 9), table(VOCAB, 4, 3, 1)),
        "wrong path": (wrong(VOCAB, 0.5), table(VOCAB, 4, 3, 1)),
    }
    for what, answers in steps.items():
        makers = [KnowingMaker(text, answer) for answer in answers]
        for heads in (AdversarialHeads(text, 4, VOCAB), None):
            out = decode(
                llama, heads, prompt(), max_new_tokens=NEW, tree=DynamicPolicy(64), proposers=makers, streamer=heads
            )
            assert out.sequences.tolist() == text.tolist()
            found = list(itertools.chain(*out.stats.trace_proposers))
            assert set(found) == {2} and len(found) >= (12 if heads is None else 1), (what, heads)
            assert [len(path) for _, path in out.stats.trace] == list(map(len, out.stats.trace_proposers))


def test_trace_sources_name_the_likelier(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads and proposer draft the same: the heads' best drafts are at exp(-0.1) = 0.905."""
    monkeypatch.setattr(dynamic_policy, "_fills", lambda *arguments: False)  # else they are not asked
    text = generated("llama", "cpu", NEW)
    for probability, proposer in ((0.95, 1), (0.85, 0)):
        for answer in (
            right(probability),
            lambda follows, most, c=probability: ([[t] for t in follows[:4]], [[c]] * len(follows[:4])),
        ):
            oracle = OracleHeads(text, 4, VOCAB)
            stats = decode(
                llama, oracle, prompt(), max_new_tokens=NEW, tree=DynamicPolicy(5), streamer=oracle,
                proposers=[KnowingMaker(text, answer)],
            ).stats  # fmt: skip
            assert {*itertools.chain(*(each[:4] for each in stats.trace_proposers))} == {proposer}


def test_nodes_that_nobody_drafted_are_not_checked(llama: PreTrainedModel) -> None:
    """A table of fewer places than another, and drafts of probability 0, do not fill the tree up."""
    text = generated("llama", "cpu", NEW)

    def impossible(follows: list[int], most: int) -> tuple[list[list[int]], list[list[float]]]:
        return [[1, 2]] * 5, [[0.5, 0.0]] * 5

    makers = [KnowingMaker(text, table(VOCAB, 1, 1, 0)), KnowingMaker(text, impossible)]
    stats = decode(llama, None, prompt(), max_new_tokens=NEW, tree=DynamicPolicy(64), proposers=makers).stats
    # After the root: what follows and 1, or, where that is 1, only it; then 1, at most 4 times.
    assert all(nodes <= 1 + 2 * 5 for nodes, _ in stats.trace) and stats.tokens_per_step > 1.9
