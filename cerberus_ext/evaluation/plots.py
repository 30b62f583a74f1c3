"""The summary as plots: PNG files' bytes, by name."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .numbers import ALL
from .tables import drafting_ways
from .ways import AUTOREGRESSIVE

DPI = 110
# One colour for a way in every plot, in the order of the ways: told apart with any colour vision.
COLOURS = (
    "#8c8c8c", "#56b4e9", "#009e73", "#f0b000", "#d55e00", "#0072b2", "#cc79a7", "#000000",
    "#7a5195", "#88a61b", "#7f3c1d", "#5ad1c8", "#a6761d", "#b3b3ff", "#404080",
)  # fmt: skip
PHASES = {"prefill": "#b8b8b8", "draft": "#d55e00", "verify": "#0072b2", "rest": "#f0b000"}
UNKNOWN = "#dddddd"
TITLES = {
    "speed_up": "Speed-up over the autoregressive way, by category",
    "accepted": "Drafts accepted in a step",
    "time": "Where the time goes",
}


def draw(summary: dict[str, Any]) -> dict[str, bytes]:
    """Name, as in TITLES, -> PNG. Without what no way tells."""
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(summary["ways"])}
    figures = {"speed_up": speed_up(summary, colours)}
    if names := drafting_ways(summary):
        figures["accepted"] = accepted(summary, names, colours)
    figures["time"] = time_split(summary)
    found = {}
    for name, figure in figures.items():
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=DPI)
        found[name] = file.getvalue()
    return found


def new_figure(title: str, width: float, height: float) -> tuple[Figure, Axes]:
    # Not by pyplot, which keeps figures and a backend for the whole process.
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(TITLES[title])
    return figure, axes


def speed_up(summary: dict[str, Any], colours: dict[str, str]) -> Figure:
    """A group of points for each category, a point with its interval for each way."""
    names = [name for name in summary["ways"] if name != AUTOREGRESSIVE]
    categories = summary["categories"]
    figure, axes = new_figure("speed_up", 9, 1.6 + len(categories) * (0.25 + 0.13 * max(1, len(names))))
    for index, name in enumerate(names):
        points = []  # place, value, how far the interval reaches below and above
        for row, category in enumerate(categories):
            over = summary["ways"][name][category]["over"][AUTOREGRESSIVE]
            if (value := over["total"]) is not None:
                low, high = over["total_interval"] or (value, value)
                # A percentile interval of few questions may leave out the value itself.
                reach = max(0.0, value - low), max(0.0, high - value)
                points.append((row + 0.8 * ((index + 0.5) / len(names) - 0.5), value, *reach))
        places, values, below, above = zip(*points, strict=True) if points else ((), (), (), ())
        axes.errorbar(
            values, places, xerr=[below, above], fmt="o", ms=4, lw=1.4, color=colours[name], label=name
        )  # fmt: skip
    for row in range(len(categories) - 1):
        axes.axhline(row + 0.5, color="#e0e0e0", lw=0.8)
    axes.axvline(1, color="#8c8c8c", lw=1, ls="--")
    axes.set_yticks(range(len(categories)), categories)
    axes.set_ylim(len(categories) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("times as many tokens a second; bars: 95 % bootstrap interval over the questions")
    if names:
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def accepted(summary: dict[str, Any], names: list[str], colours: dict[str, str]) -> Figure:
    figure, axes = new_figure("accepted", 9, 3.8)
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        histogram = summary["ways"][name][ALL]["decode"]["accepted_histogram"]
        places = [length + width * (index + 0.5) - 0.4 for length in range(len(histogram))]
        shares = [100 * count / max(1, sum(histogram)) for count in histogram]
        axes.bar(places, shares, width, color=colours[name], label=name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="accepted drafts", ylabel="% of the steps")
    axes.legend(frameon=False)
    return figure


def time_split(summary: dict[str, Any]) -> Figure:
    """Milliseconds a token; ways that do not tell their phases as one bar."""
    ways = summary["ways"]
    figure, axes = new_figure("time", 9, 1.4 + 0.38 * len(ways))
    for row, found in enumerate(ways.values()):
        numbers = found[ALL]
        parts = numbers["decode"]["seconds"] if "decode" in numbers else {"whole": numbers["seconds"]}
        left = 0.0
        for phase, seconds in parts.items():
            width = 1000 * seconds / max(1, numbers["tokens"])
            axes.barh(row, width, left=left, color=PHASES.get(phase, UNKNOWN))
            left += width
    axes.set_yticks(range(len(ways)), list(ways))
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("milliseconds a token")
    for phase, colour in {**PHASES, "not told apart": UNKNOWN}.items():
        axes.bar(0, 0, color=colour, label=phase)
    figure.legend(loc="outside right upper", frameon=False)
    return figure
