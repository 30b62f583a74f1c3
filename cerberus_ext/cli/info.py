"""`cerberus info`: versions, the libraries loaded, CPU features, CUDA; what can be done with a model."""

from __future__ import annotations

import os
import platform
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer

from ..io.machine import cpu_features, cpu_name, package_version
from ..ops import libraries
from .shared import Device, DTypeName, Quantize, Threads, load_target, quantized

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Section = dict[str, str]  # label -> value
QUESTIONS, ANSWER = 8, 64  # by which a model in fewer bits is judged, and tokens of an answer
PACKAGES = ("numpy", "transformers", "accelerate", "gguf", "safetensors", "huggingface_hub")


def info(
    model: Annotated[
        str | None,
        typer.Option(help="Local folder or Hub id: whether its text is exact, and decoded with drafts, here."),
    ] = None,
    quantize: Quantize = None,
    dtype: DTypeName = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Versions, libraries loaded, CPU features, CUDA; with --model, what can be done with it.

    With --quantize, what fewer bits would cost it, or the default model.
    """
    sections = collect()
    if model is not None or quantize is not None:
        target, tokenizer = load_target(model, dtype, device, threads)
        sections["Model"] = model_section(target)
        if quantize is not None:
            sections["Quantized"] = quantized_section(target, tokenizer, quantize)
    width = max(len(label) for section in sections.values() for label in section)
    for title, section in sections.items():
        typer.echo(title)
        for label, value in section.items():
            typer.echo(f"  {label:{width}}  {value}")


def collect() -> dict[str, Section]:
    """In the order in which to show them. Downloads nothing."""
    return {"Versions": _versions(), "Libraries": _libraries(), "CPU": _cpu(), "CUDA": _cuda()}


def model_section(model: PreTrainedModel) -> Section:
    """What `decode` can do with a model. Runs a few of its steps, and generates nothing.

    Raises ValueError or TypeError where decode would refuse it.
    """
    from ..engine import checks  # these import transformers, which takes seconds
    from ..runtime.runtime import runtime_of

    checks.check_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # is shown below
        capability = runtime_of(model).capability()
    reasons = {"exact": capability.stats().inexact_because, "drafts": capability.no_drafts_because}
    return {
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        **{label: "yes" if because is None else f"no: {because}" for label, because in reasons.items()},
    }


def quantized_section(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, bits: str) -> Section:
    """What rounding the model's weights, which is done here, costs: how it takes the answers that it gave before."""
    from ..calibration.questions import OWN_QUESTIONS
    from ..evaluation.quality import own_answers, quality
    from ..io.prompts import encode_chat

    prompts = [encode_chat(tokenizer, question.turns[:1]).to(model.device) for question in OWN_QUESTIONS[:QUESTIONS]]
    answers = own_answers(model, prompts, ANSWER)
    before, done, after = quality(model, answers), quantized(model, bits), quality(model, answers)
    return {
        "weights": ", ".join(f"{list(done.bits.values()).count(size)} in {size} bits" for size in (4, 8)),
        "left": ", ".join(f"{name} ({because})" for name, because in done.left.items()) or "none",
        "answers": f"{len(answers)} of the model before, of up to {ANSWER} tokens",
        "perplexity": f"{before.perplexity:.3f} before, {after.perplexity:.3f} after",
        "same tokens": f"{before.agreement:.1%} before, {after.agreement:.1%} after",
    }


def _versions() -> Section:
    return {
        "cerberus_ext": f"{package_version('cerberus_ext')} in {libraries.PACKAGE}",
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__} in {Path(torch.__file__).parent}",
        **{package: package_version(package) for package in PACKAGES},
    }


def _libraries() -> Section:
    shown = {
        library.name: f"loaded from {library.path}" if library.loaded else f"not loaded: {library.reason}"
        for library in libraries.load_libraries()
    }
    record = libraries.build_record()
    if record:
        shown["built"] = "version {version} by {compiler} with torch {torch} on {system}".format(**record)
    return shown


def _cpu() -> Section:
    return {
        "processor": cpu_name(),
        "cores": f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads",
        "features": " ".join(cpu_features()) or "unknown",
        "kernels": f"{torch.ops.cerberus_ext.cpu_isa()}, of {libraries.build_record().get('cpu_levels', 'unknown')}",
    }


def _cuda() -> Section:
    record = libraries.build_record()
    built = record.get("cuda", "unknown")
    if built == "built":
        built = f"nvcc {record['nvcc']} for {record['cuda_architectures']}"
    count = torch.cuda.device_count()
    shown = {
        "torch": f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA",
        "_cuda.so": built if record.get("nvcc") else f"not built: {built}",
        "GPUs": str(count) if count else "none",
    }
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        shown[f"cuda:{index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
    return shown
