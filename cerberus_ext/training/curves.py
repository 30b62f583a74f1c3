"""The training's curves as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..io.files import whole


def draw_curves(curve: list[dict[str, Any]], file: Path) -> None:
    """Loss, top-1 of every head and tokens a step over the steps, beside each other, as PNG. See `Trainer.measure`."""
    from matplotlib.figure import Figure

    steps = [point["step"] for point in curve]
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    loss, top1, tokens = figure.subplots(1, 3)
    loss.plot(steps, [point["loss"] for point in curve], marker=".")
    loss.set_title("Training loss since the measurement before")
    for head in range(len(curve[0]["top1"]) if curve else 0):
        top1.plot(steps, [point["top1"][head] for point in curve], marker=".", label=f"head {head + 1}")
    top1.set_title("Held-out top-1")
    for nodes in curve[0]["tokens_per_step"] if curve else []:
        values = [point["tokens_per_step"][nodes] for point in curve]
        tokens.plot(steps, values, marker=".", label=f"tree of {nodes}")
    tokens.set_title("Simulated tokens a step, held out")
    for axes in (loss, top1, tokens):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    for axes in (top1, tokens):
        if curve:
            axes.legend()
    with whole(file) as partial:
        figure.savefig(partial, format="png", dpi=100)
