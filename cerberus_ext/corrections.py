"""Reading a head's probabilities as what they are worth: heads are more, or less, certain than they should be."""

from __future__ import annotations

import numpy as np


def corrected(logprobs: np.ndarray, slope: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """sigmoid(slope * logit(p) + shift) of p = exp(logprobs). logprobs (..., K, P); slope, shift (K, 1): per head."""
    logs = np.minimum(np.maximum(logprobs, -60.0), -1e-9)  # where the logit is finite
    return 1 / (1 + np.exp(-(slope * (logs - np.log(-np.expm1(logs))) + shift)))
