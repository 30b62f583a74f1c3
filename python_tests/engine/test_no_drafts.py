"""Heads whose numbers have overflown draft nothing: the text is the same, and steps without drafts are plain ones."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins import OracleHeads
from tiny_models import VOCAB, generated, prompt, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from cerberus_ext import CerberusConfig, CerberusHeads
from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.gate import AlwaysClosed, ConfidenceGate
from cerberus_ext.drafting.platt import reading
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.engine.decode import decode

NEW = 24
STATIC = StaticPolicy.from_widths([3, 2])
TREES = {"dynamic": DynamicPolicy(8), "corrected": DynamicPolicy(8, platt=((1.0, 4.0),) * 3), "static": STATIC}


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama")


class SpoiledHeads(OracleHeads):
    """The best draft is always right, but for what `spoil` makes of ids and log-probabilities (K, P)."""

    def __init__(self, spoil: Any) -> None:
        super().__init__(generated("llama", "cpu", NEW), 3, VOCAB)
        self.spoil = spoil

    def draft(self, hidden: Tensor, pending: Tensor, drafts: int) -> tuple[Tensor, Tensor]:
        ids, logprobs = (part[0].clone() for part in super().draft(hidden, pending, drafts))
        self.spoil(ids, logprobs)
        return ids[None], logprobs[None]


def everything(ids: Tensor, logprobs: Tensor) -> None:
    logprobs.fill_(math.nan)


def impossible(ids: Tensor, logprobs: Tensor) -> None:
    logprobs.fill_(-math.inf)


def no_tokens(ids: Tensor, logprobs: Tensor) -> None:
    ids[0], ids[1], ids[2] = VOCAB, -1, 2**62


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("spoil", [everything, impossible, no_tokens])
def test_heads_that_draft_nothing(spoil: Any, tree: str, llama: PreTrainedModel) -> None:
    heads = SpoiledHeads(spoil)
    out = decode(llama, heads, prompt(), max_new_tokens=NEW, tree=TREES[tree], proposers=None, streamer=heads)
    assert out.sequences.equal(generated("llama", "cpu", NEW))
    if tree == "static":
        assert out.stats.open_steps == 0 and out.stats.steps == NEW - 1
    heads = SpoiledHeads(spoil)
    if tree != "static":  # without the text's past
        stats = decode(llama, heads, prompt(), max_new_tokens=NEW, tree=TREES[tree], proposers=[], streamer=heads).stats
        assert stats.open_steps == 0 and stats.steps == NEW - 1


@pytest.mark.parametrize("tree", TREES)
def test_only_what_is_a_draft_is_accepted(tree: str, llama: PreTrainedModel) -> None:
    """Head 2's right draft has no probability, so that a step gains no more than head 1's."""

    def second(ids: Tensor, logprobs: Tensor) -> None:
        logprobs[1, 0] = math.nan

    heads = SpoiledHeads(second)
    proposers = None if tree == "static" else []
    out = decode(llama, heads, prompt(), max_new_tokens=NEW, tree=TREES[tree], proposers=proposers, streamer=heads)
    assert out.sequences.equal(generated("llama", "cpu", NEW))
    assert len(out.stats.accepted_histogram) == 2 and out.stats.accepted_histogram[1] >= 11
    assert out.stats.open_steps == 11


@pytest.mark.parametrize("gate", [None, ConfidenceGate({1: 1.0, 16: 1.01})])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_with_weights_that_are_no_numbers(dtype: torch.dtype, gate: Any) -> None:
    model = tiny_model("llama", dtype=dtype)
    want = decode(model, None, prompt(), max_new_tokens=NEW, gate=AlwaysClosed()).sequences
    heads = CerberusHeads(CerberusConfig("tiny", 32, VOCAB, num_heads=3, num_layers=1)).to(dtype)
    with torch.no_grad():
        heads.weight.fill_(math.nan if dtype == torch.float32 else 6e4)  # whose products overflow
        heads.bias.fill_(0.0 if dtype == torch.float32 else 6e4)
    for tree in (STATIC, DynamicPolicy(8)):
        out = decode(model, heads, prompt(), max_new_tokens=NEW, tree=tree, gate=gate)
        assert out.sequences.equal(want)
        if tree is STATIC:  # now and then float16's are small enough
            assert out.stats.open_steps < (1 if dtype == torch.float32 else NEW // 2)


@pytest.mark.parametrize("platt", [None, [(1.0, 3.0)], [(1.0, math.nan)], [(1e308, 1.0)]])
def test_reading_of_what_is_no_probability(platt: Any) -> None:
    """Zero, also where the correction would make something of it. As many zeros as that takes make no warning."""
    logs = np.log(np.array([[0.9, 0.25, 0.1]]))
    logs = np.concatenate([logs, [[math.nan, -math.inf, math.inf]]], 1)
    probabilities = reading(platt)(logs)
    assert (probabilities[0, 3:] == 0).all() and ((probabilities >= 0) & (probabilities <= 1)).all()
    if platt is None or platt[0] == (1.0, 3.0):
        assert (probabilities[0, :3] > 0.09).all()
