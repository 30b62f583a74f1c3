"""Runs a script with the kernels of one level of the instruction set: they are chosen when the library is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from cerberus_ext.ops import libraries

FOLDER = Path(__file__).parent
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")


# Each level in a process that has torch, which takes seconds to import, and not yet the library.
FORKED = """
import json, os, runpy, sys
import torch
_, script, *levels = sys.argv
for level in levels:
    sys.stdout.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1), os.dup2(writer, 2)
        os.environ["CERBERUS_ISA"], sys.argv = level, [script]
        runpy.run_path(script, run_name="__main__")
        sys.exit()
    os.close(writer)
    with os.fdopen(reader) as pipe:
        printed = pipe.read()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), printed]))
"""


@cache
def run(script: str) -> dict[str, tuple[int, str]]:
    """Status and what was printed, by level; with the same cerberus_ext as this process's."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(FOLDER), str(libraries.PACKAGE.parent)])}
    command = [sys.executable, "-c", FORKED, str(FOLDER / script), *ISAS]
    # Python puts the folder it is started in first on its path: not one in which a package without libraries lies.
    done = subprocess.run(
        command, cwd=FOLDER, env=environment, stdout=subprocess.PIPE, text=True, timeout=600, check=True
    )
    return {isa: tuple(json.loads(line)) for isa, line in zip(ISAS, done.stdout.splitlines(), strict=True)}


def check(script: str, isa: str) -> None:
    """The script's checks hold with these kernels. Where the CPU lacks them, the import says which ones there are."""
    status, printed = run(script)[isa]
    if status == 0:
        assert printed.strip() == f"checked: {isa}"
        return
    assert "ImportError: cerberus_ext: CERBERUS_ISA must be one of" in printed, printed
    assert printed.strip().endswith(f"got {isa}"), printed
    assert isa != "portable", "the portable kernels run everywhere"
    pytest.skip(f"this CPU has no {isa}")
