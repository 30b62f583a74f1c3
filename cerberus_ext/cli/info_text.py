"""What `cerberus info` prints: versions, the libraries loaded, CPU features, CUDA; what can be done with a model."""

from __future__ import annotations

import os
import platform
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..io.machine import cpu_features, cpu_name, package_version
from ..ops import libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REQUIREMENTS = ("numpy", "transformers", "accelerate", "gguf", "safetensors", "huggingface_hub")


def collect() -> dict[str, dict[str, str]]:
    """Section -> label -> value, in the order in which to show them. Downloads nothing."""
    return {"Versions": _versions(), "Libraries": _libraries(), "CPU": _cpu(), "CUDA": _cuda()}


def model_section(model: PreTrainedModel) -> dict[str, str]:
    """Label -> value: what `decode` can do with a model. Runs a few of its steps, and generates nothing.

    Raises ValueError or TypeError where decode would refuse it.
    """
    from ..engine import checks  # these import transformers, which takes seconds
    from ..runtime.runtime import runtime_of

    checks.check_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # is shown below
        found = runtime_of(model).capability()
    return {
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "exact": _yes_unless(found.stats().inexact_because),
        "drafts": _yes_unless(found.no_drafts_because),
    }


def _yes_unless(because: str | None) -> str:
    return "yes" if because is None else f"no: {because}"


def print_sections(sections: dict[str, dict[str, str]]) -> None:
    """As plain text, one label a line."""
    width = max(len(label) for section in sections.values() for label in section)
    for title, section in sections.items():
        print(title)
        for label, value in section.items():
            print(f"  {label:{width}}  {value}")


def _versions() -> dict[str, str]:
    versions = {
        "cerberus_ext": f"{package_version('cerberus_ext')} in {libraries.PACKAGE}",
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__} in {Path(torch.__file__).parent}",
    }
    return versions | {package: package_version(package) for package in _REQUIREMENTS}


def _libraries() -> dict[str, str]:
    shown = {
        library.name: f"loaded from {library.path}" if library.loaded else f"not loaded: {library.reason}"
        for library in libraries.load_libraries()
    }
    record = libraries.build_record()
    if record:
        shown["built"] = "version {version} by {compiler} with torch {torch} on {system}".format(**record)
    return shown


def _cpu() -> dict[str, str]:
    return {
        "processor": cpu_name(),
        "cores": f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads",
        "features": " ".join(cpu_features()) or "unknown",
        "kernels": f"{torch.ops.cerberus_ext.cpu_isa()}, of {libraries.build_record().get('cpu_levels', 'unknown')}",
    }


def _cuda() -> dict[str, str]:
    record = libraries.build_record()
    built = record.get("cuda", "unknown")
    if built == "built":
        built = f"nvcc {record['nvcc']} for {record['cuda_architectures']}"
    count = torch.cuda.device_count()
    shown = {"torch": f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"}
    shown["_cuda.so"] = built if record.get("nvcc") else f"not built: {built}"
    shown["GPUs"] = str(count) if count else "none"
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        shown[f"cuda:{index}"] = f"{gpu.name}, {memory}, sm_{gpu.major}{gpu.minor}"
    return shown
