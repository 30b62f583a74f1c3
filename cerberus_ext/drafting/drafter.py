"""Heads bound to a model: what the steps of a decode call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..target.attention import Topology
    from ..target.cache import TreeCache
    from .conditional import BoundConditional


class Drafter:
    """To write one, derive and override `draft`; everything else has a default.

    recordable   `draft` computes on the device only, from its arguments and from tensors that stay where they are, so
                 that a recorded step may contain it. Otherwise it is called before every replay
    conditional  what weighs its drafts by the token before; None: nothing does
    has_context  it has keys and values of its own for every token: the cache has a layer for them, and it is told of
                 all tokens and of the hidden states that they led to
    """

    recordable: bool = False
    conditional: BoundConditional | None = None
    has_context: bool = False

    @property
    def bound(self) -> Drafter | None:
        """What the heads were bound as, where this is the same for one text; None: it is gone."""
        return self

    def draft(self, hidden: Tensor, pending: Tensor, drafts: int) -> tuple[Tensor, Tensor]:
        """hidden (B, D), pending (B,) -> token ids (B, K, P) int64 and log-probabilities (B, K, P) float32, best first.

        drafts: P. hidden: what `read` has made of it.
        """
        raise NotImplementedError(f"{type(self).__name__} must have draft, see Drafter")

    def read(self, cache: TreeCache, hidden: Tensor, pending: Tensor) -> Tensor:
        """hidden (B, D): what pending (B,) was chosen from -> what is drafted from, (B, D)."""
        return hidden

    def keep_prompt(self, cache: TreeCache, hidden: Tensor, tokens: Tensor) -> None:
        """hidden (B, S, D): what each of the prompt's tokens (B, S) led to.

        Where the cache has held tokens before these, the first one's own keys and values are there already.
        """

    def keep_nodes(self, cache: TreeCache, before: Tensor, hidden: Tensor, tokens: Tensor, tree: Topology) -> None:
        """before (B, D): what node 0 was chosen from; hidden (B, N, D): what the nodes' tokens (B, N) led to."""

    def keep_path(self, hidden: Tensor, tokens: Tensor, path: Tensor) -> None:
        """After keep_nodes: hidden, tokens as there; path (B, N) int64: the nodes that were accepted, then -1."""

    def kept(self, cache: TreeCache) -> int:
        """How many tokens the text may have in common with the next one, for it to go on with the same cache."""
        return 0 if self.has_context else cache.committed

    def renew(self, new: Drafter) -> bool:
        """Takes over the values of `new`, bound to the same heads and model, into the memory that recordings read.

        False: they do not lie, or fit, where they did, and nothing was changed; recordings of it are of no use any
        more.
        """
        return False

    def propose(self, cache: TreeCache, hidden: Tensor, pending: Tensor, drafts: int) -> tuple[Tensor, Tensor]:
        """hidden (B, D): what pending (B,) was chosen from -> ids, logprobs (B, K, P) of the drafts behind it.

        On the device. Id -1 where the probability is 0 or no number: such a draft is none.
        """
        return self.propose_together([DraftRow(self, cache, hidden, pending)], drafts)

    def propose_together(self, rows: Sequence[DraftRow], drafts: int) -> tuple[Tensor, Tensor]:
        """The same for texts with drafters of the same heads: ids, logprobs (B, K, P), a text behind the other."""
        pending = torch.cat([row.pending for row in rows])
        ids, logprobs = self.draft(self.read_together(rows), pending, drafts)
        return ids.masked_fill(logprobs - logprobs != 0, -1), logprobs  # isfinite, in fewer ops

    def read_together(self, rows: Sequence[DraftRow]) -> Tensor:
        """What `read` gives for each of the texts, (B, D)."""
        return torch.cat([row.drafter.read(row.cache, row.hidden, row.pending) for row in rows])


class DraftRow(NamedTuple):
    """Where a text stands when its drafter is asked, as in `Drafter.propose`."""

    drafter: Drafter
    cache: TreeCache
    hidden: Tensor
    pending: Tensor


class HeadsLike(Protocol):
    """What `decode` needs of heads; CerberusHeads is one. config.num_heads is K; config.conditional_rank, where there
    is one: what they are bound to may weigh its drafts by the token before."""

    config: Any

    def bind(self, model: PreTrainedModel) -> Drafter: ...


NO_DRAFTER = Drafter()  # where no tree has drafts of heads: it is never asked
