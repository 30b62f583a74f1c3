"""The Markdown tables of a GPU session, from its JSON.

python bench/gpu/report.py results/gpu.json > results/gpu.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import targets
from targets import TARGETS

Stage = Mapping[str, Any]
_UNMEASURED = "–"


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows])


def number(value: float | None, form: str = "{:.1f}") -> str:
    return _UNMEASURED if value is None else form.format(value)


def microseconds(value: float | None) -> str:
    return number(value, "{:.1f}" if value is not None and value < 1000 else "{:.0f}")


def percent(value: float | None) -> str:
    return number(value, "{:.0%}")


def times(value: float | None) -> str:
    return number(value, "{:.2f}x")


def target_cell(stage: str, row: Mapping[str, Any]) -> str:
    return "; ".join(f"{target.asks}: **{outcome}**" for target, outcome in targets.of_row(stage, row))


def found(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return record["stages"].get(name, {}).get("result", {})


def rows_of(record: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    """A stage's rows, as far as they have been measured."""
    result = found(record, name)
    rows = result.get("ways", []) if name == "end_to_end" else result.get("rows", {}).values()
    return [row for row in rows if row.get("model") or row.get("way")]


def machine(record: Mapping[str, Any]) -> str:
    result = found(record, "machine")
    rows = [["started", record.get("started", "")], ["command", f"`{record.get('command', '')}`"]]
    for group in ("versions", "gpu", "driver", "libraries"):
        rows += [[str(label), str(value)] for label, value in result.get(group, {}).items()]
    if "processor" in result:
        rows.append(["processor", result["processor"]])
    for label, name in (("copy, read + write", "copy_bytes_per_second"), ("sum, read only", "read_bytes_per_second")):
        if name in result:
            rows.append([label, f"{result[name] / 1e9:.0f} GB/s, measured"])
    return table(["machine", ""], rows)


def summary(record: Mapping[str, Any]) -> str:
    rows = [
        [name, stage["status"], number(stage.get("seconds"), "{:.0f} s"), shortened(stage.get("reason", ""))]
        for name, stage in record["stages"].items()
    ]
    return table(["stage", "outcome", "time", "why"], rows)


def shortened(text: str, most: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + " ..."


def all_targets(record: Mapping[str, Any]) -> str:
    rows = []
    for target in TARGETS:
        having = [row for row in rows_of(record, target.stage) if target.applies(row)]
        values = [row[target.value] for row in having if row.get(target.value) is not None]
        shown = ", ".join(f"{value:.3g}" for value in values) or _UNMEASURED
        rows.append([target.what, target.asks, shown, target.overall(having)])
    return table(["target", "asks for", "found", "outcome"], rows)


def tests(record: Mapping[str, Any]) -> str:
    result = found(record, "tests")
    columns = ["selected", "passed", "failed", "skipped"]
    counts = [str(result.get(name, 0)) for name in columns]
    text = table(["tests", *columns], [[f"`pytest python_tests -k '{result.get('tests')}'`", *counts]])
    failures = [f"- {test}: {shortened(message)}" for test, message in result.get("failures", {}).items()]
    return "\n".join([text, "", *failures]) if failures else text


def sanitizer(record: Mapping[str, Any]) -> str:
    rows = [
        [
            tool,
            ran["status"],
            str(ran["errors"]) if ran.get("errors") is not None else _UNMEASURED,
            f"{ran.get('launched')}, {'all' if ran.get('all') else 'not all'}",
            number(ran["seconds"], "{:.0f} s"),
        ]
        for tool, ran in found(record, "sanitizer").get("tools", {}).items()
    ]
    return table(["compute-sanitizer", "outcome", "errors and hazards", "calls", "time"], rows)


_SIZES = ("rows", "nodes", "length", "vocab", "temperature")


def kernels(record: Mapping[str, Any]) -> str:
    rows = []
    for row in rows_of(record, "kernels"):
        size = ", ".join(f"{name} {row[name]}" for name in _SIZES if name in row)
        if "error" in row:
            rows.append([row["op"], row["model"], row["dtype"], size, shortened(row["error"]), *[""] * 9])
            continue
        rows.append(
            [
                row["op"],
                row["model"],
                row["dtype"],
                size,
                microseconds(row.get("ours_graph_us")),
                microseconds(row.get("ours_alone_us")),
                number(row.get("gigabytes_per_second"), "{:.0f}"),
                percent(row.get("share_of_copy")),
                microseconds(row.get("eager_graph_us")),
                microseconds(row.get("eager_alone_us")),
                microseconds(row.get("library_graph_us")),
                times(row.get("over_best_pytorch")),
                "memory" if row["cold"] else "cache",
                target_cell("kernels", row),
            ]
        )
    columns = ["op", "model", "dtype", "size", "us in a graph", "us alone", "GB/s", "of a copy", "PyTorch, graph"]
    columns += ["PyTorch, alone", "cuBLAS or SDPA alone, graph", "ours over the faster of both", "reads from", "target"]
    return table(columns, rows)


def steps(record: Mapping[str, Any]) -> str:
    rows = []
    for row in rows_of(record, "steps"):
        how = "eager" if not row.get("graphed") else f"{row.get('graphed_steps')} graphed"
        rows.append(
            [
                f"{row['model']}, random weights",
                str(row["context"]),
                str(row["nodes"]),
                row["error"] if "error" in row else number(row["milliseconds"], "{:.3f}"),
                number(row["floor_milliseconds"], "{:.3f}"),
                percent(row.get("share_of_floor")),
                times(row.get("over_autoregressive")),
                how,
                number(row.get("capture_seconds"), "{:.2f} s"),
                target_cell("steps", row),
            ]
        )
    columns = ["model", "context", "nodes", "ms a step", "weights' floor, ms", "floor / step", "over 1 node", "steps"]
    return table([*columns, "captures", "target"], rows)


def exactness(record: Mapping[str, Any]) -> str:
    rows = [
        [
            row["way"],
            str(row["texts"]),
            row.get("error") or str(row["texts_differ"]),
            ", ".join(f"token {one['new_token']}, gap {one['gap']:.1e}" for one in row["near_ties"]) or "none",
            target_cell("exactness", row),
        ]
        for row in rows_of(record, "exactness")
    ]
    return table(["float32", "texts", "that differ", "near ties taken otherwise", "target"], rows)


def end_to_end(record: Mapping[str, Any]) -> str:
    rows = []
    for row in rows_of(record, "end_to_end"):
        apart = [one for name, places in row.items() if name.startswith("parts_from loop") for one in places]
        where = ", ".join(f"{one['question']}: token {one['new_token']}, gap {one['gap']:.3f}" for one in apart)
        compared = any(name.startswith("parts_from loop") for name in row)
        rows.append(
            [
                row["way"],
                shortened(row["error"]) if row.get("error") else number(row.get("tokens_per_second")),
                _with_range(row, "over_generate"),
                _with_range(row, "over_loop"),
                number(row.get("tokens_per_step"), "{:.2f}"),
                shortened(where) if where else ("same" if compared else _UNMEASURED),
                target_cell("end_to_end", row),
            ]
        )
    columns = ["way", "tokens/s", "over generate", "over our loop", "tokens a step", "text parts from our loop's"]
    return table([*columns, "target"], rows)


def _with_range(row: Mapping[str, Any], column: str) -> str:
    if row.get(column) is None:
        return _UNMEASURED
    least, most = row[f"{column}_range"]
    return f"{row[column]:.2f}x ({least:.2f} - {most:.2f})"


def compiled(record: Mapping[str, Any]) -> str:
    result = found(record, "compiled")
    speeds = result.get("tokens_per_second", {})
    ratio = result.get("over_generate")
    rows = [[way, number(speed), "1" if way == "generate" else times(ratio)] for way, speed in speeds.items()]
    return table(["transformers, in one process", "tokens/s", "over generate"], rows)


# stage -> title, table
SECTIONS: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "machine": ("Machine", machine),
    "tests": ("Tests", tests),
    "sanitizer": ("Sanitizer", sanitizer),
    "kernels": ("Kernels", kernels),
    "steps": ("Steps", steps),
    "exactness": ("Exactness", exactness),
    "end_to_end": ("End to end", end_to_end),
    "compiled": ("Compiled", compiled),
}


def heading(record: Mapping[str, Any], name: str) -> str:
    """A stage's title, with what its numbers are about."""
    result = found(record, name)
    about = [str(result[key]) for key in ("model", "dtype", "note") if result.get(key)]
    about += [f"{result['new_tokens']} new tokens"] if "new_tokens" in result else []
    about += [f"Medusa heads: {result['medusa']}"] if "medusa" in result else []
    return SECTIONS[name][0] + (f" ({', '.join(about)})" if about else "")


def markdown(record: Mapping[str, Any]) -> str:
    """All tables; a stage without results says why."""
    parts = ["# A session on the GPU" if record["device"] == "cuda" else "# The GPU session's code on a CPU"]
    if record["device"] != "cuda":
        parts.append("Tiny sizes, which show that the code works. The times mean nothing.")
    parts += ["## Stages", summary(record), "## Targets", all_targets(record)]
    for name, stage in record["stages"].items():
        parts.append(f"## {heading(record, name)}")
        if stage["status"] not in ("passed", "not started"):
            parts.append(f"{stage['status']}: {shortened(stage['reason'])}")
        parts.append(SECTIONS[name][1](record) if stage.get("result") else "Not measured.")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")


if __name__ == "__main__":
    main()
