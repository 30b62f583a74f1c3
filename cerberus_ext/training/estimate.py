"""What a stage will take in memory and time, from a few warm steps of it, stated before it starts."""

from __future__ import annotations

import time
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
    options, say = trainer.options, trainer.processes.say
    if trainer.heads.draft_vocab is not None:
        shares = coverage(trainer)
        say(
            f"draft vocabulary: {len(trainer.heads.draft_vocab)} tokens cover {shares['training']:.2%} of the training"
            f" answers and {shares['held_out']:.2%} of the held-out ones"
        )
    steps = options.steps - trainer.step
    tokens = sum(piece.tokens for piece in trainer.training)
    windows = trainer.windows.epoch(0)
    window = max(sum(piece.rows for piece in part) for part in windows)
    at_a_time = max(sum(piece.tokens for piece in part) for part in windows)
    say(
        f"training: {steps} steps of {options.batch} positions, {steps * options.batch / tokens:.1f} times the"
        f" {tokens} there are, {at_a_time} of them in memory at a time"
    )
    parts = memory(trainer, window)
    say(f"  memory about {size(sum(parts.values()))}: " + ", ".join(f"{name} {size(n)}" for name, n in parts.items()))
    seconds = step_seconds(trainer)
    line = f"  time about {duration(steps * seconds)} ({seconds:.3g} s a step, without measurements)"
    missing = missing_states(trainer)
    if missing:
        rate = trainer.source.computed / trainer.source.seconds if trainer.source.seconds else None
        needed = duration(missing / rate / trainer.processes.count) if rate else "an unknown time"
        line += f", and {needed} for the hidden states of {missing} tokens"
    say(line)


def coverage(trainer: Trainer) -> dict[str, float]:
    """Share of the answers' tokens that the heads can draft."""
    known = trainer.draft_index >= 0
    of = {"training": trainer.tokens, "held_out": trainer.held_tokens}
    return {name: round(known[tokens].double().mean().item(), 4) for name, tokens in of.items()}


def memory(trainer: Trainer, window: int) -> dict[str, int]:
    """Bytes in this process, by what they hold."""
    options, rows = trainer.options, trainer.options.batch // trainer.processes.count
    held = sum(line.nbytes for line in vars(trainer.held).values()) if trainer.held else 0
    hidden = window * trainer.windows.row_bytes + held
    heads = 4 * 4 * sum(parameter.numel() for parameter in trainer.heads.parameters())  # with gradient and two moments
    teacher_rows = rows // SEGMENT * (SEGMENT + options.heads - 1)
    logits = 4 * len(trainer.projection) * (3 * teacher_rows + 3 * rows)
    return {
        "model": model_bytes(trainer.model),
        "hidden states": hidden,
        "heads and optimizer": heads,
        "logits": logits,
    }


def model_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def step_seconds(trainer: Trainer) -> float:
    """Of one step of this process, the gradients' exchange left out. Changes nothing that the training depends on."""
    held = trainer.held
    assert held is not None  # the main process has it
    segments = trainer.options.batch // SEGMENT // trainer.processes.count
    starts = torch.arange(segments) * SEGMENT % max(1, len(held.answers) - SEGMENT)
    batch = trainer.cut(held, starts)
    counts = counted(batch.left, trainer.options.heads)
    for step in range(WARM_STEPS + TIMED_STEPS):
        if step == WARM_STEPS:
            started = time.perf_counter()
        trainer.backward(batch, counts).item()
    trainer.optimizer.zero_grad()
    return (time.perf_counter() - started) / TIMED_STEPS


def missing_states(trainer: Trainer) -> int:
    """Rows of hidden states that have to be computed until the last step."""
    windows, source = trainer.windows, trainer.source
    allowed = source.cache.allowed if source.cache else 0
    stored = {chunk.chunk for chunk in source.chunks if source.cached(chunk.chunk)}
    epoch, number, _ = windows.locate(trainer.step)
    last = windows.locate(trainer.options.steps - 1)[:2]
    if windows.whole:
        epoch = last[0]  # they are computed once for all epochs
    tokens = 0
    while (epoch, number) <= last:
        parts = windows.epoch(epoch)
        for piece in parts[number]:
            if piece.chunk not in stored:
                tokens += source.chunks[piece.chunk].rows
                if piece.chunk < allowed:
                    stored.add(piece.chunk)
        epoch, number = (epoch, number + 1) if number + 1 < len(parts) else (epoch + 1, 0)
    return tokens


def duration(seconds: float) -> str:
    """Such as "40 s", "12 min" or "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
