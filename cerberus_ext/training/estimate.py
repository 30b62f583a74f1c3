"""What a stage will take in memory and time, from a few warm steps of it, stated before it starts."""

from __future__ import annotations

import time
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import nn

from .distill import counted
from .options import SEGMENT

if TYPE_CHECKING:
    from .trainer import Trainer

WARM_STEPS, TIMED_STEPS = 1, 2


def state_estimate(trainer: Trainer) -> None:
    """Prints, in the main process, the draft vocabulary's coverage, the memory and the time of the training."""
    if not trainer.processes.main:
        return
    options, say, windows = trainer.options, trainer.processes.say, trainer.windows.epoch(0)
    if trainer.heads.draft_vocab is not None:
        shares = coverage(trainer)
        say(
            f"draft vocabulary: {len(trainer.heads.draft_vocab)} tokens cover {shares['training']:.2%} of the training"
            f" answers and {shares['held_out']:.2%} of the held-out ones"
        )
    steps = options.steps - trainer.step
    tokens = sum(piece.tokens for piece in trainer.training)
    at_a_time = max(sum(piece.tokens for piece in window) for window in windows)
    say(
        f"training: {steps} steps of {options.batch} positions, {steps * options.batch / tokens:.1f} times the"
        f" {tokens} there are, {at_a_time} of them in memory at a time"
    )
    say(memory_line(memory(trainer, max(sum(piece.rows for piece in window) for window in windows))))
    seconds = step_seconds(trainer)
    line = f"  time about {duration(steps * seconds)} ({seconds:.3g} s a step, without measurements)"
    missing, source = missing_states(trainer), trainer.source
    if missing:
        rate = source.computed / source.seconds * trainer.processes.count if source.seconds else None
        needed = duration(missing / rate) if rate else "an unknown time"
        line += f", and {needed} for the hidden states of {missing} tokens"
    say(line)


def coverage(trainer: Trainer) -> dict[str, float]:
    """Share of the answers' tokens that the heads can draft."""
    known = trainer.draft_index >= 0
    of = {"training": trainer.tokens, "held_out": trainer.held_tokens}
    return {name: round(known[tokens].double().mean().item(), 4) for name, tokens in of.items()}


def memory(trainer: Trainer, window: int) -> dict[str, int]:
    """Bytes in this process, by what they hold. window: rows of hidden states at a time."""
    options, rows = trainer.options, trainer.options.batch // trainer.processes.count
    held = sum(part.nbytes for part in vars(trainer.held).values()) if trainer.held else 0
    teacher_rows = rows // SEGMENT * (SEGMENT + options.heads - 1)
    return {
        "model": model_bytes(trainer.model),
        "hidden states": window * trainer.windows.row_bytes + held,
        "heads and optimizer": 4 * model_bytes(trainer.heads),  # with gradient and two moments
        "logits": 4 * len(trainer.projection) * (3 * teacher_rows + 3 * rows),
    }


def model_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def step_seconds(trainer: Trainer) -> float:
    """Of one step of this process, the gradients' exchange left out. Changes nothing that the training depends on."""
    assert trainer.held is not None  # the main process has it
    segments = trainer.options.batch // SEGMENT // trainer.processes.count
    starts = torch.arange(segments) * SEGMENT % max(1, len(trainer.held.answers) - SEGMENT)
    batch = trainer.cut(trainer.held, starts)
    counts = counted(batch.left, trainer.options.heads)
    for step in range(WARM_STEPS + TIMED_STEPS):
        if step == WARM_STEPS:
            started = time.perf_counter()
        trainer.backward(batch, counts).item()
    trainer.optimizer.zero_grad()
    return (time.perf_counter() - started) / TIMED_STEPS


def missing_states(trainer: Trainer) -> int:
    """Rows of hidden states that have to be computed until the last step."""
    source, kept, rows = trainer.source, set[int](), 0
    allowed = source.cache.allowed if source.cache else 0
    drawn = islice(trainer.windows.drawn(trainer.step), trainer.options.steps - trainer.step)
    windows = {(0 if trainer.windows.whole else step.epoch, step.number): step.window for step in drawn}
    for window in windows.values():
        new = [piece for piece in window if piece.chunk not in kept]
        rows += source.missing(new)
        kept.update(piece.chunk for piece in new if piece.chunk < allowed)
    return rows


def duration(seconds: float) -> str:
    """Such as "40 s", "12 min" or "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def memory_line(parts: dict[str, int]) -> str:
    return f"  memory about {size(sum(parts.values()))}: " + ", ".join(f"{name} {size(n)}" for name, n in parts.items())
