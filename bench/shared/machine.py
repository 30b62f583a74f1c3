"""Which machine a number was measured on. Every benchmark prints this beside its numbers.

python bench/shared/machine.py
"""

from __future__ import annotations

import os
import platform
import statistics
from functools import cache

import torch
from timing import Call, seconds_of

from cerberus_ext.io.machine import describe_processor
from cerberus_ext.ops import libraries


@cache
def describe() -> dict[str, str]:
    """Label -> value, in the order to print."""
    version = libraries.build_record().get("version", "of unknown version")
    ours = f"cerberus_ext {version}, {torch.ops.cerberus_ext.cpu_isa()} kernels"
    found = {
        "processor": describe_processor(),
        "threads": f"{torch.get_num_threads()} used by torch; load of the machine {os.getloadavg()[0]:.1f}",
        "copy bandwidth": f"{copy_bandwidth('cpu') / 1e9:.1f} GB/s, read + write, measured",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, {ours}",
    }
    if torch.cuda.is_available():
        found["GPU"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        found["GPU copy"] = f"{copy_bandwidth('cuda') / 1e9:.0f} GB/s, read + write, measured"
    return found


@cache
def copy_bandwidth(device: str) -> float:
    """Bytes a second, read and written, of a copy that is larger than the caches."""
    source = torch.ones(_large(device), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _typical_seconds(lambda: target.copy_(source), device)


@cache
def read_bandwidth(device: str) -> float:
    """Bytes a second of a sum over what is larger than the caches."""
    source = torch.ones(_large(device) // 4, dtype=torch.float32, device=device)
    return 4 * source.numel() / _typical_seconds(source.sum, device)


def _large(device: str) -> int:
    return 2**26 if device == "cpu" else 2**30


def _typical_seconds(call: Call, device: str) -> float:
    repeats = 9 if device == "cpu" else 50
    seconds_of(call, device, 2 if device == "cpu" else 20)
    return statistics.median(seconds_of(call, device, repeats))


def text() -> str:
    return "\n".join(f"{label:<15} {value}" for label, value in describe().items())


if __name__ == "__main__":
    print(text())
