"""A memory error in a kernel ends the process with a report, in the build with sanitizers.

That build's own run of the tests of the ops is a step of .ci/run: CERBERUS_SIMT_BUILD=sanitize, see simt_library.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from simt_library import build, sanitizer_environment

HELPERS = Path(__file__).parents[1] / "helpers"
# The size of `data` is a whole number of uint4 short of what the kernel believes, or what its name says.
RUN = """
import ctypes, sys
from pathlib import Path
from simt_kernels import Kernels, Launch
_, folder, kernel, size = sys.argv
data = (ctypes.c_int32 * 256)(*range(256))
print(Kernels(Path(folder)).run(Launch(kernel, threads=32, shared_bytes=128), data, int(size)), end="")
"""


@pytest.fixture(scope="module")
def folder(built):
    return build("test_kernels", "sanitize")


def run(folder, kernel, size):
    environment = sanitizer_environment() | {"PYTHONPATH": str(HELPERS)}
    command = [sys.executable, "-c", RUN, str(folder), kernel, str(size)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("kernel", "size", "report"),
    [
        ("write_past_data", 256, "heap-buffer-overflow"),
        ("write_past_shared", 0, "heap-buffer-overflow"),
        ("copy_past_data", 256, "heap-buffer-overflow"),
        ("read_unaligned", 0, "misaligned address"),
        ("index_past_array", 128, "out of bounds for type"),
    ],
)
def test_reports(kernel, size, report, folder):
    done = run(folder, kernel, size)
    assert done.returncode != 0 and report in done.stderr and "kernels.cu" in done.stderr, done.stderr


@pytest.mark.parametrize(("kernel", "size"), [("reverse", 0), ("write_past_data", 1), ("index_past_array", 0)])
def test_no_report_without_cause(kernel, size, folder):
    """The same kernels inside of their memory; and switching between stacks is no error."""
    done = run(folder, kernel, size)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("kernel", ["diverge", "leave_before_barrier"])
def test_after_an_error_there_is_no_report(kernel, folder):
    """The stacks of threads that were given up are used again."""
    script = RUN + "\nfor i in range(3): print(Kernels(Path(folder)).run(Launch('reverse', threads=32), data))"
    environment = sanitizer_environment() | {"PYTHONPATH": str(HELPERS)}
    command = [sys.executable, "-c", script, str(folder), kernel, "0"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("simt: kernel"), done.stderr
