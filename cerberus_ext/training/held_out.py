"""How good heads are on answers they were not trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..drafting.simulate import ABSENT, RankPath, best_paths, conditional_accuracy, tokens_per_step
from .positions import Positions

DRAFTS = 16  # ranks that trees may use and that the stored accuracies cover
TREE_SIZES = (16, 32, 64)
BEST_SIZE = "32"  # the one whose tokens per step decide which heads a training run keeps
STORED_PATHS = 127  # enough for a tree of 128 nodes
ROWS = 256  # positions in one product: bounds the (ROWS, K, Vd) logits
MAX_LINES = 512  # some 100 000 positions: a share has a standard error below 0.2 %


@dataclass
class Measurement:
    """top1, top3: per head, how often the target model's greedy token is its best draft, or one of
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
    """Positions that the heads are not trained on.

    greedy: of each line of the data, whether it is known to have been sampled at temperature 0.
    lm_head (V, D), projection (Vd, D); draft_index (V,): where each token stands in the projection, or -1.
    """

    def __init__(
        self, data: Positions, greedy: list[bool], lm_head: Tensor, projection: Tensor, draft_index: Tensor
    ) -> None:
        self.greedy = greedy
        self.tokens, self.left, self.lines = (part[data.answers] for part in (data.tokens, data.left, data.lines))
        self.projection, self.draft_index = projection, draft_index
        rows = data.hidden[data.answers].split(ROWS)
        chosen = [(part.to(lm_head.device, lm_head.dtype) @ lm_head.T).argmax(-1).cpu() for part in rows]
        self.chosen = torch.cat(chosen)  # the target model's greedy token at every position

    @torch.no_grad()
    def measure(self, read: Tensor, states: Callable[[Tensor, Tensor], Tensor], heads: int) -> Measurement:
        """read (A, D): what the heads read at the answers' tokens. states: N such rows and the tokens (N,) there ->
        final states (K, N, D) of `heads` heads."""
        chosen, text = self.ranks(read, states, heads)
        left = self.left
        top1, top3 = ([share(chosen[left > k, k] < top) for k in range(heads)] for top in (1, 3))
        texts = self.texts(text)
        tried = best_paths((row for rows in texts[::2] for row in rows), STORED_PATHS, DRAFTS)
        others = texts[1::2] or texts  # a single text serves for both
        per_step = {str(size): round(tokens_per_step(others, tried[: size - 1]), 4) for size in TREE_SIZES}
        rows = [row for rows in texts for row in rows]
        paths = best_paths(rows, STORED_PATHS, DRAFTS)
        accuracy = conditional_accuracy(rows, paths[: TREE_SIZES[-1] - 1], DRAFTS)
        return Measurement(top1, top3, per_step, paths, accuracy)

    def ranks(self, read: Tensor, states: Callable[[Tensor, Tensor], Tensor], heads: int) -> tuple[Tensor, Tensor]:
        """(A, K) each: at every position the rank, among head k's drafts, of the target model's greedy token k
        places on, and of the token that the text has there; ABSENT where the text ends before or the draft
        vocabulary lacks it."""
        chosen: list[Tensor] = []
        text: list[Tensor] = []
        end = len(self.tokens)
        ahead = torch.arange(1, heads + 1)
        for rows in torch.arange(end).split(ROWS):
            final = states(read[rows], self.tokens[rows])
            logits = (final.to(self.projection.dtype) @ self.projection.T).transpose(0, 1)  # (N, K, Vd)
            later = (rows[:, None] + ahead).clamp(max=end - 1)
            inside = self.left[rows][:, None] >= ahead
            choices = self.chosen[later], self.tokens[later]
            for tokens, results in zip(choices, (chosen, text), strict=True):
                index = self.draft_index[tokens]
                scores = logits.gather(-1, index.clamp(min=0)[..., None].to(logits.device))
                results.append(torch.where(inside & (index >= 0), (logits > scores).sum(-1).cpu(), ABSENT))
        return torch.cat(chosen), torch.cat(text)

    def texts(self, ranks: Tensor) -> list[list[list[int]]]:
        """Ranks by line: of the lines sampled at temperature 0 where the data names at least two such, since
        another text is not what the target model would have chosen; else of all lines."""
        parts = {int(line): ranks[self.lines == line].tolist() for line in self.lines.unique()}
        greedy = [rows for line, rows in parts.items() if self.greedy[line]]
        return greedy if len(greedy) > 1 else list(parts.values())


def merit(point: dict[str, Any]) -> float:
    """What decides which heads a run keeps, by a point of its curve; more is better."""
    per_step = point.get("tokens_per_step")
    return -point["conditional_loss"] if per_step is None else per_step[BEST_SIZE]


def described(point: dict[str, Any]) -> str:
    """A point of the curve as a line for the user."""
    parts = [f"step {point['step']}"]
    if point["loss"] is not None:
        parts[0] += f": loss {point['loss']:.3f}"
    if "top1" in point:
        top1, per_step = (" ".join(f"{share:.3f}" for share in point["top1"]), point["tokens_per_step"])
        values = " ".join(f"{n:.2f}" for n in per_step.values())
        parts.append(f"held out: top-1 of heads 1 to {len(point['top1'])}: {top1}")
        parts.append(f"tokens per step with trees of {', '.join(per_step)} nodes: {values}")
    if "conditional_top1" in point:
        top1 = " ".join(f"{share:.3f}" for share in point["conditional_top1"])
        last = len(point["conditional_top1"]) + 1
        parts.append(f"held out, after the right token: top-1 of heads 2 to {last}: {top1}")
        parts.append(f"conditional loss {point['conditional_loss']:.4f}")
    return "; ".join(parts)


def share(hits: Tensor) -> float:
    """How many of `hits` (n,) bool are true, as a share; 0 of none."""
    return round(hits.double().mean().item(), 4) if len(hits) else 0.0
