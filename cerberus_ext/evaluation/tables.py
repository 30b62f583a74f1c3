"""The summary as tables, and all of it as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from .numbers import ALL, BASELINES, REFERENCES
from .ways import AUTOREGRESSIVE, AUTOREGRESSIVE_COMPILED, BOTH, STATIC

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


class Table(NamedTuple):
    """rows: the first one is the header."""

    title: str
    note: str
    rows: list[list[str]]


def tables(summary: dict[str, Any]) -> list[Table]:
    """Those that there are numbers for."""
    ways, categories = summary["ways"], summary["categories"]
    head = ["way", *categories]

    def by_category(of: dict[str, Any], cell: Callable[[Any], str]) -> list[list[str]]:
        """of: way -> category -> what a cell is made of."""
        return [head, *([name, *(cell(found[one]) for one in categories)] for name, found in of.items())]

    drafting = {name: ways[name] for name in drafting_ways(summary)}
    counts = {name: found[ALL]["decode"]["accepted_histogram"] for name, found in drafting.items()}
    longest = max(map(len, counts.values()), default=0)
    shares = [
        [name, *(number(count / max(1, sum(row)), "{:.1%}") for count in row + [0] * (longest - len(row)))]
        for name, row in counts.items()
    ]
    found = [
        Table(
            "All questions",
            "Whole calls, from prompt to last token. Speed-ups are ratios of totals with 95 % bootstrap intervals over"
            " the questions; in brackets the median over the questions.",
            overall(summary),
        ),
        Table("Decoding", "What happened in the steps behind the prompt; seconds over all texts.", decoding(summary)),
        *(
            Table(
                f"Speed-up over {other}, by category",
                GAINS.get(other, ""),
                by_category({k: v for k, v in ways.items() if k != other}, partial(over, other)),
            )
            for other in REFERENCES
            if other in ways
        ),
        *(
            Table(f"{title}, by category", "", by_category(drafting, partial(counted, what, form)))
            for title, what, form in BY_CATEGORY
        ),
        Table("Accepted drafts, share of the steps", "", [["way", *map(str, range(longest))], *shares]),
        Table("Tokens a step over Medusa's heads", "", by_category(summary["over_medusa"], times)),
        Table(
            "Compiling",
            "Before anything was timed; what an earlier way in the table needs, too, is counted there.",
            compiled_rows(summary),
        ),
        Table("Foreseen by calibration", "Tokens a second behind the prompt.", expected_rows(summary)),
    ]
    optional = {"Tokens a step over Medusa's heads", "Compiling", "Foreseen by calibration"}
    return [table for table in found if len(table.rows) > 1 or table.title not in optional]


def drafting_ways(summary: dict[str, Any]) -> list[str]:
    """Those of which is known what their steps accepted."""
    return [name for name, found in summary["ways"].items() if name != AUTOREGRESSIVE and "decode" in found[ALL]]


def overall(summary: dict[str, Any]) -> list[list[str]]:
    references = [name for name in BASELINES if name in summary["ways"]]
    rows = [["way", "tokens/s", *(f"over {name}" for name in references), "tokens a step", "nodes a step"]]
    for name, categories in summary["ways"].items():
        numbers = categories[ALL]
        rows.append([
            name,
            number(numbers["tokens_per_second"], "{:.1f}"),
            *("1" if one == name else f"{over(one, numbers)} [{number(numbers['over'][one]['median'], '{:.2f}x')}]"
              for one in references),
            counted("tokens_per_step", "{:.2f}", numbers),
            counted("nodes_per_step", "{:.1f}", numbers),
        ])  # fmt: skip
    return rows


def decoding(summary: dict[str, Any]) -> list[list[str]]:
    forms = {
        "tokens/s": ("tokens_per_second", "{:.1f}"),
        "tokens a step": ("tokens_per_step", "{:.2f}"),
        "nodes a step": ("nodes_per_step", "{:.1f}"),
        "accept nothing": ("accepts_nothing", "{:.0%}"),
        "gate open": ("gate_open_rate", "{:.0%}"),
    }
    rows = [["way", *forms, *(f"{phase}, s" for phase in PHASES)]]
    for name, categories in summary["ways"].items():
        if decode := categories[ALL].get("decode"):
            seconds = (number(decode["seconds"][phase], "{:.1f}") for phase in PHASES)
            rows.append([name, *(number(decode[what], form) for what, form in forms.values()), *seconds])
    return rows


def expected_rows(summary: dict[str, Any]) -> list[list[str]]:
    return [["way", "foreseen", "measured", "deviation"]] + [
        [name, f"{one['expected']:.1f}", f"{one['measured']:.1f}", f"{one['deviation_percent']:+.1f} %"]
        for name, one in summary["expected"].items()
    ]


def compiled_rows(summary: dict[str, Any]) -> list[list[str]]:
    return [["way", "sizes of steps", "seconds", "seconds in timed texts"]] + [
        [name, str(one["compilations"]), f"{one['compile_seconds']:.1f}", f"{one['timed_compile_seconds']:.1f}"]
        for name, one in summary["compiled"].items()
    ]


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
    if AUTOREGRESSIVE_COMPILED in equality["different"]:
        yield f"Those of ways with compiled steps with those of {AUTOREGRESSIVE_COMPILED}."
    if not different:
        yield "All are the same."
    for name, count in different.items():
        gap = number(equality["largest_gap"][name], "{:.3f}")
        yield f"{name}: {count} differ; the token that differs first is at most {gap} below the best logit."
    if (units := equality["near_tie_units"]) and different:
        yield f"A near tie is a gap of at most {units} units of rounding of the largest logit there."
    for one in equality["violations"]:
        yield (
            f"**VIOLATION**: {one['way']}, text {one['text']}: new token {one['new_token']} is {one['got']},"
            f" {one['other']} has {one['want']} (gap {number(one['gap'], '{:.3f}')})"
        )


def counted(what: str, form: str, numbers: dict[str, Any]) -> str:
    """Of what `decode` counts."""
    return number(numbers.get("decode", {}).get(what), form)


def over(other: str, numbers: dict[str, Any]) -> str:
    return times(numbers["over"][other])


def number(value: float | None, form: str) -> str:
    return NOTHING if value is None else form.format(value)


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
    for name, sizes, seconds, timed in compiled_rows(summary)[1:]:
        yield f"{name}: compiled {sizes} sizes of steps in {seconds} s beforehand, {timed} s in timed texts"
