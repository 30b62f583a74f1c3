"""The small kernels of simt/kernels.cu, which test the emulator itself. No torch: a process that has little else loaded
starts quickly under a sanitizer."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple


class Launch(NamedTuple):
    kernel: str
    blocks: int = 1
    threads: int = 128
    shared_bytes: int = 0
    ask_for_shared: int = 0  # cudaFuncSetAttribute before the launch; 0: not called
    cooperative: bool = False
    overlaps: bool = False  # the launch before it


class _Launch(ctypes.Structure):
    _fields_ = [("kernel", ctypes.c_char_p)] + [(name, ctypes.c_int64) for name in Launch._fields[1:]]


class Kernels:
    def __init__(self, folder: Path) -> None:
        self.library = ctypes.CDLL(str(folder / "test_kernels.so"))
        self.library.test_run.restype = ctypes.c_char_p
        self.set()

    def set(self, seed: int = 0, multiprocessors: int = 3, blocks_each: int = 2) -> None:
        self.library.test_set(*(ctypes.c_int64(value) for value in (seed, multiprocessors, blocks_each)))

    def run(self, launches: Launch | list[Launch], data: ctypes.Array, size: int = 0) -> str:
        """The text of the error; empty: none."""
        launches = [launches] if isinstance(launches, Launch) else launches
        array = (_Launch * len(launches))(*((launch.kernel.encode(), *map(int, launch[1:])) for launch in launches))
        return self.library.test_run(array, ctypes.c_int64(len(launches)), data, ctypes.c_int64(size)).decode()
