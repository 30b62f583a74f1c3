"""Where a text ends, however its steps run: op by op, fused, or recorded and replayed, with drafts of every kind.

The text is the model's own, cut where it has to end, and the counts are those of steps that run op by op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from proposer_stand_ins import KnowingMaker, proposers_of, right
from stand_ins import LastDraftHeads, OracleHeads, RandomGate
from static_stand_ins import StaticHeads
from tiny_models import VOCAB, generate, generated, prompt, tiny_model
from torch import Tensor
from transformers import MaxLengthCriteria

from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.gate import AlwaysClosed, ConfidenceGate
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.engine.decode import decode
from cerberus_ext.runtime.stats import DecodeOutput

NEW = 24
CHAIN = StaticPolicy.chain(3)
TREE = StaticPolicy.from_accuracies([[0.6, 0.3, 0.1, 0.05]] * 4, 16)
COUNTS = ("new_tokens", "steps", "open_steps", "zero_accept_steps", "step_tokens", "accepted_histogram", "trace")

# Of a model and the text that it has to give: heads, and what else `decode` is given.
DRAFTS: dict[str, Callable[[Any, Tensor], tuple[Any, dict[str, Any]]]] = {
    # Everything is accepted.
    "chain": lambda model, text: (OracleHeads(text, 4, VOCAB), {"tree": CHAIN}),
    # What is accepted never stays where it is in the cache.
    "tree": lambda model, text: (LastDraftHeads(text, 4, VOCAB), {"tree": TREE}),
    # Heads that are a part of a recorded step, asked by a gate.
    "recorded heads": lambda model, text: (
        StaticHeads(model, text, [1, 0, 2, 0], every=3),
        {"tree": TREE, "gate": ConfidenceGate({1: 1.0, 4: 1.2, 16: 1.5})},
    ),
    "dynamic": lambda model, text: (
        LastDraftHeads(text, 4, VOCAB),
        {"tree": DynamicPolicy(13), "proposers": [KnowingMaker(text, right(0.5))]},
    ),
    # Steps with drafts and without.
    "gate": lambda model, text: (OracleHeads(text, 4, VOCAB), {"tree": DynamicPolicy(8), "gate": RandomGate()}),
    "no heads": lambda model, text: (None, {"tree": DynamicPolicy(16), "proposers": [KnowingMaker(text, right())]}),
}
every_kind = pytest.mark.parametrize("drafts", DRAFTS)


@pytest.fixture(params=["op by op", "fused", "recorded"])
def runner(request: pytest.FixtureRequest, device: str) -> Callable[..., DecodeOutput]:
    """runner(model, heads, ids, **options): `decode` with steps of one kind."""
    options: dict[str, Any] = {"graphs": False, "fuse": False}
    if request.param == "fused":
        if device != "cpu":
            pytest.skip("steps are fused on a CPU")
        options = {"fuse": True}
    elif request.param == "recorded":
        request.getfixturevalue("recorders")
        options = {"graphs": True}

    def run(model: Any, heads: Any, ids: Tensor, **more: Any) -> DecodeOutput:
        out = decode(model, heads, ids, streamer=heads if hasattr(heads, "put") else None, **options, **more)
        assert out.stats.graphed_steps == (out.stats.steps if request.param == "recorded" else 0)
        assert out.stats.fused == (request.param == "fused" and ids.shape[1] < out.sequences.shape[1])
        return out

    return run


def ends(
    runner: Callable[..., DecodeOutput],
    drafts: str,
    text: Tensor,
    want: Tensor,
    *,
    name: str = "llama",
    length: int = 9,
    **options: Any,
) -> DecodeOutput:
    """A decode whose drafts know `text` and that has to give `want`; and the same counts as op by op."""
    model, ids = tiny_model(name, text.device.type), prompt(text.device.type, length)
    counts = []
    for run in (runner, decode):
        heads, given = DRAFTS[drafts](model, text)
        if run is decode:
            given |= {"graphs": False, "streamer": heads if hasattr(heads, "put") else None}
        out = run(model, heads, ids, **given, **options)
        assert out.sequences.tolist() == want.tolist()
        counts.append([getattr(out.stats, count) for count in COUNTS])
        for maker in given.get("proposers", []):
            check_proposers(maker, want.shape[1], length, min(given["tree"].size, options["max_new_tokens"] - 1))
    assert counts[0] == counts[1]
    return out


def check_proposers(maker: KnowingMaker, end: int, prompt: int, nodes: int) -> None:
    """They are told the text up to its end, and asked for no more than may be taken."""
    assert [proposer.known for proposer in maker.made] == ([end] if end > prompt else [])
    asked = [most for proposer in maker.made for most in proposer.asked]
    assert asked == sorted(asked, reverse=True) and all(1 <= most < nodes for most in asked)


@pytest.mark.pairwise
@every_kind
@pytest.mark.parametrize("new", range(8))
def test_stops_at_max_new_tokens(new: int, drafts: str, runner: Any, device: str) -> None:
    text = generated("llama", device, NEW)
    out = ends(runner, drafts, text, text[:, : 9 + new], max_new_tokens=new)
    assert out.stats.new_tokens == new


@pytest.mark.pairwise
@every_kind
@pytest.mark.parametrize("place", range(7))
def test_stops_at_eos(place: int, drafts: str, runner: Any, device: str) -> None:
    """Also where the end is in the middle of what a step has accepted."""
    text = generated("llama", device, NEW)
    eos = int(text[0, 9 + place])
    want = generate(tiny_model("llama", device), prompt(device), max_new_tokens=NEW, eos_token_id=eos)
    assert want[0, -1] == eos and want.shape[1] <= 9 + place + 1
    ends(runner, drafts, text, want, max_new_tokens=NEW, eos_token_id=[VOCAB + 5, eos] if place % 2 else eos)


@pytest.mark.pairwise
@every_kind
@pytest.mark.parametrize("length", range(9, 16))
def test_stopping_criteria_cut_exactly(length: int, drafts: str, runner: Any, device: str) -> None:
    text, seen = generated("llama", device, NEW), []

    def watch(ids: Tensor, scores: None) -> Tensor:
        seen.append(ids.shape[1])
        return torch.zeros(1, dtype=torch.bool)

    criteria = [MaxLengthCriteria(length), watch]
    length = max(length, 10)  # asked after every new token, so one is always there
    ends(runner, drafts, text, text[:, :length], max_new_tokens=NEW, stopping_criteria=criteria)
    assert seen == 2 * list(range(10, length + 1))


HISTOGRAMS = {"chain": [0, 0, 0, 4], "tree": [0, 8], "no heads": [0] * 15 + [1]}


@pytest.mark.pairwise
@every_kind
@pytest.mark.parametrize("new", (16, 17))  # the 17th token is never put in
def test_up_to_the_last_position(new: int, drafts: str, runner: Any, device: str) -> None:
    """gpt2 has no position after the 96th, and would fail if a node, even one that pads the tree, asked for one."""
    want = generate(tiny_model("gpt2", device), prompt(device, 80), max_new_tokens=new)
    out = ends(runner, drafts, want, want, name="gpt2", length=80, max_new_tokens=new)
    if new == 17:
        assert out.stats.accepted_histogram == HISTOGRAMS.get(drafts, out.stats.accepted_histogram)


@pytest.mark.parametrize("kind", ["anything", "documents", "several", "tables"])
def test_up_to_the_last_position_with_other_proposers(kind: str, runner: Any, device: str) -> None:
    model, ids = tiny_model("gpt2", device), prompt(device, 80)
    want = generate(model, ids, max_new_tokens=17)
    for size in (2, 33, 70):
        proposers = proposers_of(kind, want, VOCAB)
        out = runner(model, None, ids, max_new_tokens=17, tree=DynamicPolicy(size), proposers=proposers)
        assert out.sequences.tolist() == want.tolist()


@pytest.mark.pairwise
@every_kind
@pytest.mark.parametrize("length", (250, 254))
def test_beyond_the_last_position_without_drafts(length: int, drafts: str, runner: Any, device: str) -> None:
    """Rotary models go on past max_position_embeddings, here 256, as with `generate`, but not with drafts."""
    want = generate(tiny_model("llama", device), prompt(device, length), max_new_tokens=20)
    out = ends(runner, drafts, want, want, length=length, max_new_tokens=20)
    position = length
    for nodes, path in out.stats.trace:
        assert nodes == 1 or position + len(path) < 256
        position += 1 + len(path)
    if drafts == "no heads" and length == 250:  # positions 250 to 254 in one step
        assert out.stats.open_steps == 1 and out.stats.accepted_histogram == [13, 0, 0, 0, 0, 1]


@pytest.mark.pairwise
@every_kind
@pytest.mark.parametrize(
    "options", ({"temperature": 0.8}, {"temperature": 1.3, "top_k": 7}, {"temperature": 1.0, "top_p": 0.6})
)
def test_drawn_tokens_depend_on_the_seed_only(options: dict[str, Any], drafts: str, runner: Any, device: str) -> None:
    texts = []
    for seed in (1, 2):
        given = {"max_new_tokens": NEW, "seed": seed, **options}
        model, ids = tiny_model("llama", device), prompt(device)
        text = decode(model, None, ids, gate=AlwaysClosed(), graphs=False, **given).sequences
        ends(runner, drafts, text, text, **given)
        texts.append(text.tolist())
    assert texts[0] != texts[1]
