"""The same ops with every set of kernels that this CPU can run, and what happens when another one is asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from isa_runs import ISAS, check

from cerberus_ext.ops import libraries


def compiled_isas() -> list[str]:
    return libraries.build_record()["cpu_levels"].split()


@pytest.mark.parametrize("isa", ISAS)
def test_every_set_of_kernels(isa):
    check("op_core.py", isa)


def test_the_best_one_is_taken():
    """A name that does not exist is answered with those that run here, best first; without any, that one is taken."""
    error = import_says("sse9")
    listed = re.fullmatch(r"ImportError: cerberus_ext: CERBERUS_ISA must be one of (.+) on this CPU, got sse9", error)
    assert listed, error
    here = listed[1].split(", ")
    newest_first = [isa for isa in reversed(compiled_isas()) if isa in here]
    if "avx512_bf16" in here and "GenuineIntel" in Path("/proc/cpuinfo").read_text():  # whose vdpbf16ps is slow
        newest_first.remove("avx512_bf16")
        newest_first.insert(newest_first.index("avx512") + 1, "avx512_bf16")
    assert here == newest_first
    assert here[-1] == "portable"
    assert import_says(None) == here[0]


def import_says(isa: str | None) -> str:
    """Which kernels an import with this CERBERUS_ISA takes, or the last line of its error."""
    environment = {name: value for name, value in os.environ.items() if name != "CERBERUS_ISA"}
    if isa is not None:
        environment["CERBERUS_ISA"] = isa
    code = (
        f"import sys; sys.path.insert(0, {str(libraries.PACKAGE.parent)!r}); from cerberus_ext.ops import libraries;"
        " import torch; "
        "libraries.load_libraries(); print(torch.ops.cerberus_ext.cpu_isa())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    return (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]


def test_this_process_names_its_kernels():
    assert torch.ops.cerberus_ext.cpu_isa() in compiled_isas()
