"""The training's curves as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..io.files import whole


def draw_curves(curve: list[dict[str, Any]], file: Path) -> None:
    """Loss, top-1 of every head and tokens per step, beside each other, as PNG. curve: see `Trainer.measure`."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    first: dict[str, Any] = curve[0] if curve else {"top1": [], "tokens_per_step": {}}
    plots: tuple[tuple[str, str, dict[Any, Any]], ...] = (
        ("Training loss since the measurement before", "loss", {None: None}),
        ("Held-out top-1", "top1", {head: f"head {head + 1}" for head in range(len(first["top1"]))}),
        (
            "Simulated tokens per step, held out",
            "tokens_per_step",
            {n: f"tree of {n}" for n in first["tokens_per_step"]},
        ),
    )
    for axes, (title, name, lines) in zip(figure.subplots(1, 3), plots, strict=True):
        for key, label in lines.items():
            values = [point[name] if key is None else point[name][key] for point in curve]
            axes.plot([point["step"] for point in curve], values, marker=".", label=label)
        if any(lines.values()):
            axes.legend()
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    with whole(file) as partial:
        figure.savefig(partial, format="png", dpi=100)
