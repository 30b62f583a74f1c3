"""What the ops of drafts mean, as in reference.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draft_topk(states: Tensor, projection: Tensor, drafts: int) -> tuple[Tensor, Tensor]:
    """states (B, K, D), projection (Vd, D) -> ids (B, K, P) int64, log-probabilities (B, K, P) float32.

    The P best tokens, best first, equal ones in order of id.
    """
    logits = states.double() @ projection.double().T
    # A stable descending sort keeps equal logits in order of id.
    ids = logits.sort(dim=-1, descending=True, stable=True).indices[..., :drafts]
    return ids, logits.log_softmax(-1).gather(-1, ids).float()


def rerank(ids: Tensor, logprobs: Tensor, parents: Tensor, children: Tensor, slopes: Tensor, rest: Tensor) -> Tensor:
    """ids, logprobs (B, K, P), parents (K - 1, Vd, r), children (Vd, r), slopes, rest (K - 1,) -> (B, K - 1, P, P).

    Entry [b, k, p, c] is the log-probability of draft c of head k + 2 after draft p of head k + 1.
    """
    known = (ids >= 0) & (ids < len(children))
    places, none = ids.where(known, 0), logprobs.new_tensor(-math.inf).double()
    plain = logprobs[:, 1:].double().where(known[:, 1:] & logprobs[:, 1:].isfinite(), none)[:, :, None]
    rows = parents.double()[torch.arange(len(slopes), device=ids.device)[:, None], places[:, :-1]]  # (B, K - 1, P, r)
    slope, last = slopes.double()[:, None, None], rest.double()[:, None, None]
    scores = slope * plain + rows @ children.double()[places[:, 1:]].transpose(-1, -2)
    left = slope * (1 - plain.exp().sum(-1, keepdim=True)).clamp(min=1e-4).log() + last
    classes = torch.cat([scores.where(plain.isfinite(), none), left.expand(*scores.shape[:-1], 1)], -1)
    classes = classes.where(classes.isfinite(), none)
    found = classes.log_softmax(-1).where(classes.isfinite(), none)[..., :-1]
    return found.where(known[:, :-1, :, None], plain).float()
