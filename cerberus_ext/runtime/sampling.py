"""How a token is chosen from logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from .. import ops
from ..drafting.tree import Tree
from ..ops.verify import sampling_numbers


class Chooser(Protocol):
    """Chooses the tokens of one text.

    host_rules: what the host applies to the logits on the way, by name; a step with any is not recorded. seconds: what
    that took so far. inexact_because: why the text depends on what is drafted; None: it does not.
    """

    @property
    def host_rules(self) -> Sequence[str]: ...

    @property
    def seconds(self) -> float: ...

    @property
    def inexact_because(self) -> str | None: ...

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
    inexact_because: ClassVar[str | None] = None

    def choose(self, logits: Tensor, positions: Tensor) -> Tensor:
        """logits (..., V), positions (...) of the tokens to choose -> tokens (...)."""
        numbers = (self.seed, self.temperature, self.top_k, self.top_p)
        return choose(logits, positions, self.distance if self.min_p else None, *numbers)

    @property
    def distance(self) -> float:
        """How far below the best logit those are that min_p leaves out; at most 0."""
        return self.temperature * math.log(self.min_p)

    def follow(self, logits: Tensor, position: Tensor, drafts: list[int]) -> int:
        """What follows a node whose children are `drafts`: logits (1, V), position (1,) of the token to choose."""
        return int(self.choose(logits, position))

    def first(self, logits: Tensor, positions: Tensor) -> Tensor:
        return self.choose(logits, positions)

    def targets(self, logits: Tensor, tokens: Tensor, tree: Tree | None, positions: Tensor) -> Tensor:
        return self.choose(logits, positions)

    def extend(self, tokens: list[int]) -> None:
        pass


@dataclass(frozen=True)
class Typical(Sampling):
    """Medusa's typical acceptance, which is lossy: a draft is accepted, too, where the model gives it more than
    min(epsilon, delta exp(-entropy)), though another token was drawn. Probabilities are those that are drawn from.

    Of the paths that are accepted so, the longest wins. Source: arXiv 2401.10774, with its constants.
    """

    epsilon: float = 0.09
    delta: float = 0.3
    host_rules: ClassVar[Sequence[str]] = ("acceptance='typical'",)
    inexact_because: ClassVar[str | None] = "acceptance='typical' accepts drafts that the model did not choose"

    def follow(self, logits: Tensor, position: Tensor, drafts: list[int]) -> int:
        """The first child that is accepted: which of them goes on longest is not known."""
        drawn, tokens = self.choose(logits, position), torch.tensor(drafts, dtype=torch.int64, device=logits.device)
        accepted = self._accepted(logits, drawn, torch.zeros_like(tokens), tokens)
        return next((token for token, taken in zip(drafts, accepted, strict=True) if taken), int(drawn))

    def targets(self, logits: Tensor, tokens: Tensor, tree: Tree | None, positions: Tensor) -> Tensor:
        """What was drawn, but after nodes with accepted children the one that goes on longest; the first of equals."""
        assert tree is not None
        drawn, parents = self.choose(logits, positions), torch.from_numpy(tree.parents[1:]).to(tokens.device)
        accepted = self._accepted(logits[0], drawn[0], parents, tokens[0, 1:])
        target, drafts, length = drawn[0].tolist(), tokens[0].tolist(), [0] * tree.size  # accepted tokens below a node
        for node in range(tree.size - 1, 0, -1):
            parent = tree.parents[node]
            if accepted[node - 1] and length[node] >= length[parent] - 1:
                target[parent], length[parent] = drafts[node], length[node] + 1
        return tokens.new_tensor([target])

    def _accepted(self, logits: Tensor, drawn: Tensor, parents: Tensor, tokens: Tensor) -> list[bool]:
        """logits (N, V), drawn (N,) after each node; parents, tokens (M,) of drafts -> which of them are accepted."""
        scores = without_improbable(logits, self.distance if self.min_p else None).float() / self.temperature
        ids: Any = drawn[:, None]  # nothing is made of them
        if self.top_k:
            scores = TopKLogitsWarper(self.top_k)(ids, scores)
        if self.top_p < 1:
            scores = TopPLogitsWarper(self.top_p)(ids, scores)
        probabilities = scores.softmax(-1)
        lowest = (self.delta * (-torch.special.entr(probabilities).sum(-1)).exp()).clamp(max=self.epsilon)
        known = (tokens >= 0) & (tokens < logits.shape[-1])
        likely = probabilities[parents, tokens.where(known, 0)] > lowest[parents]
        return (known & (likely | (tokens == drawn[parents]))).tolist()


class RecordedSampling:
    """The Chooser of recorded steps that draw: as Sampling, whose numbers lie on the device, so that recordings serve
    all of them. limited: whether there is a min_p."""

    host_rules: ClassVar[Sequence[str]] = ()
    seconds: ClassVar[float] = 0.0
    inexact_because: ClassVar[str | None] = None

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
    flat = without_improbable(logits.reshape(-1, logits.shape[-1]).contiguous(), distance)
    return ops.choose_tokens(flat, positions.reshape(-1).contiguous(), *numbers).view(positions.shape)


def without_improbable(logits: Tensor, distance: float | Tensor | None) -> Tensor:
    """logits (M, V) -> the same without those that lie further than `distance` below the best of their row."""
    if distance is None:
        return logits
    lowest = logits.amax(-1, keepdim=True).float() + distance
    return logits.masked_fill(logits.float() < lowest, -math.inf)
