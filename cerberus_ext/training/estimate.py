"""What a stage will take in memory and time, from a few warm steps of it, stated before it starts."""

from __future__ import annotations

import time

from torch import nn

from .run import Run

WARM_STEPS, TIMED_STEPS = 1, 2


def state_estimate(run: Run) -> None:
    """Prints, in the main process, the draft vocabulary's coverage, the memory and the time of the training."""
    if not run.processes.main:
        return
    options, say, windows = run.options, run.processes.say, run.windows.epoch(0)
    if run.heads.draft_vocab is not None:
        shares = coverage(run)
        say(
            f"draft vocabulary: {len(run.heads.draft_vocab)} tokens cover {shares['training']:.2%} of the training"
            f" answers and {shares['held_out']:.2%} of the held-out ones"
        )
    steps = options.steps - run.step
    tokens = len(run.tokens)
    at_a_time = max(sum(chunk.tokens for chunk in window) for window in windows)
    say(
        f"training: {steps} steps of {options.batch} positions, {steps * options.batch / tokens:.1f} times the"
        f" {tokens} there are, {at_a_time} of them in memory at a time"
    )
    say(memory_line(memory(run, max(sum(chunk.rows for chunk in window) for window in windows))))
    seconds = step_seconds(run)
    line = f"  time about {duration(steps * seconds)} ({seconds:.3g} s per step, without measurements)"
    missing, source = missing_states(run), run.source
    if missing:
        rate = source.computed / source.seconds * run.processes.count if source.seconds else None
        needed = duration(missing / rate) if rate else "an unknown time"
        line += f", and {needed} for the hidden states of {missing} tokens"
    extra = run.more_seconds()
    if extra is not None:
        line += f", and {duration(extra)} for what the heads offer"
    say(line)


def coverage(run: Run) -> dict[str, float]:
    """Share of the answers' tokens that the heads can draft."""
    known = run.draft_index >= 0
    of = {"training": run.tokens, "held_out": run.held_tokens}
    return {name: round(known[tokens].double().mean().item(), 4) for name, tokens in of.items()}


def memory(run: Run, window: int) -> dict[str, int]:
    """Bytes in this process, by what they hold. window: rows of hidden states at a time."""
    held = sum(part.nbytes for part in vars(run.held).values())
    return {
        "model": model_bytes(run.model),
        "hidden states": window * run.windows.row_bytes + held,
        # With gradient and two moments.
        "heads and optimizer": model_bytes(run.heads) + 3 * sum(parameter.nbytes for parameter in run.trained),
        **run.step_memory(),
    }


def model_bytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def step_seconds(run: Run) -> float:
    """Of one step of this process, the gradients' exchange left out. Changes nothing that the training depends on."""
    for step in range(WARM_STEPS + TIMED_STEPS):
        if step == WARM_STEPS:
            started = time.perf_counter()
        run.probe()
    run.optimizer.zero_grad()
    return (time.perf_counter() - started) / TIMED_STEPS


def missing_states(run: Run) -> int:
    """Rows of hidden states that have to be computed until the last step."""
    source, kept, rows = run.source, set[int](), 0
    for window in run.windows.loads(run.step, run.options.steps):
        new = [chunk for chunk in window if chunk.number not in kept]
        rows += source.missing(new)
        kept.update(chunk.number for chunk in new if chunk.number < source.allowed)
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
