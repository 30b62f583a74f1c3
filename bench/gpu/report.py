"""The Markdown tables of a GPU session, from its JSON.

python bench/gpu/report.py results/gpu.json > results/gpu.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import targets
from targets import TARGETS

Record = Mapping[str, Any]
Row = Mapping[str, Any]
Cell = Callable[[Row], str]
NOTHING = "–"


def markdown_table(rows: Sequence[Sequence[str]]) -> str:  # not the package's, which would be imported for seconds
    head, *body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def number(value: float | None, form: str) -> str:
    return NOTHING if value is None else form.format(value)


def table(columns: Mapping[str, Cell], rows: Iterable[Row]) -> str:
    """A row that has an error instead of numbers tells it in its last columns."""
    return markdown_table([list(columns), *([cell(row) for cell in columns.values()] for row in rows)])


def text(name: str) -> Cell:
    return lambda row: str(row.get(name, ""))


def of(name: str, form: str = "{:.1f}") -> Cell:
    return lambda row: number(row.get(name), form)


def microseconds(name: str) -> Cell:
    return lambda row: number(row.get(name), "{:.1f}" if (row.get(name) or 0) < 1000 else "{:.0f}")


def shortened(text: str, most: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + " ..."


def target(stage: str) -> Cell:
    return lambda row: "; ".join(f"{target.asks}: **{outcome}**" for target, outcome in targets.of_row(stage, row))


def ranged(name: str) -> Cell:
    def cell(row: Row) -> str:
        if row.get(name) is None:
            return NOTHING
        return "{:.2f}x ({:.2f} - {:.2f})".format(row[name], *row[f"{name}_range"])

    return cell


def result_of(record: Record, name: str) -> Mapping[str, Any]:
    return record["stages"].get(name, {}).get("result", {})


def rows_of(record: Record, name: str) -> list[Row]:
    """A stage's rows, as far as they have been measured."""
    result = result_of(record, name)
    rows = result.get("ways", []) if name == "end_to_end" else result.get("rows", {}).values()
    return [row for row in rows if row.get("model") or row.get("way")]


def machine(record: Record) -> str:
    result = result_of(record, "machine")
    rows = [["started", record.get("started", "")], ["command", f"`{record.get('command', '')}`"]]
    for group in ("versions", "gpu", "driver", "libraries"):
        rows += [[str(label), str(value)] for label, value in result.get(group, {}).items()]
    if "processor" in result:
        rows.append(["processor", result["processor"]])
    for label, name in (("copy, read + write", "copy_bytes_per_second"), ("sum, read only", "read_bytes_per_second")):
        if name in result:
            rows.append([label, f"{result[name] / 1e9:.0f} GB/s, measured"])
    return markdown_table([["machine", ""], *rows])


def summary(record: Record) -> str:
    columns = {"stage": text("name"), "outcome": text("status"), "time": of("seconds", "{:.0f} s"),
               "why": lambda row: shortened(row.get("reason", ""))}  # fmt: skip
    return table(columns, [{"name": name, **stage} for name, stage in record["stages"].items()])


def all_targets(record: Record) -> str:
    rows = []
    for target in TARGETS:
        having = [row for row in rows_of(record, target.stage) if target.applies(row)]
        values = [row[target.value] for row in having if row.get(target.value) is not None]
        shown = ", ".join(f"{value:.3g}" for value in values) or NOTHING
        rows.append([target.what, target.asks, shown, target.overall(having)])
    return markdown_table([["target", "asks for", "found", "outcome"], *rows])


def tests(record: Record) -> str:
    result = result_of(record, "tests")
    counts = {name: of(name, "{}") for name in ("selected", "passed", "failed", "skipped")}
    columns = {"tests": lambda row: f"`pytest python_tests -k '{row.get('tests')}'`", **counts}
    shown = table(columns, [dict.fromkeys(counts, 0) | dict(result)])
    failures = [f"- {test}: {shortened(message)}" for test, message in result.get("failures", {}).items()]
    return "\n".join([shown, "", *failures]) if failures else shown


def sanitizer(record: Record) -> str:
    columns = {
        "compute-sanitizer": text("tool"), "outcome": text("status"), "errors and hazards": of("errors", "{}"),
        "calls": lambda row: f"{row.get('launched')}, {'all' if row.get('all') else 'not all'}",
        "time": of("seconds", "{:.0f} s"),
    }  # fmt: skip
    tools = result_of(record, "sanitizer").get("tools", {})
    return table(columns, [{"tool": tool, **ran} for tool, ran in tools.items()])


def kernels(record: Record) -> str:
    sizes = ("rows", "nodes", "length", "vocab", "temperature")
    columns: dict[str, Cell] = {
        "op": text("op"),
        "model": text("model"),
        "dtype": text("dtype"),
        "size": lambda row: ", ".join(f"{name} {row[name]}" for name in sizes if name in row),
        "us in a graph": lambda row: shortened(row["error"]) if "error" in row else microseconds("ours_graph_us")(row),
        "us alone": microseconds("ours_alone_us"),
        "GB/s": of("gigabytes_per_second", "{:.0f}"),
        "of a copy": of("share_of_copy", "{:.0%}"),
        "PyTorch, graph": microseconds("eager_graph_us"),
        "PyTorch, alone": microseconds("eager_alone_us"),
        "cuBLAS or SDPA alone, graph": microseconds("library_graph_us"),
        "ours over the faster of both": of("over_best_pytorch", "{:.2f}x"),
        "reads from": lambda row: "memory" if row.get("cold") else "cache",
        "target": target("kernels"),
    }
    return table(columns, rows_of(record, "kernels"))


def steps(record: Record) -> str:
    columns: dict[str, Cell] = {
        "model": lambda row: f"{row['model']}, random weights",
        "context": text("context"),
        "nodes": text("nodes"),
        "ms a step": lambda row: row["error"] if "error" in row else of("milliseconds", "{:.3f}")(row),
        "expected ms": of("expected_milliseconds", "{:.3f}"),
        "weights' floor, ms": of("floor_milliseconds", "{:.3f}"),
        "floor / step": of("share_of_floor", "{:.0%}"),
        "over 1 node": of("over_autoregressive", "{:.2f}x"),
        "steps": lambda row: f"{row.get('graphed_steps')} graphed" if row.get("graphed") else "eager",
        "captures": of("capture_seconds", "{:.2f} s"),
        "target": target("steps"),
    }
    return table(columns, rows_of(record, "steps"))


def near_ties(row: Row) -> str:
    return ", ".join(f"token {one['new_token']}, gap {one['gap']:.1e}" for one in row["near_ties"]) or "none"


def exactness(record: Record) -> str:
    columns: dict[str, Cell] = {
        "float32, or as it says": text("way"), "texts": text("texts"),
        "that differ": lambda row: row.get("error") or str(row["texts_differ"]),
        "near ties taken otherwise": near_ties, "target": target("exactness"),
    }  # fmt: skip
    return table(columns, rows_of(record, "exactness"))


def where_parted(row: Row) -> str:
    """From our loop's text; end to end."""
    places = [places for name, places in row.items() if name.startswith("parts_from loop")]
    apart = [f"{one['question']}: token {one['new_token']}, gap {one['gap']:.3f}" for some in places for one in some]
    return shortened(", ".join(apart)) or ("same" if places else NOTHING)


def end_to_end(record: Record) -> str:
    columns: dict[str, Cell] = {
        "way": text("way"),
        "tokens/s": lambda row: shortened(row["error"]) if row.get("error") else of("tokens_per_second")(row),
        "over generate": ranged("over_generate"),
        "over our loop": ranged("over_loop"),
        "tokens a step": of("tokens_per_step", "{:.2f}"),
        "text parts from our loop's": where_parted,
        "target": target("end_to_end"),
    }
    return table(columns, rows_of(record, "end_to_end"))


def compiled(record: Record) -> str:
    result = result_of(record, "compiled")
    ratio = number(result.get("over_generate"), "{:.2f}x")
    speeds = result.get("tokens_per_second", {})
    rows = [[way, number(speed, "{:.1f}"), "1" if way == "generate" else ratio] for way, speed in speeds.items()]
    return markdown_table([["transformers, in one process", "tokens/s", "over generate"], *rows])


# stage -> title, table
SECTIONS: dict[str, tuple[str, Callable[[Record], str]]] = {
    make.__name__: (make.__name__.capitalize().replace("_", " "), make)
    for make in (machine, tests, sanitizer, kernels, steps, exactness, end_to_end, compiled)
}


def heading(record: Record, name: str) -> str:
    """A stage's title, with what its numbers are about."""
    result = result_of(record, name)
    about = [str(result[key]) for key in ("model", "dtype", "note") if result.get(key)]
    about += [f"{result['new_tokens']} new tokens"] if "new_tokens" in result else []
    about += [f"Medusa heads: {result['medusa']}"] if "medusa" in result else []
    return SECTIONS[name][0] + (f" ({', '.join(about)})" if about else "")


def markdown(record: Record) -> str:
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


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(markdown(json.loads(Path(sys.argv[1]).read_text())), end="")
