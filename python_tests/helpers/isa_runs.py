"""Runs a script with the kernels of one level of the instruction set: they are chosen when the library is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cerberus_ext.ops import libraries

FOLDER = Path(__file__).parent
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")


def run(script: str, isa: str | None) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which imports the same cerberus_ext as this one."""
    environment = {name: value for name, value in os.environ.items() if name != "CERBERUS_ISA"}
    if isa is not None:
        environment["CERBERUS_ISA"] = isa
    environment["PYTHONPATH"] = os.pathsep.join([str(FOLDER), str(libraries.PACKAGE.parent)])
    command = [sys.executable, str(FOLDER / script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def check(script: str, isa: str) -> None:
    """The script's checks hold with these kernels. Where the CPU lacks them, the import says which ones there are."""
    done = run(script, isa)
    if done.returncode == 0:
        assert done.stdout.strip() == f"checked: {isa}"
        return
    assert "ImportError: cerberus_ext: CERBERUS_ISA must be one of" in done.stderr, done.stderr
    assert done.stderr.strip().endswith(f"got {isa}"), done.stderr
    assert isa != "portable", "the portable kernels run everywhere"
    pytest.skip(f"this CPU has no {isa}")
