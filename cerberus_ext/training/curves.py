"""The training's curves as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..io.files import whole


def draw_curves(curve: list[dict[str, Any]], file: Path) -> None:
    """Loss and what was measured, beside each other, as PNG. curve: see `Trainer.measure`."""
    first: dict[str, Any] = curve[0] if curve else {}
    plots: list[tuple[str, str, dict[Any, Any]]] = [("Training loss, since the point before", "loss", {None: None})]
    for title, name, begin in (("Held-out top-1", "top1", 1), ("After the right token", "conditional_top1", 2)):
        if name in first:
            plots.append((title, name, {head: f"head {head + begin}" for head in range(len(first[name]))}))
    if "conditional_loss" in first:
        plots.append(("Held-out conditional loss", "conditional_loss", {None: None}))
    if "tokens_per_step" in first:
        sizes = {n: f"tree of {n}" for n in first["tokens_per_step"]}
        plots.append(("Simulated tokens per step, held out", "tokens_per_step", sizes))
    figure = Figure(figsize=(13 / 3 * len(plots), 3.8), layout="constrained")
    for axes, (title, name, lines) in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
        for key, label in lines.items():
            values = [point[name] if key is None else point[name][key] for point in curve]
            axes.plot([point["step"] for point in curve], values, marker=".", label=label)
        if any(lines.values()):
            axes.legend()
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    with whole(file) as partial:
        figure.savefig(partial, format="png", dpi=100)
