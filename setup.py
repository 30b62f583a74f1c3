"""Builds the libraries with CMake and states the requirements; the rest of the package is in pyproject.toml.

Environment variables: CERBERUS_CUDA (auto, on, off), TORCH_CUDA_ARCH_LIST (written as for torch),
CMAKE_BUILD_PARALLEL_LEVEL (default: every core), CERBERUS_WERROR (1: warnings are errors).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # setuptools runs this file without its folder on the path

from build_backend import find_torch, torch_requirement  # noqa: E402

REQUIREMENTS = [
    torch_requirement(),  # depends on what is installed: why `dependencies` is dynamic in pyproject.toml
    "numpy",
    # The first whose tokenizer of a GGUF file, saved and loaded again, gives texts back as they were; its cache says,
    # too, which layers keep no keys and values, before a model has run.
    "transformers>=5.6,<6",
    "accelerate",  # transformers wants it, and gguf, to read the default model's GGUF file
    "gguf",
    "safetensors",
    "huggingface_hub>=1",
    "jinja2",  # torch's own, too
    "matplotlib",
    "tqdm",
    "typer",
]


class FreshBuild(build):
    """Starts from an empty output folder: setuptools packs what an earlier build left, a _cuda.so say."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """One CMake project makes every library; setuptools knows it by its one Python extension, _host."""

    def run(self) -> None:
        torch = find_torch()
        if torch is None or not torch.fits:
            found = f"{torch.version} in {torch.folder}" if torch else "none"
            raise SystemExit(
                f"cerberus_ext: building needs torch >= 2.10, found {found}. Install one first, or leave "
                "build isolation on (no --no-build-isolation), which fetches one."
            )
        work = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        # Objects are kept, and rebuilt as needed. The cache is not: it names folders of an isolated build.
        (work / "CMakeCache.txt").unlink(missing_ok=True)
        self._run("cmake", "-G", "Ninja", "-S", ROOT, "-B", work, *self._options())
        self._run("cmake", "--build", work, "--parallel", self._jobs())
        # Gone first: a _cuda.so of an earlier build must not stay beside a CPU-only one; and a process that has
        # the old ones loaded keeps them, while overwriting would crash it.
        for output in self._possible_outputs():
            output.unlink(missing_ok=True)
        self._run("cmake", "--install", work, "--prefix", self._target())

    def get_outputs(self) -> list[str]:
        return [str(output) for output in self._possible_outputs() if output.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an editable build writes into the source folder: nothing is left to copy there

    def _possible_outputs(self) -> list[Path]:
        host = Path(self.get_ext_fullpath("cerberus_ext._host"))
        return [host, *(self._target() / name for name in ("_C.so", "_cuda.so", "build.json"))]

    def _target(self) -> Path:
        return Path(self.get_ext_fullpath("cerberus_ext._host")).resolve().parent

    def _options(self) -> list[str]:
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "CERBERUS_VERSION": self.distribution.get_version(),
            "CERBERUS_CUDA": os.environ.get("CERBERUS_CUDA", "auto"),
            "CERBERUS_CUDA_ARCHITECTURES": os.environ.get("TORCH_CUDA_ARCH_LIST", ""),
            "CERBERUS_WERROR": os.environ.get("CERBERUS_WERROR", "0"),
        }
        return [f"-D{name}={value}" for name, value in options.items()]

    @staticmethod
    def _jobs() -> str:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(cores or 1))

    @staticmethod
    def _run(*command: str | Path) -> None:
        print("+", *command, flush=True)
        try:
            subprocess.run([str(part) for part in command], check=True)
        except FileNotFoundError as error:
            message = f"cerberus_ext: building needs {error.filename}: pip install cmake ninja"
            raise SystemExit(message) from error
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"cerberus_ext: {command[0]} failed; its output is above") from error


setup(
    install_requires=REQUIREMENTS,
    ext_modules=[Extension("cerberus_ext._host", sources=[])],
    cmdclass={"build": FreshBuild, "build_ext": CMakeBuild},
)
