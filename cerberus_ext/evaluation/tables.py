"""The summary as tables, and all of it as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .numbers import ALL, BASELINES, REFERENCES
from .ways import AUTOREGRESSIVE, BOTH, STATIC

NOTHING = "–"
GAINS = {
    STATIC: "What other ways to use the same heads gain over one tree for all steps.",
    BOTH: "It drafts at every step: what the calibrated way gains over it is the gate's, and the size's.",
}
PHASES = ("prefill", "draft", "verify", "rest")
BY_CATEGORY = (
    ("Tokens a step", "tokens_per_step", "{:.2f}"),
    ("Nodes a step", "nodes_per_step", "{:.1f}"),
    ("Share of the open steps that accept nothing", "accepts_nothing", "{:.1%}"),
    ("Share of the steps that are open", "gate_open_rate", "{:.1%}"),
)


Cell = Callable[[Any], str]


class Table(NamedTuple):
    """rows: the first one is the header."""

    title: str
    note: str
    rows: list[list[str]]


def grid(columns: Mapping[str, Cell], ways: Mapping[str, Any]) -> list[list[str]]:
    """columns: title -> what makes a cell of what there is of a way."""
    return [["way", *columns], *([name, *(cell(way) for cell in columns.values())] for name, way in ways.items())]


def tables(summary: dict[str, Any]) -> list[Table]:
    """Those that there are numbers for."""
    ways = summary["ways"]
    drafting = {name: ways[name] for name in drafting_ways(summary)}

    def by_category(cell: Cell, ways: Mapping[str, Any]) -> list[list[str]]:
        return grid({one: lambda way, one=one: cell(way[one]) for one in summary["categories"]}, ways)  # type: ignore[misc]

    found = [
        Table(
            "All questions",
            "Whole calls, from prompt to last token. Speed-ups are ratios of totals with 95 % bootstrap intervals over"
            " the questions; in brackets the median over the questions.",
            overall(summary),
        ),
        Table("Decoding", "What happened in the steps behind the prompt; seconds over all texts.", decoding(summary)),
    ]
    for other in REFERENCES:
        if other in ways:
            others = {name: way for name, way in ways.items() if name != other}
            rows = by_category(over(other), others)
            found.append(Table(f"Speed-up over {other}, by category", GAINS.get(other, ""), rows))
    for title, what, form in BY_CATEGORY:
        found.append(Table(f"{title}, by category", "", by_category(counted(what, form), drafting)))
    counts = {name: way[ALL]["decode"]["accepted_histogram"] for name, way in drafting.items()}
    longest = max(map(len, counts.values()), default=0)
    found.append(
        Table("Accepted drafts, share of the steps", "", grid({str(n): share(n) for n in range(longest)}, counts))
    )
    if over_medusa := summary["over_medusa"]:
        found.append(Table("Tokens a step over Medusa's heads", "", by_category(times, over_medusa)))
    if summary["expected"]:
        found.append(Table("Foreseen by calibration", "Tokens a second behind the prompt.", expected_rows(summary)))
    return found


def drafting_ways(summary: dict[str, Any]) -> list[str]:
    """Those of which is known what their steps accepted."""
    return [name for name, found in summary["ways"].items() if name != AUTOREGRESSIVE and "decode" in found[ALL]]


def overall(summary: dict[str, Any]) -> list[list[str]]:
    ways = {name: way[ALL] for name, way in summary["ways"].items()}

    def beside(other: str) -> Cell:
        median = "{:.2f}x"
        return lambda way: (
            "1" if way is ways[other] else f"{over(other)(way)} [{number(way['over'][other]['median'], median)}]"
        )

    columns = {
        "tokens/s": of("tokens_per_second", "{:.1f}"),
        **{f"over {other}": beside(other) for other in BASELINES if other in ways},
        "tokens a step": counted("tokens_per_step", "{:.2f}"),
        "nodes a step": counted("nodes_per_step", "{:.1f}"),
    }
    return grid(columns, ways)


def decoding(summary: dict[str, Any]) -> list[list[str]]:
    columns = {
        "tokens/s": of("tokens_per_second", "{:.1f}"),
        "tokens a step": of("tokens_per_step", "{:.2f}"),
        "nodes a step": of("nodes_per_step", "{:.1f}"),
        "accept nothing": of("accepts_nothing", "{:.0%}"),
        "gate open": of("gate_open_rate", "{:.0%}"),
        **{f"{phase}, s": lambda way, phase=phase: f"{way['seconds'][phase]:.1f}" for phase in PHASES},  # type: ignore[misc]
    }
    return grid(columns, {name: way[ALL]["decode"] for name, way in summary["ways"].items() if "decode" in way[ALL]})


def expected_rows(summary: dict[str, Any]) -> list[list[str]]:
    forms = {"foreseen": ("expected", "{:.1f}"), "measured": ("measured", "{:.1f}"),
             "deviation": ("deviation_percent", "{:+.1f} %")}  # fmt: skip
    return grid({title: of(*form) for title, form in forms.items()}, summary["expected"])


def facts(summary: dict[str, Any]) -> dict[str, str]:
    """Label -> value: what was measured, on what, when, how."""
    settings, about = summary["settings"], summary["about"]
    turns = " and ".join(map(str, settings["turns"]))
    return {
        "model": f"{settings['model']}, {settings['dtype']} on {settings['device']}; heads {settings['heads']}",
        "texts": f"{summary['texts']} of {summary['questions']} questions of {settings['questions']}, turn {turns},"
        f" up to {settings['new_tokens']} new tokens, greedy, {settings['rounds']} round(s), the ways in turns",
        "machine": "; ".join(f"{label}: {value}" for label, value in settings["machine"].items()),
        "versions": ", ".join(f"{name} {value}" for name, value in settings["versions"].items()),
        "begun": about["date"] + (f", commit {about['commit']}" if about["commit"] else ""),
        "command": f"`{about['command']} --limit {summary['questions']}`",
    }


def equality_lines(equality: dict[str, Any]) -> Iterator[str]:
    different = {name: count for name, count in equality["different"].items() if count}
    yield f"{equality['texts']} texts of each way were compared with the autoregressive way's, token for token."
    if not different:
        yield "All are the same."
    for name, count in different.items():
        gap = number(equality["largest_gap"][name], "{:.3f}")
        yield f"{name}: {count} differ; the token that differs first is at most {gap} below the best logit."
    for name, reason in equality["not_compared"].items():
        yield f"{name}: its texts are not compared: {reason}."
    if (units := equality["near_tie_units"]) and different:
        yield f"A near tie is a gap of at most {units} units of rounding of the largest logit there."
    for one in equality["violations"]:
        yield (
            f"**VIOLATION**: {one['way']}, text {one['text']}: new token {one['new_token']} is {one['got']},"
            f" {one['other']} has {one['want']} (gap {number(one['gap'], '{:.3f}')})"
        )


def number(value: float | None, form: str) -> str:
    return NOTHING if value is None else form.format(value)


def of(what: str, form: str) -> Cell:
    return lambda numbers: number(numbers[what], form)


def counted(what: str, form: str) -> Cell:
    """Of what `decode` counts."""
    return lambda numbers: number(numbers.get("decode", {}).get(what), form)


def over(other: str) -> Cell:
    return lambda numbers: times(numbers["over"][other])


def share(place: int) -> Cell:
    """Of the counts of a histogram."""
    return lambda counts: number((counts[place] if place < len(counts) else 0) / max(1, sum(counts)), "{:.1%}")


def times(found: dict[str, Any]) -> str:
    """1.62x (1.50 - 1.75)"""
    interval = found["total_interval"]
    return number(found["total"], "{:.2f}x") + (f" ({interval[0]:.2f} - {interval[1]:.2f})" if interval else "")


def markdown(summary: dict[str, Any]) -> str:
    """The whole of bench.md."""
    settings, left_out = summary["settings"], summary["about"]["left_out"]
    parts = [
        "# cerberus bench",
        "\n".join(f"- {label}: {value}" for label, value in facts(summary).items()),
        "Ways: " + "; ".join(f"**{name}**: {text}" for name, text in settings["ways"].items()) + ".",
        *(f"Left out: {name}: {reason}." for name, reason in left_out.items()),
    ]
    for title, note, rows in tables(summary):
        parts += [f"## {title}", *([note] if note else []), markdown_table(rows)]
    return "\n\n".join([*parts, "## Equality", *equality_lines(summary["equality"])]) + "\n"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """rows: the first one is the header."""
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def lines_of(summary: dict[str, Any]) -> Iterable[str]:
    """What the command prints at its end: the first table, aligned, and what was foreseen."""
    rows = overall(summary)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for name, foreseen, measured, deviation in expected_rows(summary)[1:]:
        yield f"{name}: calibration foresaw {foreseen} tokens/s behind the prompt, measured {measured} ({deviation})"
