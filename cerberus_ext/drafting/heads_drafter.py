"""CerberusHeads bound to a model: heads + the rows of its LM head and its embeddings."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import ops
from ..ops.draft import draft, in_eight_bits
from .conditional import bind_conditional
from .context_layer import BoundContext, ContextForward, weights_of
from .drafter import Drafter, DraftRow
from .dynamic_policy import MAX_DRAFTS
from .tree import ALONE

if TYPE_CHECKING:
    from ..target.attention import Topology
    from ..target.cache import TreeCache


class HeadsDrafter(Drafter):
    """Heads bound to one model. Holds references and, where needed, copies; changes neither.

    config: the heads'. dtype, device: of what is computed here; on a CPU the model's dtype.
    weight (L, K, D, 2D or D), projection (Vd, D): of the heads, rows of the LM head; on a CPU in eight bits.
    context: what the hidden states go through before they are drafted from; None: nothing.
    """

    recordable = True

    def __init__(self, heads: Any, lm_head: Tensor, embeddings: Tensor) -> None:
        """heads: CerberusHeads; lm_head, embeddings: of a model that they fit."""
        self.config = heads.config
        self.device = lm_head.device
        self._in_eight_bits = self.device.type == "cpu"
        self.dtype = embeddings.dtype if self._in_eight_bits else heads.weight.dtype
        self.weight = self._kept(heads.weight)
        self.bias = heads.bias.detach().to(self.device, self.dtype)
        self.embeddings = embeddings.detach()
        scale = heads.anchor_scale
        self.anchor_scale = None if scale is None else scale.detach().to(self.device, self.dtype)
        self.draft_vocab = None if heads.draft_vocab is None else heads.draft_vocab.to(self.device)
        self.context = None
        if heads.context is not None:
            assert self.anchor_scale is not None  # of such heads
            layer = heads.context.named_parameters()
            tensors = {name: tensor.detach().to(self.device, self.dtype) for name, tensor in layer}
            tensors |= {"embeddings": self.embeddings, "anchor_scale": self.anchor_scale}
            weights = weights_of(heads.context.sizes, tensors).items()
            packed = {name: in_eight_bits(weight) for name, weight in weights} if self._in_eight_bits else None
            self.context = BoundContext(heads.context.sizes, tensors, packed)
        self.has_context = self.context is not None
        self._alone = ALONE.on(self.device)
        rows = lm_head.detach() if self.draft_vocab is None else lm_head.detach()[self.draft_vocab]
        self._known = len(rows)
        self.projection = self._kept(rows)
        if heads.conditional is not None:
            self.conditional = bind_conditional(heads.conditional, self.embeddings, rows, self.draft_vocab)
        self._shared = {
            tensor.data_ptr() for tensor in (*heads.parameters(), *heads.buffers(), lm_head, embeddings)
        }  # the memory of others: never written
        self._of_text: tuple[ContextForward | None, HeadsDrafter] | None = None  # the latest
        self._bound: weakref.ref[HeadsDrafter] | None = None  # what this is a copy of

    def _kept(self, weight: Tensor) -> Tensor:
        """What is read at every step."""
        if self._in_eight_bits:
            return in_eight_bits(weight.detach().to(self.device))
        return weight.detach().to(self.device, self.dtype).contiguous()

    def renew(self, new: Drafter) -> bool:
        copies = []
        assert isinstance(new, HeadsDrafter)
        for mine, fresh in zip(self._tensors(), new._tensors(), strict=True):
            if mine is None or fresh is None:
                if mine is not fresh:
                    return False
            elif (mine.shape, mine.dtype, mine.device) != (fresh.shape, fresh.dtype, fresh.device):
                return False
            elif mine.data_ptr() != fresh.data_ptr():
                if mine.data_ptr() in self._shared:
                    return False
                copies.append((mine, fresh))
        for mine, fresh in copies:
            mine.copy_(fresh)
        return True

    def _tensors(self) -> list[Tensor | None]:
        """All that drafting reads."""
        own = [self.weight, self.bias, self.embeddings, self.anchor_scale, self.draft_vocab, self.projection]
        parts = [part.read_tensors for part in (self.context, self.conditional) if part is not None]
        return [*own, *(tensor for part in parts for tensor in part)]

    def draft(self, hidden: Tensor, pending: Tensor, drafts: int) -> tuple[Tensor, Tensor]:
        """The `drafts` best tokens of every head: ids of the model's vocabulary, and their log-probabilities within the
        draft vocabulary. Raises ValueError where that does not have so many."""
        known = min(MAX_DRAFTS, self._known)
        if not 1 <= drafts <= known:
            raise ValueError(f"decode: tree must have 1 to {known} drafts of each head, got {drafts}")
        hidden = hidden.to(self.dtype).contiguous()
        if self._in_eight_bits:
            heads = self.embeddings, self.anchor_scale, self.weight, self.bias, self.projection, self._known
            return draft(hidden, pending, *heads, self.draft_vocab, drafts)
        anchor = hidden
        if self.anchor_scale is not None:
            anchor = self.embeddings.index_select(0, pending).to(self.dtype) * self.anchor_scale
        states = ops.head_stack(hidden, anchor, self.weight, self.bias)
        ids, logprobs = ops.draft_topk(states, self.projection, drafts)
        return (ids if self.draft_vocab is None else self.draft_vocab.take(ids)), logprobs

    @property
    def bound(self) -> Drafter | None:
        return self if self._bound is None else self._bound()

    def of_text(self, fused: ContextForward | None) -> HeadsDrafter:
        """The same heads for one text, whose context layer `fused` runs; None: it runs op by op.

        Of the same `fused` as before the same object: recordings know their steps by it.
        """
        if self._of_text is None or self._of_text[0] is not fused:
            drafter = copy(self)
            drafter._of_text, drafter._bound = None, weakref.ref(self)
            if self.context is not None:
                drafter.context = copy(self.context)
                drafter.context.fused = fused
            self._of_text = (fused, drafter)
        return self._of_text[1]

    def propose_together(self, rows: Sequence[DraftRow], drafts: int) -> tuple[Tensor, Tensor]:
        if not self._in_eight_bits:
            return super().propose_together(rows, drafts)
        pending = torch.cat([row.pending for row in rows])
        return self.draft(self.read_together(rows), pending, drafts)  # which ids are none is known there

    def read(self, cache: TreeCache, hidden: Tensor, pending: Tensor) -> Tensor:
        if self.context is None:
            return hidden
        return self.context.read(cache, hidden[:, None], pending[:, None], self._alone)[:, 0]

    def read_together(self, rows: Sequence[DraftRow]) -> Tensor:
        contexts = [row.drafter.context for row in rows if isinstance(row.drafter, HeadsDrafter)]
        texts = [
            (context.fused, *row[1:])
            for context, row in zip(contexts, rows, strict=True)
            if context is not None and context.fused is not None
        ]
        if len(rows) == 1 or len(texts) < len(rows):
            return super().read_together(rows)
        return texts[0][0].read_together(texts)

    def keep_prompt(self, cache: TreeCache, hidden: Tensor, tokens: Tensor) -> None:
        if self.context is not None:
            self.context.keep_prompt(cache, hidden, tokens)

    def kept(self, cache: TreeCache) -> int:
        fused = None if self.context is None else self.context.fused
        return cache.committed if fused is None else fused.kept(cache)

    def keep_nodes(self, cache: TreeCache, before: Tensor, hidden: Tensor, tokens: Tensor, tree: Topology) -> None:
        if self.context is not None:
            self.context.keep_nodes(cache, before, hidden, tokens, tree)

    def keep_path(self, hidden: Tensor, tokens: Tensor, path: Tensor) -> None:
        if self.context is not None and self.context.fused is not None:
            self.context.fused.keep_path(hidden[0], tokens[0], path[0])
