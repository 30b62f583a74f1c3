"""`cerberus train`: heads for a model."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from ..training.options import TrainOptions
from .failures import fail, option
from .shared import Device, Model, Threads, device_of, load_target, options_of


@options_of(TrainOptions)
def train(
    model: Model = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the products: float32 or bfloat16. Default: bfloat16 on CUDA, else float32.")
    ] = None,
    device: Device = None,
    threads: Threads = None,
    **options: Any,
) -> None:
    """Trains heads for a model on its own answers, which it writes first.

    With several processes: accelerate launch --multi_gpu --num_processes N -m cerberus_ext.cli train ...
    (that flag starts them on a CPU, too)
    """
    import torch

    from ..io.default_model import HUB_ID
    from ..training.output import check_output
    from ..training.train import train as train_heads

    device, name = device_of(device), model or HUB_ID
    if model and Path(model).exists():  # without the folders of this machine
        name = Path(model).resolve().name
    asked = TrainOptions(base_model=name, **options)
    for given, file in (("--data", asked.data), ("--prompts", asked.prompts)):
        if file is not None:
            with option(given):
                file.open("rb").close()  # better than after the model is loaded
    check_output(asked, model)
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    on_cpu = torch.device(device).type == "cpu"
    if not on_cpu:
        torch.cuda.set_device(device)
    target, tokenizer = load_target(model, dtype or ("float32" if on_cpu else "bfloat16"), device, threads)
    try:
        record = train_heads(target, asked, tokenizer)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from here", 130)
    if record is not None:  # the main process
        named = ["--model", model] if model else []
        command = ["cerberus", "generate", *named, "--heads", str(asked.output), "--compare", "Why is the sky blue?"]
        typer.echo(f"the heads of step {record['kept_step']} are in {asked.output}; to try them:")
        typer.echo(f"  {shlex.join(command)}")
