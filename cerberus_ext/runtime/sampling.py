"""How a token is chosen from logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .. import ops
from ..drafting.tree import Tree
from ..ops.verify import sampling_numbers


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
        numbers = (self.seed, self.temperature, self.top_k, self.top_p)
        return choose(logits, positions, self.distance if self.min_p else None, *numbers)

    @property
    def distance(self) -> float:
        """How far below the best logit those are that min_p leaves out; at most 0."""
        return self.temperature * math.log(self.min_p)

    def first(self, logits: Tensor, positions: Tensor) -> Tensor:
        return self.choose(logits, positions)

    def targets(self, logits: Tensor, tokens: Tensor, tree: Tree | None, positions: Tensor) -> Tensor:
        return self.choose(logits, positions)

    def extend(self, tokens: list[int]) -> None:
        pass


class RecordedSampling:
    """The Chooser of recorded steps that draw: as Sampling, whose numbers lie on the device, so that recordings serve
    all of them. limited: whether there is a min_p."""

    host_rules: ClassVar[Sequence[str]] = ()
    seconds: ClassVar[float] = 0.0

    def __init__(self, limited: bool, device: torch.device) -> None:
        self._numbers = torch.zeros(3, dtype=torch.int64, device=device)
        self._distance = torch.zeros((), device=device) if limited else None
        self._put = Sampling()

    def put(self, sampling: Sampling) -> None:
        """From here on, tokens are chosen as it chooses them."""
        if sampling != self._put:
            numbers = sampling_numbers(sampling.seed, sampling.temperature, sampling.top_k, sampling.top_p)
            self._numbers.copy_(numbers)
            if self._distance is not None:
                self._distance.fill_(sampling.distance)
            self._put = sampling

    def first(self, logits: Tensor, positions: Tensor) -> Tensor:
        return choose(logits, positions, self._distance, 0, 1.0, 0, 1.0, self._numbers)

    def targets(self, logits: Tensor, tokens: Tensor, tree: Tree | None, positions: Tensor) -> Tensor:
        return self.first(logits, positions)

    def extend(self, tokens: list[int]) -> None:
        pass


class RecordedChoosers:
    """What recordings of one device have in the place of choosers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._drawing: dict[bool, RecordedSampling] = {}  # by whether there is a min_p

    def of(self, chooser: Chooser) -> Chooser:
        """From here on it chooses as the given one does, in every recording that has it."""
        if not isinstance(chooser, Sampling) or chooser.temperature == 0:
            return chooser
        limited = chooser.min_p > 0
        if limited not in self._drawing:
            self._drawing[limited] = RecordedSampling(limited, self._device)
        self._drawing[limited].put(chooser)
        return self._drawing[limited]


def choose(logits: Tensor, positions: Tensor, distance: float | Tensor | None, *numbers: Any) -> Tensor:
    """logits (..., V), positions (...) of the tokens to choose -> tokens (...).

    distance: those are left out that lie further than this below the best. numbers: as for `ops.choose_tokens`.
    """
    flat = logits.reshape(-1, logits.shape[-1]).contiguous()
    if distance is not None:
        lowest = flat.amax(-1, keepdim=True).float() + distance
        flat = flat.masked_fill(flat.float() < lowest, -math.inf)
    return ops.choose_tokens(flat, positions.reshape(-1).contiguous(), *numbers).view(positions.shape)
