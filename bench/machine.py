"""Which machine a number was measured on. Every benchmark prints this beside its numbers.

python bench/machine.py
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from functools import cache

import torch

from cerberus_ext import _load, info


@cache
def describe() -> dict[str, str]:
    """Label -> value, in the order to print."""
    version = _load.build_record().get("version", "of unknown version")
    ours = f"cerberus_ext {version}, {torch.ops.cerberus_ext.cpu_isa()} kernels"
    features = " ".join(info.cpu_features()) or "features unknown"
    found = {
        "processor": f"{info.cpu_name()}, {os.cpu_count()} cores: {features}",
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
    """Bytes a second, read and written, of a copy that is larger than the caches: the median of 9."""
    source = torch.ones(2**26 if device == "cpu" else 2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(11):
        wait_for(device)
        start = time.perf_counter()
        target.copy_(source)
        wait_for(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() / statistics.median(seconds[2:])


def wait_for(device: str) -> None:
    """Until everything given to the device is done; on the CPU it is when a call returns."""
    if device != "cpu":
        torch.cuda.synchronize()


def text() -> str:
    return "\n".join(f"{label:<15} {value}" for label, value in describe().items())


if __name__ == "__main__":
    print(text())
