"""What the commands share: options, loading of models and heads, and errors of one line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from typing import NoReturn

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..heads import CerberusHeads

PACKAGED_HEADS = "smollm2-135m-instruct"
NO_HEADS = "none"

Model = Annotated[
    str | None, typer.Option(help="Local folder or Hub id of the base model. Default: SmolLM2-135M-Instruct.")
]
Heads = Annotated[
    str | None, typer.Option(help="Packaged name, local folder or Hub id. Default: those of the default model.")
]
DTypeName = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16. Default: bfloat16 where it is fast.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ... Default: CUDA where there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's.")]


def begin(threads: int | None) -> None:
    """What a command does before it loads a model."""
    import torch
    from transformers.utils import logging

    if threads is not None:
        torch.set_num_threads(threads)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def check_heads_named(model: str | None, heads: str | None) -> None:
    """Another model than the default one needs heads of its own."""
    if model is not None and heads is None:
        fail(
            "--heads: the packaged heads fit the default model only; name heads trained for this --model,"
            f" or {NO_HEADS!r}, to guess from the text alone"
        )


def dtype_of(name: str | None) -> torch.dtype | None:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        fail(f"--dtype must be one of {', '.join(known)}, got {name}")
    return known[name] if name else None


def load_base(
    model: str | None, dtype: torch.dtype | None, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from ..default_model import load_default_model, load_model

    try:
        return load_default_model(dtype, device) if model is None else load_model(model, dtype, device)
    except (OSError, RuntimeError) as error:
        fail(f"--model: {error}")


def load_heads(name: str, base: PreTrainedModel, option: str = "--heads") -> CerberusHeads:
    from ..default_model import HUB_ID
    from ..heads import CerberusHeads

    try:
        heads = CerberusHeads.from_pretrained(name)
        if name == PACKAGED_HEADS and base.name_or_path == HUB_ID:
            # Trained on the Q4_1 weights of the same model. They fit the original nearly as well, and what is generated
            # never depends on them.
            heads.config.lm_head_fingerprint = None
        heads.bind(base)
        return heads
    except (OSError, ValueError) as error:
        fail(f"{option}: {error}")


def encode(tokenizer: PreTrainedTokenizerBase, text: str, raw: bool) -> torch.Tensor:
    """Token ids of the prompt, (1, S), with the chat template where the tokenizer has one."""
    from ..prompts import encode_chat

    return tokenizer(text, return_tensors="pt").input_ids if raw else encode_chat(tokenizer, [text])


def fail(message: str) -> NoReturn:
    typer.echo(f"cerberus: {message}", err=True)
    raise typer.Exit(2)
