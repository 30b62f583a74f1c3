"""Which machine and which versions a number was measured with."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

from .. import _load
from ..info import cpu_features, cpu_name, package_version


def describe_machine(device: torch.device) -> dict[str, str]:
    """Label -> value: what the speed depends on."""
    found = {
        "processor": describe_processor(),
        "threads": str(torch.get_num_threads()),
        "kernels": torch.ops.cerberus_ext.cpu_isa(),
    }
    if device.type == "cuda":
        found["GPU"] = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return found


def describe_processor() -> str:
    return f"{cpu_name()}, {os.cpu_count()} cores: {' '.join(cpu_features()) or 'features unknown'}"


def describe_versions() -> dict[str, str]:
    return {
        "cerberus_ext": _load.build_record().get("version") or package_version("cerberus_ext"),
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
        found = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
