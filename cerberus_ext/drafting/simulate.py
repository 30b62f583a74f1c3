"""What drafting would be worth: trees and tokens a step, from where the right token stood among every head's
drafts.

Everything here works on ranks: ranks[i][k] is the rank, among the drafts of head k + 1 at position i of a
text, of the token that really stands k + 1 places after the pending token (0 is the best draft); ABSENT when the text
ends before it or the head cannot draft it. Worked example: ranks [0, 2] are a step in which the first head's
best draft was right and so was the second head's third, so the path (0, 2) would have been accepted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

ABSENT = 1 << 30
RankPath = tuple[int, ...]


def best_paths(ranks: Iterable[Sequence[int]], count: int, drafts: int) -> list[RankPath]:
    """The `count` paths that were right most often, most frequent first.

    A path's beginning is right at least as often as the path, and wins ties, so the pending token and the first n
    paths are a tree for every n, and no other tree of n + 1 nodes would have had more tokens accepted on
    these ranks.
    """
    seen: Counter[RankPath] = Counter()
    for row in ranks:
        for depth, rank in enumerate(row, start=1):
            if rank >= drafts:
                break
            seen[tuple(row[:depth])] += 1
    return sorted(seen, key=lambda path: (-seen[path], len(path), path))[:count]


def accepted_length(row: Sequence[int], tree: set[RankPath]) -> int:
    """How many tokens after the pending one a step with `tree` accepts."""
    depth = 0
    while depth < len(row) and tuple(row[: depth + 1]) in tree:
        depth += 1
    return depth


def steps_through(places: int, accepted_at: Callable[[int], int]) -> Iterator[int]:
    """How many drafts each step through a text of so many places accepts. accepted_at: asked for a place at which one
    begins; a step at place i with a accepted drafts is followed by one at i + a + 1."""
    place = 0
    while place < places:
        accepted = accepted_at(place)
        yield accepted
        place += accepted + 1


def tokens_per_step(texts: Iterable[Sequence[Sequence[int]]], paths: Iterable[RankPath]) -> float:
    """Tokens a step over whole texts, each a list of ranks, one row per place. The first token of a text comes with the
    prompt and is not counted."""
    tree = set(paths)
    tokens = steps = 0
    for rows in texts:
        tokens += max(0, len(rows) - 1)
        lengths = [accepted_length(row, tree) for row in rows]
        steps += sum(1 for _ in steps_through(len(rows) - 1, lengths.__getitem__))
    return tokens / max(1, steps)


def conditional_accuracy(ranks: Sequence[Sequence[int]], paths: Iterable[RankPath], drafts: int) -> list[list[float]]:
    """Entry [k][r]: how often draft r of head k + 1 is right, given a right path of `paths` before it."""
    tree = set(paths) | {()}
    heads = len(ranks[0]) if ranks else 0
    table = [[0] * drafts for _ in range(heads)]
    tried = [0] * heads
    for row in ranks:
        for head, rank in enumerate(row):
            if tuple(row[:head]) not in tree:
                break
            tried[head] += 1
            if rank >= drafts:
                break
            table[head][rank] += 1
    return [[round(hits / max(1, total), 6) for hits in row] for row, total in zip(table, tried, strict=True)]
