"""Reading a head's probabilities as what they are worth: heads are more, or less, certain than they should be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

PlattScaling = Sequence[tuple[float, float]]  # (slope, shift) of every head, see `corrected`
Reading = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def reading(platt: PlattScaling | None) -> Reading:
    """-> what turns log-probabilities (..., K, P) into probabilities.

    platt: None: they are taken as they are. What is no draft, with a probability of 0 or one that is no number,
    before or after the correction, gets 0.
    """
    correct: Reading = np.exp
    if platt is not None:
        slope, shift = np.reshape(platt, (-1, 2)).T[:, :, None]
        correct = partial(corrected, slope=slope, shift=shift)

    def read(logprobs: NDArray[np.float64]) -> NDArray[np.float64]:
        if logprobs.size == 0:  # the heads were not asked
            return logprobs
        probabilities = correct(logprobs)
        known = np.isfinite(logprobs + probabilities)
        return probabilities if known.all() else np.where(known, probabilities, 0.0)

    return read


def corrected(logprobs: np.ndarray, slope: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """sigmoid(slope * logit(p) + shift) of p = exp(logprobs). logprobs (..., K, P); slope, shift (K, 1): per head."""
    logs = np.minimum(np.maximum(logprobs, -60.0), -1e-9)  # where the logit is finite
    with np.errstate(over="ignore"):  # of a steep slope: the probability is then 0
        return 1 / (1 + np.exp(-(slope * (logs - np.log(-np.expm1(logs))) + shift)))
