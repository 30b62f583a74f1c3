"""The summary as plots: PNG files' bytes, by name."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from .numbers import ALL
from .ways import AUTOREGRESSIVE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 110
# One colour for a way in every plot, in the order of the ways: told apart with any colour vision.
COLOURS = (
    "#8c8c8c",
    "#56b4e9",
    "#009e73",
    "#f0b000",
    "#d55e00",
    "#0072b2",
    "#cc79a7",
    "#000000",
    "#7a5195",
    "#88a61b",
    "#7f3c1d",
    "#5ad1c8",
    "#a6761d",
    "#b3b3ff",
    "#404080",
)
PHASES = {"prefill": "#b8b8b8", "draft": "#d55e00", "verify": "#0072b2", "rest": "#f0b000"}
TITLES = {
    "speed_up": "Speed-up over the autoregressive way, by category",
    "accepted": "Drafts accepted in a step",
    "time": "Where the time goes",
}


def draw(summary: dict[str, Any]) -> dict[str, bytes]:
    """Name, as in TITLES, -> PNG. Without what no way tells."""
    found = {"speed_up": speed_up(summary)}
    if drafting(summary):
        found["accepted"] = accepted(summary)
    found["time"] = time_split(summary)
    return {name: png(figure) for name, figure in found.items()}


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=DPI)
    return file.getvalue()


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    # Figure itself, and not pyplot, which keeps figures and a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def colour_of(summary: dict[str, Any], way: str) -> str:
    return COLOURS[list(summary["ways"]).index(way) % len(COLOURS)]


def drafting(summary: dict[str, Any]) -> list[str]:
    """The ways of which is known what their steps accepted."""
    return [name for name, found in summary["ways"].items() if name != AUTOREGRESSIVE and "decode" in found[ALL]]


def speed_up(summary: dict[str, Any]) -> Figure:
    """A group of points for each category, a point with its interval for each way."""
    names = [name for name in summary["ways"] if name != AUTOREGRESSIVE]
    categories = summary["categories"]
    figure, axes = new_figure(9, 1.6 + len(categories) * (0.25 + 0.13 * max(1, len(names))))
    for index, name in enumerate(names):
        places, values, below, above = [], [], [], []
        for row, category in enumerate(categories):
            over = summary["ways"][name][category]["over"][AUTOREGRESSIVE]
            if over["total"] is not None:
                low, high = over["total_interval"] or (over["total"], over["total"])
                places.append(row + 0.8 * ((index + 0.5) / len(names) - 0.5))
                values.append(over["total"])
                # A percentile interval of few questions may leave out the value itself.
                below.append(max(0.0, over["total"] - low))
                above.append(max(0.0, high - over["total"]))
        colour = colour_of(summary, name)
        axes.errorbar(values, places, xerr=[below, above], fmt="o", ms=4, lw=1.4, color=colour, label=name)
    for row in range(len(categories) - 1):
        axes.axhline(row + 0.5, color="#e0e0e0", lw=0.8)
    axes.axvline(1, color="#8c8c8c", lw=1, ls="--")
    axes.set_yticks(range(len(categories)), categories)
    axes.set_ylim(len(categories) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("times as many tokens a second; bars: 95 % bootstrap interval over the questions")
    axes.set_title(TITLES["speed_up"])
    if names:
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def accepted(summary: dict[str, Any]) -> Figure:
    from matplotlib.ticker import MaxNLocator

    names = drafting(summary)
    figure, axes = new_figure(9, 3.8)
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        histogram = summary["ways"][name][ALL]["decode"]["accepted_histogram"]
        total = max(1, sum(histogram))
        places = [length + width * (index + 0.5) - 0.4 for length in range(len(histogram))]
        shares = [100 * count / total for count in histogram]
        axes.bar(places, shares, width, color=colour_of(summary, name), label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("accepted drafts")
    axes.set_ylabel("% of the steps")
    axes.set_title(TITLES["accepted"])
    axes.legend(frameon=False)
    return figure


def time_split(summary: dict[str, Any]) -> Figure:
    """Milliseconds a token; ways that do not tell their phases as one bar."""
    figure, axes = new_figure(9, 1.4 + 0.38 * len(summary["ways"]))
    for row, found in enumerate(summary["ways"].values()):
        numbers = found[ALL]
        per_token = 1000 / numbers["tokens"] if numbers["tokens"] else 0.0
        parts = numbers["decode"]["seconds"] if "decode" in numbers else {"whole": numbers["seconds"]}
        left = 0.0
        for phase, seconds in parts.items():
            axes.barh(row, seconds * per_token, left=left, color=PHASES.get(phase, "#dddddd"))
            left += seconds * per_token
    axes.set_yticks(range(len(summary["ways"])), list(summary["ways"]))
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds a token")
    axes.set_title(TITLES["time"])
    for phase, colour in {**PHASES, "not told apart": "#dddddd"}.items():
        axes.bar(0, 0, color=colour, label=phase)
    figure.legend(loc="outside right upper", frameon=False)
    return figure
