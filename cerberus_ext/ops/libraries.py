"""Loads the shared libraries once. A failure says what was found and what was expected.

_C.so (schemas, CPU kernels) and _host have to load: without them nothing works. _cuda.so is loaded only where
torch has CUDA and there is a GPU, and its failure is a warning: on the CPU everything still works.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import platform
import re
import sys
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent.parent
MINIMUM_TORCH = (2, 10)  # what csrc/ is compiled for: TORCH_TARGET_VERSION in CMakeLists.txt
_NEEDED_TORCH = "torch >= " + ".".join(map(str, MINIMUM_TORCH))
_REINSTALL = "pip install --force-reinstall --no-deps"


@dataclass(frozen=True)
class Library:
    """One shared library: where it is, whether it is loaded, and if not, why."""

    name: str
    path: Path
    loaded: bool
    reason: str = ""


@cache
def load_libraries() -> tuple[Library, ...]:
    """Loads _C.so, _host and, where it can be used, _cuda.so; returns them. Later calls do nothing.

    Raises ImportError if torch is too old, or if _C.so or _host is missing or does not load.
    """
    _check_torch()
    return _load_cpu(PACKAGE), _load_host(PACKAGE), _load_cuda(PACKAGE)


def build_record(folder: Path = PACKAGE) -> dict[str, str]:
    """What CMake wrote about the build beside the libraries; empty where nothing is built."""
    try:
        record = json.loads((folder / "build.json").read_text())
    except (OSError, ValueError):
        return {}
    return {key: " ".join(value) if isinstance(value, list) else str(value) for key, value in record.items()}


def _check_torch() -> None:
    numbers = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if numbers and (int(numbers[1]), int(numbers[2])) < MINIMUM_TORCH:
        found = f"{torch.__version__} in {Path(torch.__file__).parent}"
        raise ImportError(f"cerberus_ext: needs {_NEEDED_TORCH}, found {found}")


def _load_cpu(folder: Path) -> Library:
    path = folder / "_C.so"
    if not path.is_file():
        raise ImportError(_not_built(path))
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(_does_not_load(path, error)) from error
    try:
        torch.ops.cerberus_ext.cpu_isa()  # chooses the kernels; CERBERUS_ISA may ask for some that cannot run
    except RuntimeError as error:
        raise ImportError(str(error)) from error
    return Library(path.name, path, loaded=True)


def _load_host(folder: Path) -> Library:
    """_host is the one library that is built for a single version of Python."""
    path = folder / f"_host{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    if not path.is_file():
        others = ", ".join(sorted(other.name for other in folder.glob("_host*.so"))) or "none"
        raise ImportError(
            f"cerberus_ext: expected {path} for this Python {platform.python_version()}, found {others}. "
            f"Install cerberus_ext with the Python that is to use it: {_REINSTALL} <its source>"
        )
    try:
        importlib.import_module("cerberus_ext._host")
    except ImportError as error:
        raise ImportError(_does_not_load(path, error)) from error
    return Library("_host", path, loaded=True)


def _load_cuda(folder: Path) -> Library:
    path = folder / "_cuda.so"
    if reason := _no_use_for_cuda():
        return Library(path.name, path, loaded=False, reason=reason)
    # There is a GPU, which the caller may count on: whatever is in the way now is worth a warning.
    if not path.is_file():
        state = build_record(folder).get("cuda", "no record of why")
        reason = (
            f"{path} was not built ({state}). To have it: CERBERUS_CUDA=on {_REINSTALL} <source of "
            "cerberus_ext>, with nvcc on PATH"
        )
    else:
        try:
            torch.ops.load_library(path)
            return Library(path.name, path, loaded=True)
        except OSError as error:
            reason = _does_not_load(path, error)
    message = f"cerberus_ext: this machine has a GPU, but there are no CUDA ops: {reason}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)
    return Library(path.name, path, loaded=False, reason=reason)


def _no_use_for_cuda() -> str:
    """Why CUDA ops could not run here even if they were built; empty if they could.

    It counts devices instead of asking torch.cuda.is_available(): that starts the CUDA runtime, after which a
    forked child cannot use CUDA any more, and an import must not do that.
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if torch.cuda.device_count() == 0:
        return f"torch {torch.__version__} sees no GPU"
    return ""


def _not_built(path: Path) -> str:
    """`path` is missing: the source folder was imported, or the installation is broken."""
    folder = path.parent
    if not (folder.parent / "CMakeLists.txt").is_file():
        return (
            f"cerberus_ext: expected the library {path}, found none: the installation is incomplete. "
            f"{_REINSTALL} <source of cerberus_ext>"
        )
    message = f"cerberus_ext: expected the library {path}, found a source folder in which nothing is built. "
    if installed := _installed_elsewhere(folder):
        message += (
            f"The installed package is {installed}, but this folder comes first on sys.path: start Python from "
            "another folder, or run `cerberus` or `pytest` rather than `python -m`. "
        )
    return message + "To build in this folder: pip install -e . --no-build-isolation"


def _installed_elsewhere(source: Path) -> Path | None:
    for folder in map(Path, sys.path):
        candidate = (folder / "cerberus_ext").resolve()
        if candidate != source and (candidate / "_C.so").is_file():
            return candidate
    return None


def _does_not_load(path: Path, error: Exception) -> str:
    """What the loader said; beside it what is here and what the library was built for."""
    record = build_record(path.parent)
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    system = f"{platform.system()} {platform.machine()} {' '.join(platform.libc_ver())}".strip()
    built = ", ".join(
        f"{label} {record.get(key) or 'unknown'}"
        for label, key in (("on", "system"), ("by", "compiler"), ("with torch", "torch"), ("nvcc", "nvcc"))
    )
    return "\n".join(
        (
            f"cerberus_ext: {path} does not load: {error}",
            f"  found: torch {torch.__version__} ({cuda}) in {Path(torch.__file__).parent}, "
            f"Python {platform.python_version()}, {system}",
            f"  expected: {_NEEDED_TORCH}, and what the library was built for: {built}",
            f"  A build on this machine fits this machine: {_REINSTALL} <source of cerberus_ext>",
        )
    )
