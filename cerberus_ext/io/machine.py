"""Which machine and which versions a number was measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from ..ops import libraries

# What decides which kernels are chosen, and which of torch's own are fast.
_CPU_FEATURES = ["avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16"]


def describe_machine(device: torch.device) -> dict[str, str]:
    """Label -> value: what the speed depends on."""
    facts = {
        "processor": describe_processor(),
        "threads": str(torch.get_num_threads()),
        "kernels": torch.ops.cerberus_ext.cpu_isa(),
    }
    if device.type == "cuda":
        facts["GPU"] = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return facts


def describe_processor() -> str:
    return f"{cpu_name()}, {os.cpu_count()} cores: {' '.join(cpu_features()) or 'features unknown'}"


def describe_versions() -> dict[str, str]:
    return {
        "cerberus_ext": libraries.build_record().get("version") or package_version("cerberus_ext"),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": package_version("transformers"),
    }


def commit(file: Path = Path(__file__)) -> str | None:
    """Of the checkout that `file` belongs to, with "-dirty" where it differs from it; None: it is not under git."""
    tracked = _git(file.parent, "ls-files", "--error-unmatch", file.name)
    if tracked is None:  # an installed copy, whatever repository its folder may lie in
        return None
    return _git(file.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def cpu_name() -> str:
    """The processor, as its maker calls it."""
    named = [value for key, value in _cpuinfo() if key == "model name"]
    return named[0] if named else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """A CPU or a GPU, as its maker calls it."""
    return cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device)


def cpu_features() -> list[str]:
    """Those of the CPU's features that matter here, as Linux names them; none known elsewhere."""
    flags = next((value.split() for key, value in _cpuinfo() if key == "flags"), [])
    return [feature for feature in _CPU_FEATURES if feature in flags]


def _cpuinfo() -> list[tuple[str, str]]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return []
    entries = (line.partition(":") for line in lines)
    return [(key.strip(), value.strip()) for key, _, value in entries]


def package_version(package: str) -> str:
    """Of an installed package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
