"""`cerberus train`: heads for a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .failures import option
from .shared import Device, Model, Threads, begin, device_of, dtype_of, load_target


def train(
    output: Annotated[Path, typer.Option(help="Folder for the heads and their record; a killed run goes on from it.")],
    model: Model = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="JSONL of questions to answer, as MT-Bench's or {\"prompt\": ...}. Default: the model's own."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help='JSONL of token ids, {"p": prompt, "r": the model\'s answer}, to train on instead.'),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Answer tokens to write. Default: 1000000, or an answer to every question."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    rows: Annotated[int, typer.Option(min=1, help="Answers written at once; several hundred on a GPU.")] = 32,
    heads: Annotated[int, typer.Option(min=1, help="K: tokens drafted after the root.")] = 4,
    layers: Annotated[int, typer.Option(min=1, help="L: layers of every head.")] = 2,
    anchor: Annotated[str, typer.Option(help="What starts the chain: root or hidden.")] = "root",
    chained: Annotated[bool, typer.Option(help="--no-chained gives Medusa's heads.")] = True,
    context_layer: Annotated[
        bool, typer.Option(help="A transformer layer over the text so far, in front of the heads.")
    ] = False,
    draft_vocab: Annotated[
        int | None,
        typer.Option(min=0, help="Most frequent tokens that heads can draft; 0: all. Default: 8192, or all."),
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="Trained heads to start from: a folder, a packaged name or a Hub id.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1)] = 4000,
    batch: Annotated[int, typer.Option(min=1, help="Positions a step, of all processes together.")] = 256,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 5e-4,
    warmup: Annotated[int, typer.Option(min=0, help="Steps until the highest learning rate is reached.")] = 100,
    held_out: Annotated[float, typer.Option(help="Share of the answers, the last ones, that only measure.")] = 0.02,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between measurements and checkpoints.")] = 250,
    patience: Annotated[
        int, typer.Option(min=0, help="Stop after so many measurements without more tokens a step; 0: never.")
    ] = 0,
    memory: Annotated[float, typer.Option(help="GB of hidden states in memory.")] = 4.0,
    cache: Annotated[
        Path | None, typer.Option(help="Folder to keep hidden states in. Default: they are computed when needed.")
    ] = None,
    cache_size: Annotated[
        float | None, typer.Option(help="Most GB of hidden states in --cache. Default: no limit.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    dtype: Annotated[
        str | None, typer.Option(help="Of the products: float32 or bfloat16. Default: bfloat16 on CUDA, else float32.")
    ] = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Trains heads for a model on its own answers, which it writes first.

    With several processes: accelerate launch --multi_gpu --num_processes N -m cerberus_ext.cli train ...
    (that flag starts them on a CPU, too)
    """
    import torch

    from ..io.default_model import HUB_ID
    from ..training import train as training
    from ..training.output import check_output

    begin(threads)
    device = device_of(device)
    options = training.TrainOptions(
        output=output, base_model=name_of(model) if model else HUB_ID, seed=seed, data=data, prompts=prompts,
        tokens=tokens, max_new_tokens=max_new_tokens, rows=rows, heads=heads, layers=layers, anchor=anchor,
        chained=chained, context_layer=context_layer, draft_vocab=draft_vocab, init=init, steps=steps,
        batch=batch, lr=lr, warmup=warmup, held_out=held_out, eval_every=eval_every, patience=patience,
        memory=memory, cache=cache, cache_size=cache_size,
    )  # fmt: skip
    for name, file in (("--data", data), ("--prompts", prompts)):
        if file is not None:
            with option(name):
                file.open("rb").close()  # better than after the model is loaded
    check_output(options, model)
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    chosen = dtype_of(dtype) or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    base, tokenizer = load_target(model, chosen, device)
    training.train(base, options, tokenizer)


def name_of(model: str) -> str:
    """The model's name without the folders of this machine."""
    return Path(model).resolve().name if Path(model).exists() else model
