"""Where two texts part, and how near a tie that was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def difference(model: PreTrainedModel, got: Tensor, want: Tensor, prompt: int) -> dict[str, Any] | None:
    """Where two texts (1, S) part, and how near a tie that was; None if they are the same."""
    if got.equal(want):
        return None
    length = min(got.shape[1], want.shape[1])
    same = int((got[0, :length] == want[0, :length]).long().cumprod(0).sum())
    with torch.inference_mode():
        best = model(want[:, :same]).logits[0, -1].float().topk(2)
    return {
        "new_token": same - prompt,
        "got": got[0, same].item() if same < got.shape[1] else None,
        "want": want[0, same].item() if same < want.shape[1] else None,
        "best_two": best.indices.tolist(),
        "gap": (best.values[0] - best.values[1]).item(),
    }
