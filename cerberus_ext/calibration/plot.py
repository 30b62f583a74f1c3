"""calibration.png: what gate signals say about the accepted length, and how honest probabilities are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..io.files import whole

MADE_BY = "cerberus calibrate"  # stands in the picture, so that only ours is ever written over


def plot(details: dict[str, Any], file: Path) -> None:
    """details: `Calibration.details`. Written whole or not at all."""
    figure = Figure(figsize=(17, 8), layout="constrained")
    axes = figure.subplots(2, 4).flatten()
    for axis, signal in zip(axes, details["signals"], strict=False):
        axis.plot(signal["mean"], signal["accepted"], "o-", color="tab:blue")
        value = "none" if signal["auc"] is None else f"{signal['auc']:.2f}"
        axis.set(title=f"{signal['name']}: AUC {value}", xlabel=signal["unit"], ylabel="accepted drafts, mean")
        axis.set_ylim(bottom=0)
    axis = axes[4]
    axis.plot([0, 1], [0, 1], ":", color="gray")
    for number, head in enumerate(details["reliability"]):
        for style, name in ((":", "drafted"), ("-", "corrected")):
            part = head[name]
            label = f"head {number + 1}: error {part['error']:.3f}" if name == "corrected" else None
            axis.plot(part["probability"], part["share"], style, marker=".", color=f"C{number}", label=label)
    axis.set(title="best draft: probability (dotted), corrected (line)", xlabel="probability", ylabel="share right")
    axis.legend(fontsize="small")
    axis = axes[5]
    for style, (name, row) in zip((":", "-"), details["expectations"].items(), strict=False):
        label = f"{name}: {row['mean_expected']:.2f} expected, {row['mean_added']:.2f} added"
        axis.plot(row["expected"], row["added"], style, marker=".", color="tab:blue", label=label)
        axis.plot([1, row["expected"][-1]], [1, row["expected"][-1]], ":", color="gray")
        axis.legend(fontsize="small")
    axis.set(title="steps", xlabel="tokens expected", ylabel="tokens added, mean")
    axis, rows = axes[6], details["sizes"]
    axis.plot([row["size"] for row in rows], [row["tokens_per_second"] for row in rows], "o-")
    axis.set(title="without a gate", xlabel="nodes of the tree", ylabel="tokens/s, expected")
    axis.set_ylim(bottom=0)
    axes[7].set_axis_off()
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as partial:
        figure.savefig(partial, format="png", dpi=110, metadata={"Software": MADE_BY})
