"""Ratios over questions, and their intervals from resampled questions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RESAMPLES = 4000
SHARE = 0.95

Statistic = Callable[[np.ndarray], np.ndarray]


def bootstrap_interval(statistic: Statistic, rows: np.ndarray, seed: int = 0) -> tuple[float, float] | None:
    """Percentile interval that holds SHARE of the values a statistic takes when the rows are drawn with replacement.

    rows: (Q, C), one row per question. statistic: (..., Q, C) -> (...). None for fewer than two rows, which say
    nothing about how questions differ.
    """
    if len(rows) < 2:
        return None
    picks = np.random.default_rng(seed).integers(len(rows), size=(RESAMPLES, len(rows)))
    low, high = np.quantile(statistic(rows[picks]), [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)


def ratio_of_totals(rows: np.ndarray) -> np.ndarray:
    """rows (..., Q, 4): a, b of one way and c, d of another, per question -> (sum a / sum b) / (sum c / sum d)."""
    a, b, c, d = np.moveaxis(rows.sum(axis=-2), -1, 0)
    return a * d / (b * c)


def median_of_ratios(rows: np.ndarray) -> np.ndarray:
    """rows (..., Q, 4) as above -> the median over the questions of (a / b) / (c / d)."""
    a, b, c, d = np.moveaxis(rows, -1, 0)
    return np.median(a * d / (b * c), axis=-1)
