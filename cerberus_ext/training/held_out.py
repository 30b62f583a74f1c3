"""How good heads are on answers they were not trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..simulate import ABSENT, RankPath, best_paths, conditional_accuracy, tokens_per_step
from .data import TrainingData

GUESSES = 16  # ranks that trees may use and that the stored accuracies cover
TREE_SIZES = (16, 32, 64)
BEST_SIZE = "32"  # the one whose tokens a step decide which heads a training run keeps
STORED_PATHS = 127  # enough for a tree of 128 nodes
ROWS = 256  # positions in one piece: bounds the (ROWS, K, Vd) logits


@dataclass
class Measurement:
    """top1, top3: per head, how often the base model's greedy token is its best guess, or one of
    its best three.

    tokens_per_step: simulated, by tree size; the trees come from every second text and are tried on the
    others.
    paths, accuracy: what `CerberusConfig` stores, from all texts.
    """

    top1: list[float]
    top3: list[float]
    tokens_per_step: dict[str, float]
    paths: list[RankPath]
    accuracy: list[list[float]]


class HeldOut:
    """The held-out rows: those of `data` from `first` on.

    lm_head (V, D), projection (Vd, D): float32; draft_index (V,): where each token stands in the projection,
    or -1.
    """

    def __init__(
        self, data: TrainingData, first: int, lm_head: Tensor, projection: Tensor, draft_index: Tensor
    ) -> None:
        self.data, self.first = data, first
        self.projection, self.draft_index = projection, draft_index
        pieces = data.hidden[first:].split(ROWS)
        greedy = [(piece.to(lm_head.device, torch.float32) @ lm_head.T).argmax(-1).cpu() for piece in pieces]
        self.greedy = torch.cat(greedy)  # the base model's greedy token at every row

    @torch.no_grad()
    def measure(self, states: Callable[[Tensor], Tensor], heads: int) -> Measurement:
        """states: row numbers (N,) -> final states (K, N, D) of `heads` heads at them."""
        greedy, text = self.ranks(states, heads)
        left = self.data.left[self.first :]
        top1, top3 = ([share(greedy[left > k, k] < top) for k in range(heads)] for top in (1, 3))
        texts = self.texts(text)
        tried = best_paths((row for rows in texts[::2] for row in rows), STORED_PATHS, GUESSES)
        per_step = {
            str(size): round(tokens_per_step(texts[1::2], tried[: size - 1]), 4) for size in TREE_SIZES
        }
        rows = [row for rows in texts for row in rows]
        paths = best_paths(rows, STORED_PATHS, GUESSES)
        accuracy = conditional_accuracy(rows, paths[: TREE_SIZES[-1] - 1], GUESSES)
        return Measurement(top1, top3, per_step, paths, accuracy)

    def ranks(self, states: Callable[[Tensor], Tensor], heads: int) -> tuple[Tensor, Tensor]:
        """(T, K) each: at every row the rank, among head k's guesses, of the base model's greedy token k
        places on, and of the token that the text has there; ABSENT where the text ends before or the draft
        vocabulary lacks it."""
        greedy: list[Tensor] = []
        text: list[Tensor] = []
        end = len(self.data.tokens)
        ahead = torch.arange(1, heads + 1)
        for rows in torch.arange(self.first, end).split(ROWS):
            logits = (states(rows) @ self.projection.T).transpose(0, 1)  # (N, K, Vd)
            later = (rows[:, None] + ahead).clamp(max=end - 1)
            inside = self.data.left[rows][:, None] >= ahead
            choices = self.greedy[later - self.first], self.data.tokens[later]
            for tokens, results in zip(choices, (greedy, text), strict=True):
                index = self.draft_index[tokens]
                found = logits.gather(-1, index.clamp(min=0)[..., None].to(logits.device))
                results.append(torch.where(inside & (index >= 0), (logits > found).sum(-1).cpu(), ABSENT))
        return torch.cat(greedy), torch.cat(text)

    def texts(self, ranks: Tensor) -> list[list[list[int]]]:
        """Ranks by line: of the lines sampled at temperature 0 where the data names at least two such, since
        another text is not what the base model would have chosen; else of all lines."""
        lines = self.data.lines[self.first :]
        parts = {int(line): ranks[lines == line].tolist() for line in lines.unique()}
        greedy = [rows for line, rows in parts.items() if self.data.greedy[line]]
        return greedy if len(greedy) > 1 else list(parts.values())


def share(hits: Tensor) -> float:
    """How many of `hits` (n,) bool are true, as a share; 0 of none."""
    return round(hits.double().mean().item(), 4) if len(hits) else 0.0
