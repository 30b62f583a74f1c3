"""How well a number tells beforehand whether drafts are going to be accepted, and how honest probabilities are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..drafting.platt import PlattScaling, reading
from .trace import TracedText

_BINS = 10
_NEWTON_STEPS = 30
_RIDGE = 1.0  # pulls a correction that few places speak for towards none; as much as one place at even odds


def auc(signal: ArrayLike, hit: ArrayLike) -> float:
    """The probability that the signal of a hit is above that of a miss; ties count half. 0.5 says nothing.

    signal, hit (n,). NaN where there is no hit or no miss.
    """
    values, hits = np.asarray(signal, dtype=np.float64), np.asarray(hit, dtype=bool)
    positive = int(hits.sum())
    negative = len(hits) - positive
    if positive == 0 or negative == 0:
        return float("nan")
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[group]  # equal values share the mean of their ranks
    return float((ranks[hits].sum() - positive * (positive + 1) / 2) / (positive * negative))


def by_quantile(signal: ArrayLike, length: ArrayLike) -> tuple[list[float], list[float]]:
    """Mean signal and mean accepted length in up to ten groups of equally many places, by ascending signal."""
    values, lengths = np.asarray(signal, dtype=np.float64), np.asarray(length, dtype=np.float64)
    groups = [group for group in np.array_split(np.argsort(values, kind="stable"), _BINS) if len(group)]
    return [float(values[group].mean()) for group in groups], [float(lengths[group].mean()) for group in groups]


def reliability(probability: ArrayLike, hit: ArrayLike) -> tuple[list[float], list[float], float]:
    """Mean probability and share of hits, in up to ten bins of equal width, and the expected calibration error.

    The error is the mean distance of the two, weighted with how many places are in a bin; 0 is honest.
    """
    p, hits = np.asarray(probability, dtype=np.float64), np.asarray(hit, dtype=np.float64)
    bins = np.minimum((p * _BINS).astype(int), _BINS - 1)
    groups = [bins == number for number in np.unique(bins)]
    mean = [float(p[group].mean()) for group in groups]
    share = [float(hits[group].mean()) for group in groups]
    weights = [group.mean() for group in groups]
    return mean, share, float(np.dot(weights, np.abs(np.subtract(mean, share))))


def at_every_place(texts: Sequence[TracedText]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """logprobs (n, K, P) of the drafts, best first; ranks (n, K) of the right token; and (n, K): whether the heads
    before have the right token among their drafts. There a head's draft is right or wrong given a right path, which the
    length of a path is made of. Drafts that are weighed by the token before are so by the right one."""
    logprobs = torch.cat([_given_the_right_token(text) for text in texts]).double().numpy()
    ranks = np.array([row for text in texts for row in text.ranks])
    known = np.logical_and.accumulate(ranks < logprobs.shape[2], axis=1)
    if any(text.conditional is not None for text in texts):  # another draft may be the best one by then
        order = np.argsort(-logprobs, axis=2, kind="stable")
        places = np.minimum(ranks, logprobs.shape[2] - 1)[:, :, None]
        ranks = np.where(ranks < logprobs.shape[2], np.argmax(order == places, axis=2), ranks)
        logprobs = np.take_along_axis(logprobs, order, 2)
    return logprobs, ranks, np.hstack([np.ones_like(known[:, :1]), known[:, :-1]])


def _given_the_right_token(text: TracedText) -> Tensor:
    """Log-probabilities (n, K, P) of the drafts after the right token, where the head before has drafted it."""
    if text.conditional is None:
        return text.logprobs
    after = text.conditional.rerank(text.ids, text.logprobs)  # (n, K - 1, P, P)
    right = torch.tensor(text.ranks)[:, :-1].clamp(max=after.shape[2] - 1)  # of another place nothing is taken
    chosen = after.gather(2, right[:, :, None, None].expand(-1, -1, 1, after.shape[3]))[:, :, 0]
    return torch.cat([text.logprobs[:, :1], chosen], 1)


def fit_platt(texts: Sequence[TracedText]) -> list[tuple[float, float]]:
    """(slope, shift) of every head for `corrected`, by the likelihood of what happened."""
    logprobs, ranks, counts = at_every_place(texts)
    drafts = np.arange(logprobs.shape[2])
    platt = []
    for head in range(logprobs.shape[1]):
        rows = counts[:, head]
        p = np.clip(np.exp(logprobs[rows, head]), 1e-12, 1 - 1e-12)  # (m, P)
        hits = ranks[rows, head, None] == drafts
        platt.append(_logistic(np.log(p / (1 - p)).ravel(), hits.ravel().astype(np.float64)))
    return platt


def _logistic(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """(slope, shift) with the largest likelihood of y (n,) in 0..1 being sigmoid(slope * x + shift)."""
    prior = np.array([1.0, 0.0])
    found = prior.copy()
    features = np.stack([x, np.ones_like(x)])  # (2, n)
    for _ in range(_NEWTON_STEPS):
        p = 1 / (1 + np.exp(-np.clip(found @ features, -50, 50)))
        gradient = features @ (p - y) + _RIDGE * (found - prior)
        curvature = (features * (p * (1 - p))) @ features.T + _RIDGE * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        found = found - np.clip(step, -1, 1)  # far from the optimum a full step is too far
        if np.abs(step).max() < 1e-9:
            break
    return float(found[0]), float(found[1])


def head_reliability(
    texts: Sequence[TracedText], platt: PlattScaling | None
) -> list[tuple[list[float], list[float], float]]:
    """`reliability` of every head's best draft, at the places where the heads before it have the right token."""
    logprobs, ranks, counts = at_every_place(texts)
    best, right = reading(platt)(logprobs)[:, :, 0], ranks == 0  # (n, K) each
    return [
        reliability(best[rows, head], right[rows, head]) if rows.any() else ([], [], 0.0)
        for head, rows in enumerate(counts.T)
    ]
