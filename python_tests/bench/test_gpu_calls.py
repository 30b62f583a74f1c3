"""The two calls on a lent GPU, bench/gpu/smoke.py and measure.py, and what is carried there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench" / "gpu"
sys.path.insert(0, str(BENCH))  # its files import each other as scripts do

import carry  # noqa: E402
import measure  # noqa: E402
import session  # noqa: E402


def test_smoke_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, BENCH / "smoke.py", "--device", "cpu", "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "out" / "smoke.json").read_text())
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["smoke.json"]
    assert not found["problems"] and found["unfinished"] is None
    rows = found["result"]["rows"]
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == list(rows)
    assert {
        "libraries",
        "copy",
        "op tree_attention",
        "graph of all ops",
        "decode",
        "step tiny 32",
        "step tiny 1 in four bits",
    } <= set(rows)


def test_smoke_says_what_differs(tmp_path: Path) -> None:
    """On the first op that does, and goes on."""
    script = tmp_path / "wrong.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import itertools, smoke\n"
        "from cerberus_ext import ops; right = ops.hidden_entropy\n"
        "calls = itertools.count(); ops.hidden_entropy = lambda hidden: right(hidden) + next(calls)\n"
        "sys.exit(smoke.main())"
    )
    command = [sys.executable, script, BENCH, "--device", "cpu", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stderr
    problems = json.loads((tmp_path / "smoke.json").read_text())["problems"]
    assert problems[0].startswith("op hidden_entropy: AssertionError")
    assert problems[1].startswith("graph of all ops: ")


def test_smoke_asks_where_results_go() -> None:
    done = subprocess.run([sys.executable, BENCH / "smoke.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--out DIR is required" in done.stderr


def test_what_is_measured_is_there() -> None:
    assert set(measure.STAGES) <= {plan.name for plan in session.PLANS}


def test_carried_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "cerberus_ext"
    package.mkdir()
    for name in ("_C.so", "_host.cpython-311.so", "build.json"):
        (package / name).write_bytes(bytes(1 << 20))
    assert carry.main(package) == 1
    printed = capsys.readouterr()
    assert printed.out.split() == ["cerberus_ext/_C.so", "cerberus_ext/_host.cpython-311.so", "cerberus_ext/build.json"]
    assert printed.err.splitlines() == ["3.0 MiB of 64", "missing: cerberus_ext/_cuda.so"]
    (package / "_cuda.so").write_bytes(bytes(1 << 20))
    assert carry.main(package) == 0
    (package / "_cuda.so").write_bytes(bytes(61 << 20))
    assert carry.main(package) == 0
    (package / "_cuda.so").write_bytes(bytes((61 << 20) + 1))
    assert carry.main(package) == 1
