"""`cerberus train`: heads for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .shared import Device, Model, Threads, fail, load_base, quiet_transformers


def train(
    data: Annotated[Path, typer.Option(help='JSONL of token ids: {"p": prompt, "r": answer written by the model}.')],
    output: Annotated[Path, typer.Option(help="Folder for the heads and training.json; a killed run goes on from it.")],
    model: Model = None,
    heads: Annotated[int, typer.Option(min=1, help="K: tokens guessed after the root.")] = 4,
    layers: Annotated[int, typer.Option(min=1, help="L: layers of every head.")] = 2,
    anchor: Annotated[str, typer.Option(help="What starts the chain: root or hidden.")] = "root",
    chained: Annotated[bool, typer.Option(help="--no-chained gives Medusa's heads.")] = True,
    draft_vocab: Annotated[int, typer.Option(min=0, help="Most frequent tokens that heads can guess; 0: all.")] = 8192,
    steps: Annotated[int, typer.Option(min=1)] = 4000,
    batch: Annotated[int, typer.Option(min=1, help="Positions a step.")] = 256,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 5e-4,
    eval_every: Annotated[int, typer.Option(min=1, help="Steps between evaluations and checkpoints.")] = 250,
    cache: Annotated[Path | None, typer.Option(help="Folder for hidden states. Default: OUTPUT/hidden.")] = None,
    seed: int = 0,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Trains heads for a model on its own answers."""
    import torch

    from .. import train as training
    from ..default_model import HUB_ID

    if threads is not None:
        torch.set_num_threads(threads)
    quiet_transformers()
    base, _ = load_base(model, torch.float32, device)
    try:
        options = training.TrainOptions(
            data=data, output=output, cache=cache, base_model=model or HUB_ID, heads=heads, layers=layers,
            anchor=anchor, chained=chained, draft_vocab=draft_vocab, steps=steps, batch=batch, lr=lr,
            eval_every=eval_every, seed=seed,
        )  # fmt: skip
        training.train(base, options)
    except (OSError, ValueError, FloatingPointError) as error:
        fail(str(error))
