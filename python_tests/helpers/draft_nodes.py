"""The nodes of draft trees, enumerated as the definition of `_host.best_drafts` says."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Draft = tuple[int, float, int]  # token, probability, proposer
Path = tuple[list[int], list[float], int]  # tokens, probabilities, proposer


class Node(NamedTuple):
    tokens: tuple[int, ...]  # along the path from the root
    probability: float
    proposer: int


def children(row: list[Draft], paths: list[Path], before: tuple[int, ...]) -> list[Draft]:
    """What may follow `before`, a node's tokens. row: what is drafted there beside the paths, best first."""
    depth = len(before)
    places: dict[int, tuple[float, int]] = {}
    for token, probability, proposer in row:
        places.setdefault(token, (probability, proposer))  # a repetition says nothing new
    along: dict[int, tuple[float, int]] = {}
    for tokens, probabilities, proposer in paths:
        if len(tokens) > depth and tuple(tokens[:depth]) == before:
            known = along.setdefault(tokens[depth], (probabilities[depth], proposer))
            if probabilities[depth] > known[0]:
                along[tokens[depth]] = probabilities[depth], proposer
    # A token of both is as likely as the likelier of the two says; the other places share what is left.
    likelier = {token: max(one, places.get(token, (0.0, 0)), key=lambda each: each[0]) for token, one in along.items()}
    taken, of_places = sum(c for c, _ in likelier.values()), sum(places.get(token, (0.0, 0))[0] for token in along)
    others = 1.0
    if taken > 0:
        others = (1 - taken) / (1 - of_places) if taken < 1 else 0.0
    rest = [
        (token, probability * others, proposer)
        for token, (probability, proposer) in places.items()
        if token not in along
    ]
    return [(token, *one) for token, one in likelier.items()] + rest


def every_node(children_of: Callable[[tuple[int, ...]], list[Draft]], max_depth: int) -> list[Node]:
    """All that may be accepted, the root first."""
    found = [Node((), 1.0, 0)]
    for node in found:  # which grows
        if len(node.tokens) < max_depth:
            for token, probability, proposer in children_of(node.tokens):
                if node.probability * probability > 0:
                    found.append(Node((*node.tokens, token), node.probability * probability, proposer))
    return found


def best_of(every: list[Node], size: int) -> list[float]:
    """The probabilities of the `size` likeliest."""
    return sorted((node.probability for node in every), reverse=True)[:size]


def nodes_of(found: list[np.ndarray]) -> list[Node]:
    parents, tokens, proposers, probabilities = (part.tolist() for part in found)
    assert parents[0] == -1 and (tokens[0], proposers[0], probabilities[0]) == (0, 0, 1.0)
    nodes = [Node((), 1.0, 0)]
    for i in range(1, len(parents)):
        assert 0 <= parents[i] < i
        nodes.append(Node((*nodes[parents[i]].tokens, tokens[i]), probabilities[i], proposers[i]))
    return nodes
