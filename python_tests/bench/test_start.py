"""bench/start.py of a tiny model: every part is there, in order, and a process ends with its answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_gguf import MIXED, tiny_gguf

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.append(str(BENCH))  # last: bench/batches.py is no helper

import start as bench  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")


def test_parts_of_a_start(own_cache: Path, tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "tiny.gguf", 64, MIXED)
    arguments = ["--model", str(tmp_path / "tiny.gguf"), "--heads", "none"]
    seconds, most = bench.start(arguments)
    assert 0 < seconds < 120 and 50 < most < 5000
    command = [sys.executable, str(BENCH / "start.py"), bench.PARTS, *arguments]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    assert list(found)[0] == "import torch" and list(found)[-1] == "the other tokens"
    peaks = [part["peak"] for part in found.values()]
    assert peaks == sorted(peaks) and all(part["now"] <= part["peak"] for part in found.values())
    assert all(part["of files"] <= part["now"] for part in found.values())


def test_a_process_that_fails(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"cerberus_ext.cli generate .* ended with 2$"):
        bench.start(["--heads", "none", "--model", str(tmp_path / "none.gguf")])
