"""The emulated CUDA kernels for tests: builds simt/emulator, and calls its ops with guarded tensors.

CERBERUS_SIMT_BUILD=sanitize or coverage takes another build than the plain one. The former needs more in the
environment: env $(python python_tests/helpers/simt_library.py) pytest python_tests/simt
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from op_cases import assert_same_bits
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = ROOT / "python_tests" / "simt" / "emulator"
OPTIONS = {
    "plain": [],
    "sanitize": ["-DCERBERUS_SIMT_SANITIZE=ON"],
    "coverage": ["-DCERBERUS_SIMT_COVERAGE=ON"],
}
KIND = os.environ.get("CERBERUS_SIMT_BUILD", "plain")


def tool(name: str) -> str | None:
    """cmake and ninja may be installed next to Python without being on the path."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name)


def missing_tools() -> str:
    """What cannot be found of what a build needs; empty: nothing."""
    missing = [name for name in ("cmake", "ninja") if tool(name) is None]
    if not any(shutil.which(compiler) for compiler in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        missing.append("a C++ compiler")
    return ", ".join(missing)


def build(target: str, kind: str = KIND) -> Path:
    """Builds what is out of date of `target` -> the build folder."""
    folder = ROOT / "build" / f"simt-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test run may be building
        configure = [tool("cmake"), "-G", "Ninja", "-S", EMULATOR, "-B", folder, *OPTIONS[kind]]
        run([*configure, f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"])
        run([tool("ninja"), "-C", folder, target])
    return folder


def sanitizer_environment() -> dict[str, str]:
    """What a process needs to load the sanitizers' build."""
    # The C++ library, too: exceptions are thrown through the sanitizer's, which looks for its own at the start.
    names = ("libasan.so", "libstdc++.so.6")
    libraries = [run([os.environ.get("CXX", "c++"), f"-print-file-name={name}"]).strip() for name in names]
    assert all(Path(library).is_file() for library in libraries), f"the sanitizers' build is for GCC: no {libraries}"
    # Python's own small objects come from malloc, too, so that they are guarded.
    return {"LD_PRELOAD": ":".join(libraries), "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}


def run(command: list[Any], **options: Any) -> str:
    """What it printed. Tools are not to run under the sanitizer that LD_PRELOAD brings for the tests."""
    options.setdefault("env", {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"})
    done = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert done.returncode == 0, f"{' '.join(str(part) for part in command)}\n{done.stdout}"
    return done.stdout


# ---------------------------------------------------------------- calls

MARGIN = 64  # elements before and behind a tensor; a multiple of 16 bytes in every type


class Guarded:
    """A contiguous copy of a tensor between margins of NaN (integers: of what no index or token is).

    offset: how many elements the copy lies behind a multiple of 16 bytes.
    """

    def __init__(self, tensor: Tensor, offset: int = 0) -> None:
        poison = float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min // 3
        self.memory = torch.full((MARGIN + offset + tensor.numel() + MARGIN,), poison, dtype=tensor.dtype)
        start = MARGIN + offset
        self.inside = self.memory[start : start + tensor.numel()].view(tensor.shape)
        self.inside.copy_(tensor)
        self.before = self.memory.clone()

    def check(self, may_change: bool) -> None:
        """Nothing was written to the margins, nor to the tensor unless it may be."""
        after = self.memory.clone()
        if may_change:
            size = self.inside.numel()
            start = len(after) - MARGIN - size
            after[start : start + size] = self.before[start : start + size]
        assert_same_bits(after, self.before)


class Emulation:
    """simt("head_stack", hidden, anchor, weight, bias): the op's CUDA kernels under emulation."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(str(library))
        self.ops = torch.ops.cerberus_simt

    def seed(self, seed: int) -> None:
        """Of the schedule of what follows."""
        self.ops.seed(seed)

    def device(self, multiprocessors: int = 3, blocks_each: int = 2, ptx_version: int = 90) -> None:
        """How much of a device there is; blocks_each: resident on a multiprocessor at once, at most. ptx_version: what
        the kernels were compiled for, which is all that they can do."""
        self.ops.device(multiprocessors, blocks_each, ptx_version)

    def __call__(self, name: str, *arguments: Any, offset: int = 0) -> Any:
        op = getattr(self.ops, name).default
        guarded = [
            Guarded(value, offset if value.is_floating_point() else 0) if isinstance(value, Tensor) else value
            for value in arguments
        ]
        result = op(*(value.inside if isinstance(value, Guarded) else value for value in guarded))
        declarations = op._schema.arguments[: len(arguments)]  # the last ones may be left out
        for value, argument, declared in zip(guarded, arguments, declarations, strict=True):
            if isinstance(value, Guarded):
                written = declared.alias_info is not None and declared.alias_info.is_write
                value.check(may_change=written)
                if written:
                    argument.copy_(value.inside)
        return result


if __name__ == "__main__":
    environment = {"CERBERUS_SIMT_BUILD": "sanitize"} | sanitizer_environment()
    print(" ".join(f"{name}={value}" for name, value in environment.items()))
