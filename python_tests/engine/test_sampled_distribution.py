"""What is drawn through trees of drafts has the model's probabilities: Pearson's chi-square over 100 000 draws."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from generate_cases import NEW, cerberus
from stand_ins import OracleHeads
from tiny_models import VOCAB, prompt, tiny_model
from torch import Tensor

from cerberus_ext import decode, ops
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.runtime.sampling import Sampling

WORDS, DRAWS, ROWS = 10, 100_000, 2000
TREE = StaticPolicy.from_widths([4, 3, 2]).tree
SAMPLING: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 1.0},
    "cut": {"temperature": 0.8, "top_k": 6, "top_p": 0.9},
    "min_p": {"temperature": 1.3, "min_p": 0.15, "top_p": 0.95},
}


@cache
def logits() -> Tensor:
    """(WORDS, WORDS): a model in which the next word depends on the last one."""
    return torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(2)) * 1.5


def probabilities(temperature: float, top_k: int = WORDS, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """(WORDS, WORDS) float64, of the next word after each."""
    wanted = (logits().double() / temperature).softmax(-1)
    ranked, order = wanted.sort(-1, descending=True)
    ranked[ranked < min_p * ranked[:, :1]] = 0
    ranked[:, top_k:] = 0
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
        target = Sampling(seed=3, **sampling).choose(model[tokens], positions)
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


def test_min_p_of_decode() -> None:
    """With and without drafts, and as transformers' own processor applies it."""
    model, options = tiny_model("llama"), {"temperature": 1.4, "min_p": 0.1, "seed": 3}
    want = cerberus(model, prompt(), do_sample=True, top_k=0, **options)
    assert decode(model, None, prompt(), max_new_tokens=NEW, **options).sequences.equal(want)
    heads = OracleHeads(want, 3, VOCAB)
    out = decode(model, heads, prompt(), max_new_tokens=NEW, tree=9, streamer=heads, **options)
    assert out.sequences.equal(want) and out.stats.tokens_per_step > 2
    assert not decode(model, None, prompt(), max_new_tokens=NEW, **options | {"min_p": 0.0}).sequences.equal(want)
