"""Where two texts part, and whether it was at a near tie."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..runtime.runtime import runtime_of

# Two sums of the same products, in another order and rounded to 8 or 11 bits between the layers, differ by a few units
# in the last place of the largest logit.
NEAR_TIE_UNITS = 4


def difference(model: PreTrainedModel, got: Tensor, want: Tensor, prompt: int) -> dict[str, Any] | None:
    """Where two texts (1, S) that begin with the same `prompt` tokens part; None if they are the same.

    new_token: the place, counted from the first new token. got, want: the tokens there; None: the text has ended.
    gap: how far the logit of `got` or of `want`, whichever is less, lies below the largest one; None where a text has
    ended. largest: the largest absolute logit.
    """
    if got.equal(want):
        return None
    length = min(got.shape[1], want.shape[1])
    same = int((got[0, :length] == want[0, :length]).long().cumprod(0).sum())
    tokens = [int(text[0, same]) if same < text.shape[1] else None for text in (got, want)]
    logits = last_logits(model, want[:, :same])
    both = [token for token in tokens if token is not None]
    gap = (logits.max() - logits[both].min()).item() if len(both) == 2 else None
    return {
        "new_token": same - prompt,
        "got": tokens[0],
        "want": tokens[1],
        "gap": gap,
        "largest": logits.abs().max().item(),
    }


def last_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What the model says after the text (1, S): (V,) float32. As `decode` reads a prompt, which is faster where torch
    has no fast products in the model's dtype."""
    with torch.inference_mode(), runtime_of(model).target(ids.shape[1]) as target:
        return target.prefill(ids)[1][0].float()


def is_near_tie(found: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether rounding to `dtype` explains a `difference`: the gap is at most NEAR_TIE_UNITS units of rounding of the
    largest logit. Never in float32, in which texts have to be the same."""
    if dtype == torch.float32 or found["gap"] is None:
        return False
    return found["gap"] <= NEAR_TIE_UNITS * torch.finfo(dtype).eps * found["largest"]
