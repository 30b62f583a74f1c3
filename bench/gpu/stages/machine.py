"""Stage "machine" of a GPU session: what is measured on, and how fast its memory is."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import machine
import stage
import torch

from cerberus_ext.io.machine import commit, describe_processor, package_version
from cerberus_ext.ops import libraries

_SMI = (
    "name", "driver_version", "memory.total", "power.limit", "power.draw", "temperature.gpu", "clocks.sm",
    "clocks.max.sm", "clocks.mem", "clocks.max.mem", "clocks_event_reasons.active",
)  # fmt: skip


def nvidia_smi() -> dict[str, str]:
    """What the driver says, label -> value; empty where there is no nvidia-smi or it does not know one of these."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader", "--id=0"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    values = [value.strip() for value in found.stdout.strip().split(",")]
    return dict(zip(_SMI, values, strict=True)) if len(values) == len(_SMI) else {}


def body(run: stage.Stage) -> None:
    record = libraries.build_record()
    loaded = {library.name: library.reason or "loaded" for library in libraries.load_libraries()}
    run.result.update(
        versions={
            "cerberus_ext": record.get("version") or package_version("cerberus_ext"),
            "commit": commit(Path(__file__)) or "unknown",
            "built": f"{record.get('compiler')}, nvcc {record.get('nvcc') or 'none'}, {record.get('cuda')}",
            "Python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": package_version("transformers"),
        },
        libraries=loaded,
        processor=describe_processor(),
    )
    if run.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        run.result["gpu"] = {
            "name": properties.name,
            "compute capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory": properties.total_memory,
            "L2": properties.L2_cache_size,
            "CUDA of torch": torch.version.cuda,
        }
        if libraries.get("_cuda.so") != "loaded":
            run.problems.append(f"_cuda.so: {libraries.get('_cuda.so')}")
    run.save()
    run.result["copy_bytes_per_second"] = machine.copy_bandwidth(run.device)
    run.result["read_bytes_per_second"] = machine.read_bandwidth(run.device)
    run.result["driver"] = nvidia_smi()  # just after the GPU was busy: the clocks that it works at
