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

import copy
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import _host, ops

LEAST_REST = 1e-4  # of the probability that a head does not draft: its logarithm stays finite
_ROWS = 4096  # of a model's matrix that are made float32 at once


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

    def draft_table(self, draft_rows: Tensor, scale: Tensor | None = None) -> Tensor:
        """draft_rows (M, D) of the LM head -> (M, r) float32: rows of G. scale: `rms` of all of the draft vocabulary's
        rows; None: of these."""
        return F.linear(draft_rows.float(), self.keys.float() / (rms(draft_rows) if scale is None else scale))


def rms(rows: Tensor) -> Tensor:
    """() float32: the root mean square of all numbers."""
    return torch.linalg.vector_norm(rows.detach(), dtype=torch.float32) / rows.numel() ** 0.5


def conditional_logprobs(parents: Tensor, drafts: Tensor, logprobs: Tensor, slope: Tensor, rest: Tensor) -> Tensor:
    """The formula, with a gradient: parents (..., Q, r) rows of T_k, drafts (..., P, r) rows of G, logprobs (..., P) of
    head k, slope and rest (...) -> (..., Q, P + 1) log-probabilities of the P drafts and the rest after each parent."""
    left = torch.log((1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=LEAST_REST))
    scores = parents @ drafts.transpose(-1, -2) + (slope[..., None] * logprobs)[..., None, :]
    last = (slope[..., None] * left + rest[..., None])[..., None, :].expand(*scores.shape[:-1], 1)
    return torch.cat([scores, last], -1).log_softmax(-1)


class ConditionalLogprobs(NamedTuple):
    """What the tree search weighs drafts by: the tables, and logprobs (K - 1, P, P) of `ops.rerank`, None where the
    tables alone are to be read."""

    tables: _host.ConditionalTables
    logprobs: NDArray[np.float32] | None


class BoundConditional:
    """Conditional drafts bound to a model: what `ops.rerank` reads, on the model's device and on the host.

    tensors: parents (K - 1, Vd, r), children (Vd, r) bfloat16, slopes, rest (K - 1,) float32, and places (V,) int64: a
    token's row of the tables, -1 where it has none.
    host: the same on the CPU. tables: the same for the tree search, in the same memory.
    """

    def __init__(self, tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]) -> None:
        self.tensors = tensors
        on_host = tensors[0].device.type == "cpu"
        self.host: BoundConditional = self if on_host else BoundConditional(tuple(part.cpu() for part in tensors))  # type: ignore[arg-type]
        if on_host:
            parents, children, slopes, rest, places = tensors
            bits = (table.view(torch.int16).numpy() for table in (parents, children))
            self.tables = _host.ConditionalTables(*bits, *(part.numpy() for part in (places, slopes, rest)))
        else:
            self.tables = self.host.tables

    @property
    def read_tensors(self) -> list[Tensor]:
        """All that it reads."""
        return [*self.tensors] if self.host is self else [*self.tensors, *self.host.tensors]

    def rerank(self, ids: Tensor, logprobs: Tensor) -> Tensor:
        """ids, logprobs (B, K, P): what the heads draft, -1: nothing -> (B, K - 1, P, P), see `ops.rerank`."""
        parents, children, slopes, rest, places = self.tensors
        return ops.rerank(places.take(ids), logprobs, parents, children, slopes, rest)

    def for_search(self, ids: Tensor, logprobs: Tensor) -> ConditionalLogprobs:
        """ids, logprobs (1, K, P): what the heads draft. On a CPU a search reads the tables itself: it needs but few of
        all pairs, and every row comes from far."""
        after = None if self.host is self else self.rerank(ids, logprobs)[0].numpy(force=True)
        return ConditionalLogprobs(self.tables, after)


@torch.no_grad()
def bind_conditional(
    drafts: ConditionalDrafts, embeddings: Tensor, draft_rows: Tensor, draft_vocab: Tensor | None
) -> BoundConditional:
    """embeddings (V, D), draft_rows (Vd, D) of the LM head, draft_vocab (Vd,) as in `tables`; on one device."""
    device, tokens = embeddings.device, len(embeddings)
    ids = torch.arange(tokens, device=device) if draft_vocab is None else draft_vocab
    drafts = copy.deepcopy(drafts).to(device, torch.float32)
    scale, draft_scale = rms(embeddings), rms(draft_rows)
    parents = [drafts.parent_rows(embeddings[part], scale).to(torch.bfloat16) for part in ids.split(_ROWS)]
    children = [drafts.draft_table(rows, draft_scale).to(torch.bfloat16) for rows in draft_rows.split(_ROWS)]
    places = torch.full((tokens,), -1, device=device).index_copy_(0, ids, torch.arange(len(ids), device=device))
    tables = torch.cat(parents, 1), torch.cat(children)
    return BoundConditional((*tables, drafts.slopes.detach(), drafts.rest.detach(), places))
