"""What is drawn through trees of drafts has exactly the model's probabilities: Pearson's chi-square over 100 000 draws."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from cerberus_ext import ops
from cerberus_ext.drafting.static_policy import StaticPolicy

WORDS, DRAWS, ROWS = 10, 100_000, 2000
TREE = StaticPolicy.from_widths([4, 3, 2]).tree
SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    "cut": {"temperature": 0.8, "top_k": 6, "top_p": 0.9},
}


@cache
def logits() -> Tensor:
    """(WORDS, WORDS): a model in which the next word depends on the last one."""
    return torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(2)) * 1.5


def probabilities(temperature: float, top_k: int, top_p: float) -> Tensor:
    """(WORDS, WORDS) float64, of the next word after each."""
    wanted = (logits().double() / temperature).softmax(-1)
    ranked, order = wanted.sort(-1, descending=True)
    ranked[:, top_k or WORDS :] = 0
    ranked /= ranked.sum(-1, keepdim=True)
    ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
    return torch.zeros_like(wanted).scatter(-1, order, ranked / ranked.sum(-1, keepdim=True))


def drawn(sampling: dict[str, Any], lenient: bool = False) -> Tensor:
    """Texts of ROWS rows, step by step through TREE, until there are DRAWS words -> (WORDS, WORDS) counts of pairs.

    lenient: with an acceptance rule like Medusa's: a likely draft is taken, though another word was drawn.
    """
    generator, topology = torch.Generator().manual_seed(0), TREE.on(torch.device("cpu"))
    last, length = torch.zeros(ROWS, dtype=torch.int64), torch.arange(ROWS) << 20  # places of their own, for the noise
    counts, model = torch.zeros(WORDS * WORDS, dtype=torch.int64), logits()
    while counts.sum() < DRAWS:
        tokens = torch.multinomial(model[last].softmax(-1), TREE.size, replacement=True, generator=generator)
        tokens[:, 0] = last
        positions = length[:, None] + topology.depths + 1
        rows = model[tokens].reshape(-1, WORDS).contiguous()
        target = ops.choose_tokens(rows, positions.reshape(-1).contiguous(), 3, **sampling).view(tokens.shape)
        if lenient:
            target = with_likely_drafts(tokens, target)
        path, accepted = ops.verify_tree(tokens, target, topology.parents, topology.ancestors, TREE.depth)
        words = target.gather(1, path.long().clamp(min=0))  # (ROWS, depth + 1): what follows each accepted node
        before = torch.cat([last[:, None], words[:, :-1]], 1)
        taken = path >= 0
        counts += torch.bincount((before * WORDS + words)[taken], minlength=WORDS * WORDS)
        last = words.gather(1, accepted.long()[:, None])[:, 0]
        length = length + accepted + 1
    return counts.view(WORDS, WORDS)


def with_likely_drafts(tokens: Tensor, target: Tensor) -> Tensor:
    """target, with a draft in the place of what was drawn where it is more likely than a quarter."""
    target = target.clone()
    for node in range(TREE.size - 1, 0, -1):
        parent = int(TREE.parents[node])
        likely = logits()[tokens[:, parent]].softmax(-1).gather(1, tokens[:, node : node + 1])[:, 0] > 0.25
        target[:, parent] = torch.where(likely, tokens[:, node], target[:, parent])
    return target


def p_value(counts: Tensor, wanted: Tensor) -> float:
    """That counts are as far from `wanted`, rows of probabilities, or farther."""
    expected = wanted * counts.sum(-1, keepdim=True)
    possible = wanted > 0
    if counts[~possible].any():
        return 0.0
    statistic = float(((counts - expected) ** 2 / expected.clamp(min=1e-300))[possible].sum())
    freedom = torch.tensor(float(possible.sum()) - WORDS, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, torch.tensor(statistic, dtype=torch.float64) / 2))


@pytest.mark.parametrize("case", SAMPLING)
def test_as_the_model_says(case: str) -> None:
    """The seed is fixed: this passes always or never."""
    assert p_value(drawn(SAMPLING[case]), probabilities(**SAMPLING[case])) > 0.001


@pytest.mark.parametrize("case", SAMPLING)
def test_a_wrong_rule_is_seen(case: str) -> None:
    assert p_value(drawn(SAMPLING[case], lenient=True), probabilities(**SAMPLING[case])) < 1e-9


def test_a_wrong_temperature_is_seen() -> None:
    assert p_value(drawn({**SAMPLING["plain"], "temperature": 1.03}), probabilities(**SAMPLING["plain"])) < 1e-6
