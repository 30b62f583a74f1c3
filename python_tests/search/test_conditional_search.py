"""Conditional drafts in `_host.best_drafts`, against all nodes there are, enumerated as the definition says."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from draft_nodes import Draft, Path, best_of, children, every_node, nodes_of
from torch import Tensor

from cerberus_ext import _host, ops
from cerberus_ext.drafting.platt import reading
from cerberus_ext.ops import reference

HEADS, DRAFTS, VOCAB, KNOWN, RANK = 4, 6, 30, 20, 5
PLATT = ((0.8, -0.1), (1.3, 0.2), (0.5, 0.0), (-0.5, 0.3))  # the last one turns the order round


class Given:
    """Heads with conditional drafts, at one step. Of the tokens from KNOWN on there are no rows of the tables."""

    def __init__(self, seed: int, platt: Any = None) -> None:
        torch.manual_seed(seed)
        self.platt = platt
        self.places = torch.cat([torch.randperm(KNOWN), torch.full((VOCAB - KNOWN,), -1)])
        self.parents, self.children = (
            torch.randn(*s).to(torch.bfloat16) for s in ((HEADS - 1, KNOWN, RANK), (KNOWN, RANK))
        )
        self.slopes, self.rest = torch.rand(HEADS - 1) + 0.5, torch.randn(HEADS - 1)
        order = torch.randn(HEADS, KNOWN).argsort(-1)[:, :DRAFTS].contiguous()
        self.tokens = order
        self.logprobs = torch.randn(HEADS, DRAFTS + 2).log_softmax(-1).sort(-1, descending=True).values[:, :DRAFTS]
        self.logprobs = self.logprobs.contiguous()
        self.after = self._rerank(ops.rerank, self.tokens)[0]

    def _rerank(self, op: Any, tokens: Tensor) -> Tensor:
        places = torch.where(tokens >= 0, self.places[tokens], -1)[None]
        return op(places, self.logprobs[None], self.parents, self.children, self.slopes, self.rest)

    def host(self, pairs: bool = True) -> Any:
        """pairs: with what rerank gives, or by the tables alone."""
        bits = (table.view(torch.int16).numpy() for table in (self.parents, self.children))
        tables = _host.ConditionalTables(*bits, *(part.numpy() for part in (self.places, self.slopes, self.rest)))
        platt = None if self.platt is None else np.array(self.platt)
        return tables, self.tokens.numpy(), self.logprobs.numpy(), self.after.numpy() if pairs else None, platt, 0

    def row(self, before: tuple[int, ...]) -> list[Draft]:
        """Of the heads, after these tokens."""
        depth = len(before)
        if depth >= HEADS:
            return []
        logprobs = self.logprobs[depth]
        if depth > 0 and self.places[before[-1]] >= 0:  # as if the head before had drafted this token
            tokens = self.tokens.clone()
            tokens[depth - 1, 0] = before[-1]
            logprobs = self._rerank(reference.rerank, tokens)[0, depth - 1, 0]
        table = torch.full((HEADS, DRAFTS), -math.inf)
        table[depth] = logprobs
        order = np.argsort(-logprobs.numpy(), kind="stable")
        probabilities = np.minimum.accumulate(reading(self.platt)(table.double().numpy())[depth][order])
        tokens = self.tokens[depth].numpy()[order]
        return [(int(token), float(p), 0) for token, p in zip(tokens, probabilities, strict=True)]

    def table(self, others: list[list[Draft]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the search is given for each depth: all drafts as they are without the token before."""
        plain = np.minimum.accumulate(reading(self.platt)(self.logprobs.double().numpy()), axis=1)
        rows = []
        for depth in range(HEADS):
            own = [(int(t), float(p), 0) for t, p in zip(self.tokens[depth], plain[depth], strict=True)]
            rows.append(sorted([*own, *others[depth]], key=lambda draft: -draft[1]))
        return tuple(np.array([[draft[i] for draft in row] for row in rows]) for i in range(3))  # type: ignore[return-value]


def others(seed: int, count: int) -> list[list[Draft]]:
    """Of another proposer, whose drafts do not depend on the token before."""
    generator = np.random.default_rng(seed)
    return [
        [(int(generator.integers(VOCAB)), float(generator.random() / 4), 3) for _ in range(count)] for _ in range(HEADS)
    ]


def paths_of(seed: int, count: int) -> list[Path]:
    """Of tokens that the heads have drafted, that they have not, and that are in no table."""
    generator = np.random.default_rng(seed)
    return [(generator.integers(0, VOCAB, 4).tolist(), generator.random(4).tolist(), 5 + n) for n in range(count)]


@pytest.mark.parametrize("platt", [None, PLATT], ids=["plain", "platt"])
@pytest.mark.parametrize("seed", range(6))
def test_against_all_nodes(seed: int, platt: Any) -> None:
    heads, paths, more = Given(seed, platt), paths_of(seed, seed % 3), others(seed, seed % 2)
    for row in range(2):  # tokens of paths that the heads draft themselves
        if row < len(paths):
            paths[row][0][:2] = heads.tokens[:2, row].tolist()

    def rows(before: tuple[int, ...]) -> list[Draft]:
        of_others = more[len(before)] if len(before) < HEADS else []
        return sorted([*heads.row(before), *of_others], key=lambda draft: -draft[1])

    every = every_node(lambda before: children(rows(before), paths, before), 3)
    for size, pairs in itertools.product((1, 2, 9, 40), (True, False)):
        given = [(np.array(t), np.array(p), proposer) for t, p, proposer in paths]
        found = _host.best_drafts(*heads.table(more), given, VOCAB, size, 3, heads.host(pairs))
        nodes = nodes_of(found)
        assert [node.probability for node in nodes] == pytest.approx(best_of(every, size), rel=1e-4)
        by_tokens = {node.tokens: node for node in every}
        for node in nodes:
            expected = by_tokens[node.tokens]
            assert (
                node.probability == pytest.approx(expected.probability, rel=1e-4) and node.proposer == expected.proposer
            )


def test_without_tables_nothing_changes() -> None:
    heads = Given(1)
    table = heads.table([[] for _ in range(HEADS)])
    plain, none = (_host.best_drafts(*table, [], VOCAB, 20, 4, *given) for given in ((), (None,)))
    assert all(np.array_equal(a, b) for a, b in zip(plain, none, strict=True))


def test_numbers_that_are_none_become_no_drafts() -> None:
    heads = Given(2)
    heads.after.fill_(math.nan)
    heads.parents.fill_(math.nan)
    path = [(np.array([25, 3, 4]), np.array([0.9, 0.9, 0.9]), 1)]  # 25 is in no table, 3 and 4 are
    parents, tokens, proposers, probabilities = _host.best_drafts(
        *heads.table([[] for _ in range(HEADS)]), path, VOCAB, 40, 4, heads.host()
    )
    depths = _host.depths(parents)
    assert np.isfinite(probabilities).all() and (proposers[depths > 2] == 1).all()
    assert (depths == 2).sum() == 1 + DRAFTS - (3 in heads.tokens[1]), (
        "after what is in no table drafts stay as they are"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: (None, *h[1:]), "heads: tables must be ConditionalTables, got None"),
        (
            lambda h: (h[0], h[1][:2], *h[2:]),
            r"heads: tokens must be a contiguous array of dtype int64 and shape \(4, any",
        ),
        (lambda h: (h[0], h[1].astype(np.int32), *h[2:]), "heads: tokens must be"),
        (lambda h: (*h[:2], h[2].astype(np.float64), *h[3:]), r"heads: logprobs must be .* float32 and shape \(4, 6\)"),
        (lambda h: (*h[:3], h[3][:, :, ::2], *h[4:]), r"heads: after must be a contiguous array"),
        (lambda h: (*h[:4], np.zeros((3, 2)), h[5]), r"heads: platt must be .* float64 and shape \(4, 2\)"),
    ],
)
def test_wrong_heads(change: Any, message: str) -> None:
    heads = Given(1)
    with pytest.raises(ValueError, match=f"best_drafts: {message}"):
        _host.best_drafts(*heads.table([[] for _ in range(HEADS)]), [], VOCAB, 4, 4, change(heads.host()))


@pytest.mark.parametrize(
    ("name", "wrong"), [("parents", np.int32), ("children", None), ("places", np.int32), ("rest", None)]
)
def test_wrong_tables(name: str, wrong: Any) -> None:
    arrays = {
        "parents": np.zeros((2, 5, 3), np.int16), "children": np.zeros((5, 3), np.int16),
        "places": np.zeros(9, np.int64), "slopes": np.zeros(2, np.float32), "rest": np.zeros(2, np.float32),
    }  # fmt: skip
    _host.ConditionalTables(**arrays)
    arrays[name] = arrays[name][:1] if wrong is None else arrays[name].astype(wrong)
    with pytest.raises(ValueError, match=f"ConditionalTables: {name} must be a contiguous array"):
        _host.ConditionalTables(**arrays)


def test_wild_tables_are_never_read_outside() -> None:
    """Values are not checked: places and tokens may be anything."""
    heads = Given(3)
    heads.places[:5] = torch.tensor([2**62, -5, KNOWN, -(2**63), KNOWN + 100])
    heads.tokens[1, :3] = torch.tensor([-1, 2**62, -(2**63)])
    heads.after.view(-1)[::3] = math.nan
    table = Given(3).table([[] for _ in range(HEADS)])
    path = [(np.arange(4), np.full(4, 0.5), 1)]
    for pairs in (True, False):
        _, _, _, probabilities = _host.best_drafts(*table, path, VOCAB, 60, 4, heads.host(pairs))
        assert ((probabilities >= 0) & (probabilities <= 1)).all()
