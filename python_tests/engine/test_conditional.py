"""Conditional drafts in `decode`: texts stay what they are, and drafts are weighed as the formula says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from batches import NEW, alone, equal, prompts, texts_of
from context_stand_ins import accepting, heads_for
from tiny_models import VOCAB, generated, prompt, tiny_model

from cerberus_ext import CerberusConfig, CerberusHeads, decode, ops
from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.gate import AlwaysClosed, AlwaysOpen, ConfidenceGate
from cerberus_ext.drafting.proposers import HeadsDrafts
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.ops import reference
from cerberus_ext.runtime.runtime import runtime_of
from cerberus_ext.runtime.sampling import Sampling
from cerberus_ext.runtime.session import steps
from cerberus_ext.runtime.stats import DecodeStats
from cerberus_ext.runtime.stepper import Drafts

RANK = 6
PLATT = ((1.5, 0.0), (0.5, -1.0), (-1.0, 0.5))


def conditional_heads(dtype: torch.dtype = torch.float32, **changes: Any) -> CerberusHeads:
    options = {"conditional_rank": RANK, "draft_vocab": 60, **changes}
    return heads_for(tiny_model("llama", dtype=dtype), dtype, **options)


def without(heads: CerberusHeads) -> CerberusHeads:
    """The same heads, with conditional drafts that leave everything as it is."""
    again = CerberusHeads(heads.config).to(heads.weight.dtype).requires_grad_(False).eval()
    again.load_state_dict(heads.state_dict())
    assert again.conditional is not None
    for name, value in (("keys", 0.0), ("slopes", 1.0), ("rest", 0.0)):
        getattr(again.conditional, name).fill_(value)
    return again


@pytest.mark.pairwise
@pytest.mark.parametrize("value", ["random", "large", "nan", "inf"])
@pytest.mark.parametrize("chooser", [{}, {"temperature": 1.2, "seed": 5}])
@pytest.mark.parametrize("platt", [None, PLATT])
@pytest.mark.parametrize("size", [2, 3, 8, 33])
@pytest.mark.parametrize("fuse", [None, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_texts_stay_what_they_are(
    dtype: torch.dtype, fuse: bool | None, size: int, platt: Any, chooser: dict[str, Any], value: str
) -> None:
    model, heads = tiny_model("llama", dtype=dtype), conditional_heads(dtype)
    assert heads.conditional is not None
    for parameter in heads.conditional.parameters():
        if value == "large":
            parameter.mul_(1000)
        elif value != "random":
            parameter.view(-1)[:: 1 if parameter.dim() == 1 else 3] = math.nan if value == "nan" else math.inf
    (want,) = alone(model, [prompt()], **chooser)
    out = decode(
        model, heads, prompt(), max_new_tokens=NEW, tree=DynamicPolicy(size, platt=platt), fuse=fuse,
        proposers=accepting(want), **chooser,
    )  # fmt: skip
    assert out.sequences.tolist() == want.tolist() and out.stats.exact


@pytest.mark.parametrize("gate", [AlwaysOpen, lambda: ConfidenceGate({1: 1.0, 8: 1.1, 64: 1.3})])
def test_several_texts(gate: Any) -> None:
    model, rows = tiny_model("llama"), prompts([5, 2, 11, 7])
    out = decode(model, conditional_heads(), rows, max_new_tokens=NEW, slots=3, gate=gate(), tree=8)
    equal(texts_of(out.sequences, rows), alone(model, rows))


@pytest.mark.parametrize("draft_vocab", [None, 12])
@pytest.mark.parametrize("context", [True, False])
def test_other_vocabularies(context: bool, draft_vocab: int | None) -> None:
    """The whole one, and fewer tokens than heads offer; Medusa's heads, which have no context layer."""
    model, text = tiny_model("llama"), generated("llama", "cpu", NEW)
    if context:
        heads = conditional_heads(draft_vocab=draft_vocab)
    else:
        config = CerberusConfig("tiny", 32, VOCAB, 3, chained=False, draft_vocab=draft_vocab, conditional_rank=RANK)
        heads = CerberusHeads(config).requires_grad_(False).eval()
        for parameter in heads.parameters():
            parameter.normal_(std=0.2)
    out = decode(model, heads, prompt(), max_new_tokens=NEW, tree=16, proposers=[])
    assert out.sequences.tolist() == text.tolist() and out.stats.open_steps > 0


@pytest.mark.parametrize("size", [3, 8, 40])
def test_where_they_change_nothing_trees_are_the_same(size: int) -> None:
    model, heads = tiny_model("llama"), without(conditional_heads())
    plain = heads_for(model, draft_vocab=60)
    plain.load_state_dict({k: v for k, v in heads.state_dict().items() if not k.startswith("conditional.")})
    policy, found = DynamicPolicy(size), []
    for one in (heads, plain):
        drafted = seen(one, policy.asked_drafts(True)[0])
        assert (drafted.conditional is None) == (one is plain)
        trees = policy.begin((), VOCAB)
        found.append(trees.grow(Fixed(drafted), 3, True))
    assert found[0].parents.tolist() == found[1].parents.tolist()
    assert found[0].tokens.tolist() == found[1].tokens.tolist()
    assert found[0].probabilities == pytest.approx(found[1].probabilities, rel=1e-3)  # the rest is never 0


class Fixed:
    def __init__(self, drafted: HeadsDrafts) -> None:
        self.drafted = drafted

    def drafts(self) -> HeadsDrafts:
        return self.drafted


def seen(heads: CerberusHeads, drafts: int) -> HeadsDrafts:
    """What a Stepper shows after the prompt."""
    how, model = Drafts(heads, drafts, conditional=True, looks=True, sizes=(1, 8)), tiny_model("llama")
    with torch.inference_mode(), steps(runtime_of(model), how, Sampling(), DecodeStats(), 40) as stepper:
        stepper.prefill(prompt())
        return stepper.drafts()


def test_what_a_step_shows_is_the_formula() -> None:
    """Every head offers 32 drafts, whatever the size of the tree; each after each of the head before it."""
    heads, model = conditional_heads(), tiny_model("llama")
    ids, logprobs, given = seen(heads, 32)
    bound = heads.bind(model).conditional
    assert ids.shape == (3, 32) and bound is not None
    assert given is not None and given.logprobs is None, "on a CPU the search reads the tables"
    assert heads.conditional is not None and heads.draft_vocab is not None
    embeddings, lm_head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tables = heads.conditional.tables(embeddings, lm_head[heads.draft_vocab], heads.draft_vocab)
    drafted = torch.from_numpy(ids)[None], torch.from_numpy(logprobs)[None]
    places = torch.searchsorted(heads.draft_vocab, drafted[0])
    expected = reference.rerank(places, drafted[1], *tables, heads.conditional.slopes, heads.conditional.rest)
    torch.testing.assert_close(bound.rerank(*drafted), expected.detach(), rtol=0.05, atol=0.05)  # tables of bfloat16


def test_static_trees_have_nothing_to_do_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "rerank", None)
    text = generated("llama", "cpu", NEW)
    for gate in (AlwaysOpen(), AlwaysClosed(), ConfidenceGate({1: 1.0, 16: 1.1})):
        out = decode(
            tiny_model("llama"), conditional_heads(), prompt(), max_new_tokens=NEW, gate=gate,
            tree=StaticPolicy.from_widths([3, 2, 1]),
        )  # fmt: skip
        assert out.sequences.tolist() == text.tolist()
