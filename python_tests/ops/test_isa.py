"""The same ops with every set of kernels that this CPU can run, and what happens when another one is asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cerberus_ext import _load

CORE = Path(__file__).parent.parent / "op_core.py"


def run(isa: str | None) -> subprocess.CompletedProcess[str]:
    """Checks the core cases in a process of its own, which imports the same cerberus_ext as this one."""
    environment = {name: value for name, value in os.environ.items() if name != "CERBERUS_CPU_ISA"}
    if isa is not None:
        environment["CERBERUS_CPU_ISA"] = isa
    environment["PYTHONPATH"] = os.pathsep.join([str(CORE.parent), str(_load.PACKAGE.parent)])
    return subprocess.run([sys.executable, str(CORE)], env=environment, capture_output=True, text=True, timeout=300)


def compiled_isas() -> list[str]:
    return _load.build_record()["cpu_levels"].split()


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_every_set_of_kernels(isa):
    """Either the CPU has it, and every op is right with it, or the import says which ones there are."""
    done = run(isa)
    if done.returncode == 0:
        assert done.stdout.strip() == f"checked: {isa}"
    else:
        assert "ImportError: cerberus_ext: CERBERUS_CPU_ISA must be one of" in done.stderr, done.stderr
        assert done.stderr.strip().endswith(f"got {isa}"), done.stderr
        assert isa != "portable", "the portable kernels run everywhere"


def test_the_best_one_is_taken():
    """A name that does not exist is answered with those that run here, best first; without any, that one is taken."""
    error = import_says("sse9")
    listed = re.fullmatch(
        r"ImportError: cerberus_ext: CERBERUS_CPU_ISA must be one of (.+) on this CPU, got sse9", error
    )
    assert listed, error
    here = listed[1].split(", ")
    assert here == [isa for isa in reversed(compiled_isas()) if isa in here]
    assert here[-1] == "portable"
    assert import_says(None) == here[0]


def import_says(isa: str | None) -> str:
    """Which kernels an import with this CERBERUS_CPU_ISA takes, or the last line of its error."""
    environment = {name: value for name, value in os.environ.items() if name != "CERBERUS_CPU_ISA"}
    if isa is not None:
        environment["CERBERUS_CPU_ISA"] = isa
    code = (
        f"import sys; sys.path.insert(0, {str(_load.PACKAGE.parent)!r}); from cerberus_ext import _load; import torch; "
        "_load.load_libraries(); print(torch.ops.cerberus_ext.cpu_isa())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    return (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]


def test_this_process_names_its_kernels():
    assert torch.ops.cerberus_ext.cpu_isa() in compiled_isas()
