"""The machine above the benchmarks, and below them a table of each kind: ops and suffix index."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "shared"))

import machine  # noqa: E402


def pytest_report_header() -> list[str]:
    return machine.text().splitlines()


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """For --benchmark-json."""
    machine_info["cerberus_ext"] = machine.describe()


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's own table
def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    benchmarks = config._benchmarksession.benchmarks  # what pytest-benchmark prints its own table from
    rows = [bench.extra_info for bench in benchmarks]
    for table, key in ((ops_table, "speedup"), (suffix_table, "bytes_per_token")):
        if chosen := [row for row in rows if key in row]:
            table(terminalreporter, chosen)
    if rows:
        terminalreporter.write_line(f"reproduce: pytest bench --benchmark-only; {machine.describe()['processor']}")


def ops_table(terminalreporter: Any, rows: list[dict[str, Any]]) -> None:
    terminalreporter.section(
        "ours and plain PyTorch: medians; bytes that have to be moved, as a share of a copy's speed"
    )
    form = "{:<25} {:<5} {:<5} {:<9} {:>11} {:>11} {:>9} {:>9} {:>9}"
    columns = ("op", "model", "on", "dtype", "ours", "PyTorch", "speed-up", "GB/s", "of a copy")
    terminalreporter.write_line(form.format(*columns))
    for row in rows:
        terminalreporter.write_line(
            form.format(
                row["op"],
                row["model"],
                row["device"],
                row["dtype"],
                f"{row['milliseconds']:.3f} ms",
                f"{row['eager_milliseconds']:.3f} ms",
                f"{row['speedup']:.2f}x",
                f"{row['gigabytes_per_second']:.1f}",
                f"{row['share_of_copy_bandwidth']:.0%}",
            )
        )


def suffix_table(terminalreporter: Any, rows: list[dict[str, Any]]) -> None:
    terminalreporter.section("suffix index: medians; append: of one token; step: of appending one and drafting")
    form = "{:<22} {:<7} {:>11} {:>16}"
    terminalreporter.write_line(form.format("text", "call", "time", "bytes per token"))
    for row in rows:
        time = f"{row['nanoseconds']:.0f} ns"
        terminalreporter.write_line(form.format(row["text"], row["call"], time, f"{row['bytes_per_token']:.1f}"))
