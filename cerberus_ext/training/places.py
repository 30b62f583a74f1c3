"""What conditional drafts learn from: what heads 2 to K offer at positions of answers, and what the model says there.

Letters: N positions, K heads, P drafts per head, Vd draft vocabulary, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..drafting.conditional import ConditionalDrafts, conditional_logprobs
from .distill import Offer


class Places(NamedTuple):
    """N positions, and the K - 1 heads behind the first. Classes: a head's P drafts, then the rest.

    ids       (N, K - 1, P) int32: the drafts, as rows of the projection
    logprobs  (N, K - 1, P) float32: the head's, within the draft vocabulary
    model     (N, K - 1, P + 1) float32: the target model's probabilities of the classes, within the draft vocabulary
    right     (N, K - 1) int32: the class of the target model's best token
    parents   (N, K - 1) int32: the token before the drafts
    usable    (N, K - 1) bool: the text goes on as far, and every token from the pending one to the parent is the
              target model's best one and can be drafted
    """

    ids: Tensor
    logprobs: Tensor
    model: Tensor
    right: Tensor
    parents: Tensor
    usable: Tensor

    def rows(self, which: Tensor) -> Places:
        return Places(*(part[which] for part in self))


def row_bytes(heads: int, drafts: int) -> int:
    """Of one position of `Places`."""
    return (heads - 1) * (4 * (3 * drafts + 3) + 1)


def joined(parts: Sequence[Places]) -> Places:
    return Places(*(torch.cat(field) for field in zip(*parts, strict=True)))


@torch.no_grad()
def places_of(offers: Sequence[Offer], teacher: Tensor, tokens: Tensor, left: Tensor, draft_index: Tensor) -> Places:
    """Of S segments of G consecutive positions, N = S * G.

    offers: of heads 2 to K. teacher (S, G + K - 1, Vd), left (S, G): as in `distillation`. tokens (S, G + K): also
    those after the segments. draft_index (V,): where each token stands in the draft vocabulary, or -1.
    """
    segments, width = left.shape
    log_probs, best = teacher.log_softmax(-1), teacher.argmax(-1)
    greedy = draft_index.to(tokens.device)[tokens[:, 1:]][:, : best.shape[1]] == best  # [:, j]: token j + 1 is the best
    path, heads = torch.ones_like(left, dtype=torch.bool), []
    for k, (ids, logprobs) in enumerate(offers, start=1):
        path = path & greedy[:, k - 1 : k - 1 + width]
        ahead = slice(k, k + width)
        model = log_probs[:, ahead].gather(-1, ids.view(segments, width, -1)).exp().flatten(0, 1)
        rest = (1 - model.sum(-1, keepdim=True)).clamp(min=0)
        hits = ids == best[:, ahead].flatten()[:, None]
        right = torch.where(hits.any(-1), hits.int().argmax(-1), ids.shape[1])
        parents, usable = tokens[:, ahead].flatten(), (path & (left > k)).flatten()
        heads.append((ids.int(), logprobs, torch.cat([model, rest], -1), right.int(), parents.int(), usable))
    return Places(*(torch.stack(field, 1) for field in zip(*heads, strict=True)))


def weighed(
    drafts: ConditionalDrafts, places: Places, draft_rows: Tensor, embeddings: Tensor, scales: tuple[Tensor, Tensor],
    shares: Sequence[float] = (1.0,),
) -> list[Tensor]:  # fmt: skip
    """The classes' log-probabilities by the conditional drafts, (N, K - 1, P + 1), with a gradient for them.

    draft_rows (Vd, D), embeddings (V, D); scales: the root mean squares, (), of both. shares: for each of these the
    keys count that much, and there is a result.
    """
    tokens, of_token = places.parents.unique(return_inverse=True)
    heads = torch.arange(of_token.shape[1], device=of_token.device)
    parents = drafts.parent_rows(embeddings[tokens], scales[1])[heads, of_token][:, :, None]  # (N, K - 1, 1, r)
    rows = F.embedding(places.ids, drafts.draft_table(draft_rows, scales[0]))  # (N, K - 1, P, r)
    numbers = places.logprobs, drafts.slopes, drafts.rest
    return [conditional_logprobs(parents * share, rows, *numbers)[:, :, 0] for share in shares]


def conditional_loss(logprobs: Tensor, places: Places, counts: Tensor) -> Tensor:
    """Cross-entropy to the target model's distribution over the classes, (): the sum over heads and usable positions,
    each head's divided by its count. logprobs: `weighed`. counts (K - 1,)"""
    entropy = -(places.model * logprobs).sum(-1)
    return (entropy * places.usable / counts.clamp(min=1)).sum()


@torch.no_grad()
def conditional_quality(logprobs: Tensor, places: Places) -> tuple[float, list[float]]:
    """-> the mean over heads of the cross-entropy at usable positions, and per head how often its best draft, given the
    right token before, is the target model's. logprobs: `weighed`."""
    counts = places.usable.sum(0)
    loss = conditional_loss(logprobs, places, counts) / max(1, len(counts))
    hits = (logprobs[..., :-1].argmax(-1) == places.right) & places.usable
    top1 = hits.sum(0).double() / counts.clamp(min=1)
    return round(loss.item(), 5), [round(share, 4) for share in top1.tolist()]
