"""The summary as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .numbers import ALL, BASELINES, REFERENCES
from .ways import AUTOREGRESSIVE, AUTOREGRESSIVE_COMPILED, BOTH, STATIC

NOTHING = "–"
GAINS = {
    STATIC: "What other ways to use the same heads gain over one tree for all steps.",
    BOTH: "It drafts at every step: what the calibrated way gains over it is the gate's, and the size's.",
}


def markdown(summary: dict[str, Any]) -> str:
    """The whole of bench.md."""
    parts = [
        "# cerberus bench",
        bullets(facts(summary)),
        "Ways: " + "; ".join(f"**{name}**: {text}" for name, text in summary["settings"]["ways"].items()) + ".",
        *(f"Left out: {name}: {reason}." for name, reason in summary["about"]["left_out"].items()),
    ]
    for title, note, rows in tables(summary):
        parts += [f"## {title}", *([note] if note else []), table(rows)]
    parts += ["## Equality", *equality_lines(summary["equality"])]
    return "\n\n".join(parts) + "\n"


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


def tables(summary: dict[str, Any]) -> list[tuple[str, str, list[list[str]]]]:
    """(title, note, rows), the first row being the header."""
    found = [
        (
            "All questions",
            "Whole calls, from prompt to last token. Speed-ups are ratios of totals with 95 % bootstrap intervals over"
            " the questions; in brackets the median over the questions.",
            overall(summary),
        ),
        ("Decoding", "What happened in the steps behind the prompt; seconds over all texts.", decoding(summary)),
    ]
    for reference in REFERENCES:
        if reference in summary["ways"]:
            found.append(
                (
                    f"Speed-up over {reference}, by category",
                    GAINS.get(reference, ""),
                    speed_by_category(summary, reference),
                )
            )
    for title, what, form in (
        ("Tokens a step", "tokens_per_step", "{:.2f}"),
        ("Nodes a step", "nodes_per_step", "{:.1f}"),
        ("Share of the open steps that accept nothing", "accepts_nothing", "{:.1%}"),
        ("Share of the steps that are open", "gate_open_rate", "{:.1%}"),
    ):
        found.append((f"{title}, by category", "", by_category(summary, what, form)))
    found.append(("Accepted drafts, share of the steps", "", histograms(summary)))
    if summary["over_medusa"]:
        found.append(("Tokens a step over Medusa's heads", "", medusa_rows(summary)))
    if summary["compiled"]:
        note = "Before anything was timed; what an earlier way in the table needs, too, is counted there."
        found.append(("Compiling", note, compiled_rows(summary)))
    if summary["expected"]:
        found.append(("Foreseen by calibration", "Tokens a second behind the prompt.", expected_rows(summary)))
    return found


def overall(summary: dict[str, Any]) -> list[list[str]]:
    references = [name for name in BASELINES if name in summary["ways"]]
    rows = [["way", "tokens/s", *(f"over {name}" for name in references), "tokens a step", "nodes a step"]]
    for name, categories in summary["ways"].items():
        numbers = categories[ALL]
        ups = [
            f"{times(numbers['over'][other])} [{number(numbers['over'][other]['median'], '{:.2f}x')}]"
            if other != name
            else "1"
            for other in references
        ]
        rows.append(
            [
                name,
                number(numbers["tokens_per_second"], "{:.1f}"),
                *ups,
                number(of_decode(numbers, "tokens_per_step"), "{:.2f}"),
                number(of_decode(numbers, "nodes_per_step"), "{:.1f}"),
            ]
        )
    return rows


def decoding(summary: dict[str, Any]) -> list[list[str]]:
    phases = ("prefill", "draft", "verify", "rest")
    rows = [[
        "way", "tokens/s", "tokens a step", "nodes a step", "accept nothing", "gate open",
        *(f"{phase}, s" for phase in phases),
    ]]  # fmt: skip
    for name, categories in summary["ways"].items():
        decode = categories[ALL].get("decode")
        if decode:
            rows.append(
                [
                    name,
                    number(decode["tokens_per_second"], "{:.1f}"),
                    number(decode["tokens_per_step"], "{:.2f}"),
                    number(decode["nodes_per_step"], "{:.1f}"),
                    number(decode["accepts_nothing"], "{:.0%}"),
                    number(decode["gate_open_rate"], "{:.0%}"),
                    *(number(decode["seconds"][phase], "{:.1f}") for phase in phases),
                ]
            )
    return rows


def speed_by_category(summary: dict[str, Any], reference: str) -> list[list[str]]:
    rows = [["way", *summary["categories"]]]
    for name, categories in summary["ways"].items():
        if name != reference:
            rows.append([name, *(times(categories[one]["over"][reference]) for one in summary["categories"])])
    return rows


def by_category(summary: dict[str, Any], what: str, form: str) -> list[list[str]]:
    rows = [["way", *summary["categories"]]]
    for name, categories in summary["ways"].items():
        if name != AUTOREGRESSIVE and "decode" in categories[ALL]:
            rows.append([name, *(number(of_decode(categories[one], what), form) for one in summary["categories"])])
    return rows


def histograms(summary: dict[str, Any]) -> list[list[str]]:
    counts = {
        name: categories[ALL]["decode"]["accepted_histogram"]
        for name, categories in summary["ways"].items()
        if name != AUTOREGRESSIVE and "decode" in categories[ALL]
    }
    longest = max((len(one) for one in counts.values()), default=0)
    rows = [["way", *map(str, range(longest))]]
    for name, histogram in counts.items():
        shares = [count / max(1, sum(histogram)) for count in histogram] + [0.0] * (longest - len(histogram))
        rows.append([name, *(number(share, "{:.1%}") for share in shares)])
    return rows


def medusa_rows(summary: dict[str, Any]) -> list[list[str]]:
    rows = [["way", *summary["categories"]]]
    for name, categories in summary["over_medusa"].items():
        rows.append([name, *(times(categories[one]) for one in summary["categories"])])
    return rows


def expected_rows(summary: dict[str, Any]) -> list[list[str]]:
    rows = [["way", "foreseen", "measured", "deviation"]]
    for name, found in summary["expected"].items():
        rows.append([
            name, f"{found['expected']:.1f}", f"{found['measured']:.1f}", f"{found['deviation_percent']:+.1f} %",
        ])  # fmt: skip
    return rows


def compiled_rows(summary: dict[str, Any]) -> list[list[str]]:
    rows = [["way", "sizes of steps", "seconds", "seconds in timed texts"]]
    for name, found in summary["compiled"].items():
        seconds = (f"{found[key]:.1f}" for key in ("compile_seconds", "timed_compile_seconds"))
        rows.append([name, str(found["compilations"]), *seconds])
    return rows


def equality_lines(equality: dict[str, Any]) -> list[str]:
    different = {name: count for name, count in equality["different"].items() if count}
    lines = [f"{equality['texts']} texts of each way were compared with the autoregressive way's, token for token."]
    if AUTOREGRESSIVE_COMPILED in equality["different"]:
        lines.append(f"Those of ways with compiled steps with those of {AUTOREGRESSIVE_COMPILED}.")
    if not different:
        lines.append("All are the same.")
    for name, count in different.items():
        gap = equality["largest_gap"][name]
        lines.append(
            f"{name}: {count} differ; the token that differs first is at most {number(gap, '{:.3f}')} below the best"
            " logit."
        )
    if equality["near_tie_units"] and different:
        lines.append(
            f"A near tie is a gap of at most {equality['near_tie_units']} units of rounding of the largest logit there."
        )
    for one in equality["violations"]:
        lines.append(
            f"**VIOLATION**: {one['way']}, text {one['text']}: new token {one['new_token']} is {one['got']},"
            f" {one['other']} has {one['want']} (gap {number(one['gap'], '{:.3f}')})"
        )
    return lines


def of_decode(numbers: dict[str, Any], what: str) -> float | None:
    return numbers.get("decode", {}).get(what)


def number(value: float | None, form: str) -> str:
    return NOTHING if value is None else form.format(value)


def times(found: dict[str, Any]) -> str:
    """1.62x (1.50 - 1.75)"""
    if found["total"] is None:
        return NOTHING
    low_high = found["total_interval"]
    return f"{found['total']:.2f}x" + (f" ({low_high[0]:.2f} - {low_high[1]:.2f})" if low_high else "")


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *body])


def bullets(values: dict[str, str]) -> str:
    return "\n".join(f"- {label}: {value}" for label, value in values.items())


def lines_of(summary: dict[str, Any]) -> Iterable[str]:
    """What the command prints at its end: the first table, aligned, and what was foreseen."""
    rows = overall(summary)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for name, foreseen, measured, deviation in expected_rows(summary)[1:]:
        yield f"{name}: calibration foresaw {foreseen} tokens/s behind the prompt, measured {measured} ({deviation})"
    for name, sizes, seconds, timed in compiled_rows(summary)[1:]:
        yield f"{name}: compiled {sizes} sizes of steps in {seconds} s beforehand, {timed} s in timed texts"
