"""What the commands share: options, and loading of models and heads."""

from __future__ import annotations

import gc
import inspect
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, get_type_hints

import typer

from .failures import fail, option

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..drafting.heads import CerberusHeads
    from ..target.quantize import Quantized

PACKAGED_HEADS = "smollm2-135m-instruct"
NO_HEADS = "none"
MAX_THREADS = max(1024, 4 * (os.cpu_count() or 1))  # many more end in a segmentation fault of OpenMP

Model = Annotated[
    str | None,
    typer.Option(help="The target model: local folder, Hub id or GGUF file. Default: SmolLM2-135M-Instruct."),
]
Heads = Annotated[
    str | None, typer.Option(help="Packaged name, local folder or Hub id. Default: those of the default model.")
]
HeadsOrNone = Annotated[
    str | None, typer.Option(help="As for the other commands; 'none': draft from the text alone, for any model.")
]
DTypeName = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. Default: bfloat16 where it is fast.")
]
Quantize = Annotated[
    str | None, typer.Option(help="q4 or q8: round the weights to so many bits first. Another model, then.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: CUDA where there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's.")]


def options_of(kind: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For a command with **options: one for each field of the dataclass `kind` that has a help text."""

    def with_options(command: Callable[..., None]) -> Callable[..., None]:
        hints, own = get_type_hints(kind), inspect.signature(command, eval_str=True).parameters.values()
        parameters = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=Annotated[hints[field.name], typer.Option(help=field.metadata["help"])],
            )
            for field in fields(kind)
            if "help" in field.metadata
        ]
        parameters += [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.kind is not p.VAR_KEYWORD]
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return with_options


@contextmanager
def uncollected() -> Iterator[None]:
    """For imports and loading, whose results stay: Python does not look through them for what nobody needs any more,
    neither then nor later. That is half a second of a start."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if before:
            gc.enable()


def begin(threads: int | None) -> None:
    """What a command does before it loads a model."""
    import torch
    from transformers.utils import logging

    name, count = ("OMP_NUM_THREADS", torch.get_num_threads()) if threads is None else ("--threads", threads)
    if count > MAX_THREADS:
        fail(f"{name}: must be in 1..{MAX_THREADS}, got {count}")
    if threads is not None:
        torch.set_num_threads(threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def dtype_of(name: str | None) -> torch.dtype | None:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        fail(f"--dtype must be one of {', '.join(known)}, got {name}")
    return known[name] if name else None


def device_of(name: str | None) -> str | None:
    """Refuses what is not there, before anything is loaded."""
    import torch

    if name is None or name == "cpu":
        return name
    match = re.fullmatch(r"cuda(?::(\d{1,4}))?", name)
    if match is None:
        fail(f"--device: must be cpu, cuda or cuda:0, cuda:1 ..., got {name}")
    if not torch.cuda.is_available():
        reason = "torch sees no GPU" if torch.version.cuda else "this torch is built without CUDA"
        fail(f"--device: {name} cannot be used: {reason}")
    if int(match[1] or 0) >= torch.cuda.device_count():
        fail(f"--device: there is no {name}, the last one is cuda:{torch.cuda.device_count() - 1}")
    return name


def load(
    model: str | None, heads: str | None, dtype: str | None, device: str | None, threads: int | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, CerberusHeads]:
    """Target model, tokenizer and heads, by the options' values."""
    if model is not None and heads is None:
        fail(
            "--heads: the packaged heads fit the default model only; name heads trained for this --model,"
            f" or, to generate, {NO_HEADS!r}: the text alone is drafted from"
        )
    target, tokenizer = load_target(model, dtype, device, threads)
    return target, tokenizer, load_heads(heads, target)


def load_any(
    model: str | None, heads: str | None, dtype: str | None, device: str | None, threads: int | None,
    bits: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, CerberusHeads | None]:  # fmt: skip
    """The same, with heads or without, and the model in fewer bits where `bits` are said."""
    trained: CerberusHeads | None = None
    if heads == NO_HEADS:
        target, tokenizer = load_target(model, dtype, device, threads)
    else:
        target, tokenizer, trained = load(model, heads, dtype, device, threads)
    if bits is not None:
        quantized(target, bits, trained)
    return target, tokenizer, trained


def load_target(
    model: str | None, dtype: str | None, device: str | None, threads: int | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The default model where `model` is None."""
    from ..io.default_model import load_default_model, load_model

    begin(threads)
    torch_dtype, device = dtype_of(dtype), device_of(device)
    with option("--model"), uncollected():
        return load_default_model(torch_dtype, device) if model is None else load_model(model, torch_dtype, device)


def quantized(model: PreTrainedModel, bits: str, heads: CerberusHeads | None = None) -> Quantized:
    """The model in fewer bits; the heads may draft for it."""
    from ..target.quantize import quantize

    with option("--quantize"):
        done = quantize(model, bits)
    if heads is not None:
        heads.config.lm_head_fingerprint = None
    return done


def load_heads(name: str | None, target: PreTrainedModel, option_name: str = "--heads") -> CerberusHeads:
    """The packaged ones where `name` is None."""
    from ..drafting.heads import CerberusHeads
    from ..io.default_model import HUB_ID

    with option(option_name):
        heads = CerberusHeads.from_pretrained(name or PACKAGED_HEADS)
        if name in (None, PACKAGED_HEADS) and target.name_or_path == HUB_ID:
            # Trained on the Q4_1 weights of the same model. They fit the original nearly as well, and what is generated
            # never depends on them.
            heads.config.lm_head_fingerprint = None
        heads.check_fit(target)
        return heads
