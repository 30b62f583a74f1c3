"""How a token is chosen from logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from .. import ops
from ..drafting.tree import Tree


class Chooser(Protocol):
    """Chooses the tokens of one text.

    host_rules: what the host applies to the logits on the way, by name; a step with any is not recorded. seconds: what
    that took so far.
    """

    @property
    def host_rules(self) -> Sequence[str]: ...

    @property
    def seconds(self) -> float: ...

    def first(self, logits: Tensor, positions: Tensor) -> Tensor:
        """logits (B, V) after the prompt, positions (B,) of the tokens to choose -> tokens (B,)."""

    def targets(self, logits: Tensor, tokens: Tensor, tree: Tree | None, positions: Tensor) -> Tensor:
        """What the target model chooses after each node of a step: logits (B, N, V), tokens (B, N), positions (B, N) of
        the tokens to choose -> (B, N). tree: as the host knows it."""

    def extend(self, tokens: list[int]) -> None:
        """The text has grown by these."""


@dataclass(frozen=True)
class Sampling:
    """The Chooser that takes the logits as they are, see `ops.choose_tokens`; min_p: as in `decode`."""

    seed: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    host_rules: ClassVar[Sequence[str]] = ()
    seconds: ClassVar[float] = 0.0

    def choose(self, logits: Tensor, positions: Tensor) -> Tensor:
        """logits (..., V), positions (...) of the tokens to choose -> tokens (...)."""
        flat = logits.reshape(-1, logits.shape[-1]).contiguous()
        if self.min_p:
            lowest = flat.amax(-1, keepdim=True).float() + self.temperature * math.log(self.min_p)
            flat = flat.masked_fill(flat.float() < lowest, -math.inf)
        chosen = ops.choose_tokens(
            flat, positions.reshape(-1).contiguous(), self.seed, self.temperature, self.top_k, self.top_p
        )
        return chosen.view(positions.shape)

    def first(self, logits: Tensor, positions: Tensor) -> Tensor:
        return self.choose(logits, positions)

    def targets(self, logits: Tensor, tokens: Tensor, tree: Tree | None, positions: Tensor) -> Tensor:
        return self.choose(logits, positions)

    def extend(self, tokens: list[int]) -> None:
        pass
