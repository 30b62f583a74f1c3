"""Conditional drafts: a head's drafts in the light of the token that is drafted before them.

Head k predicts its token without knowing the one before it. For every parent token t of which head k - 1 thinks, head
k's own P drafts c and the rest, which is all that it does not draft, are weighed anew:

    l(c)    = slope_k log P_k(c) + T_k[t] . G[c]          T_k = (E / rms(E)) queries_k^T, G = (W / rms(W)) keys^T
    l(rest) = slope_k log(1 - sum P_k) + rest_k           softmax over P + 1 classes

E: the token embeddings, W: the draft vocabulary's rows of the LM head. T and G are made once, when heads are bound to a
model. After a parent outside the draft vocabulary P_k is taken as it is. The first head has no parent but the pending
token, which it knows.

Letters: K heads, P drafts per head, D hidden size, V vocabulary, Vd draft vocabulary, r rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_REST = 1e-4  # of the probability that a head does not draft: its logarithm stays finite


class ConditionalDrafts(nn.Module):
    """queries (K - 1, r, D), keys (r, D), slopes (K - 1,), rest (K - 1,), of heads 2 to K.

    New ones leave the drafts as they are: keys and rest are 0, slopes 1; queries are N(0, 1/D), always the same.
    """

    def __init__(self, size: int, heads: int, rank: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)  # not torch's own: loading heads leaves the user's numbers alone
        queries = torch.empty(heads - 1, rank, size).normal_(0, size**-0.5, generator=generator)
        self.queries = nn.Parameter(queries)
        self.keys = nn.Parameter(torch.zeros(rank, size))
        self.slopes = nn.Parameter(torch.ones(heads - 1))
        self.rest = nn.Parameter(torch.zeros(heads - 1))

    def tables(self, embeddings: Tensor, draft_rows: Tensor, draft_vocab: Tensor | None) -> tuple[Tensor, Tensor]:
        """embeddings (V, D), draft_rows (Vd, D) of the LM head, draft_vocab (Vd,) -> T (K - 1, Vd, r), G (Vd, r).

        draft_vocab: ids of the draft vocabulary, None where it is the whole one. float32, with a gradient where the
        parameters have one.
        """
        parents = embeddings if draft_vocab is None else embeddings[draft_vocab]
        return self.parent_rows(parents, rms(embeddings)), self.draft_table(draft_rows)

    def parent_rows(self, parents: Tensor, scale: Tensor) -> Tensor:
        """parents (M, D): tokens' embeddings; scale: `rms` of all of them -> (K - 1, M, r) float32: rows of T."""
        return (parents.float() / scale) @ self.queries.float().transpose(1, 2)

    def draft_table(self, draft_rows: Tensor) -> Tensor:
        """draft_rows (Vd, D) -> G (Vd, r) float32."""
        return F.linear(draft_rows.float(), self.keys.float() / rms(draft_rows))


def rms(rows: Tensor) -> Tensor:
    """() float32: the root mean square of all numbers."""
    return rows.detach().float().pow(2).mean().sqrt()


def conditional_logprobs(parents: Tensor, drafts: Tensor, logprobs: Tensor, slope: Tensor, rest: Tensor) -> Tensor:
    """The formula, with a gradient: parents (..., Q, r) rows of T_k, drafts (..., P, r) rows of G, logprobs (..., P) of
    head k, slope and rest (...) -> (..., Q, P + 1) log-probabilities of the P drafts and the rest after each parent."""
    left = torch.log((1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=LEAST_REST))
    scores = parents @ drafts.transpose(-1, -2) + (slope[..., None] * logprobs)[..., None, :]
    last = (slope[..., None] * left + rest[..., None])[..., None, :].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, last], -1).log_softmax(-1)
