"""PEP 517 backend: setuptools' own, plus one decision about torch. Also finds torch for setup.py and CMake.

pip builds in an isolated environment, without what the caller has installed. Listing torch among the build
requirements would fetch gigabytes to build against another torch than the one that is there. So torch is
asked for only where the caller has none that fits, and otherwise its headers are used where they lie. It is
found by its files and never imported: in an isolated build it would lack its dependencies.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import setuptools
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - every hook that is not replaced below

MINIMUM_TORCH = (2, 10)  # the first with all of the stable C++ API that csrc/ uses; see CMakeLists.txt

# Where there is no torch, ask for one that was tried. Where there is one, it stays, however new: one build
# serves every torch from the minimum on, and an upper bound would make pip replace it.
TORCH_WHERE_NONE_IS = "torch>=2.10,<2.14"
TORCH_WHERE_ONE_IS = "torch>=2.10"

# Older ones misread pyproject.toml, with an error that does not say so.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"cerberus_ext: building needs setuptools >= 77, found {setuptools.__version__}. "
        'pip install "setuptools>=77" pybind11 cmake ninja, or leave build isolation on, which fetches them.'
    )


class Torch(NamedTuple):
    """An installed torch: its version and the folder of the package."""

    version: str
    folder: Path

    @property
    def fits(self) -> bool:
        numbers = re.match(r"(\d+)\.(\d+)", self.version)
        return numbers is not None and (int(numbers[1]), int(numbers[2])) >= MINIMUM_TORCH


def find_torch() -> Torch | None:
    """The torch to build against: the caller's if it fits, else the one fetched for this build, if any."""
    found = [torch for torch in (_torch_at(_at_the_caller()), _torch_at(_here())) if torch]
    return next((torch for torch in found if torch.fits), found[0] if found else None)


def torch_requirement() -> str:
    """What the installed package asks for."""
    return TORCH_WHERE_ONE_IS if _caller_has_torch() else TORCH_WHERE_NONE_IS


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_to_build_with()


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_to_build_with()


def _torch_to_build_with() -> list[str]:
    return [] if _caller_has_torch() else [TORCH_WHERE_NONE_IS]


def _caller_has_torch() -> bool:
    torch = _torch_at(_at_the_caller())
    return torch is not None and torch.fits


def _here() -> str:
    spec = importlib.util.find_spec("torch")
    return spec.origin if spec and spec.origin else ""


def _at_the_caller() -> str:
    """What `import torch` would find where pip was called.

    pip isolates a build through PYTHONPATH and PYTHONNOUSERSITE alone: the interpreter is still the caller's,
    so without those two it sees what the caller sees: user site, system site packages, .pth files.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    ask = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
    with tempfile.TemporaryDirectory() as empty:  # `-c` puts the current folder on sys.path
        command = [sys.executable, "-c", ask]
        return subprocess.run(command, env=environment, cwd=empty, stdout=subprocess.PIPE, text=True).stdout.strip()


def _torch_at(origin: str) -> Torch | None:
    """The torch whose __init__.py is `origin`."""
    record = Path(origin).parent / "version.py"
    if not origin or not record.is_file():
        return None
    version = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", record.read_text(), re.MULTILINE)
    return Torch(version[1], record.parent) if version else None


if __name__ == "__main__":  # CMake asks: "<folder>;<version>", or nothing where none fits
    chosen = find_torch()
    print(f"{chosen.folder.as_posix()};{chosen.version}" if chosen and chosen.fits else "", end="")
