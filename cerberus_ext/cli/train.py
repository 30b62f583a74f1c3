"""`cerberus train`: heads for a model."""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..training.options import TrainOptions
from .failures import fail, option
from .on_ray import Ray, Replicas, check_installed, on_cluster
from .shared import Device, Model, Threads, device_of, load_target, options_of

if TYPE_CHECKING:
    from ..training.answer_writer import AnswerWriter
    from ..training.answers import Answer
    from ..training.self_distill import Elsewhere


@options_of(TrainOptions)
def train(
    model: Model = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the products: float32 or bfloat16. Default: bfloat16 on CUDA, else float32.")
    ] = None,
    device: Device = None,
    threads: Threads = None,
    ray: Ray = None,
    replicas: Replicas = 1,
    **options: Any,
) -> None:
    """Trains heads for a model on its own answers, which it writes first.

    With several processes: accelerate launch --multi_gpu --num_processes N -m cerberus_ext.cli train ...
    (that flag starts them on a CPU, too)
    With --ray the replicas write the answers, and this process trains.
    """
    import torch

    from ..io.default_model import HUB_ID
    from ..training.output import check_output
    from ..training.train import train as train_heads

    if ray is not None:
        if options["data"] is not None or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            fail("--ray: cannot be had with --data, whose answers are there, or with several processes")
        check_installed()
    given_device, device, name = device, device_of(device), model or HUB_ID
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
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    target, tokenizer = load_target(model, dtype, device, threads)
    elsewhere = None if ray is None else _on_ray(ray, replicas, (model, dtype, given_device, threads))
    try:
        record = train_heads(target, asked, tokenizer, elsewhere)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on from here", 130)
    if record is not None:  # the main process
        named = ["--model", model] if model else []
        command = ["cerberus", "generate", *named, "--heads", str(asked.output), "--compare", "Why is the sky blue?"]
        typer.echo(f"the heads of step {record['kept_step']} are in {asked.output}; to try them:")
        typer.echo(f"  {shlex.join(command)}")


def _on_ray(address: str, count: int, loading: tuple[Any, ...]) -> Elsewhere:
    """loading: arguments of load_target."""
    from ..training.self_distill import Elsewhere, ShardWriter

    def shards(writer: AnswerWriter, first: int) -> Generator[list[Answer], None, None]:
        with on_cluster(address, *loading[-2:]) as takes:
            from ..serving.answerer import in_order, one_by_one
            from ..serving.on_ray import replicas

            actors = replicas(ShardWriter, takes, count, 1, load=partial(load_target, *loading), writer=writer)
            numbers = itertools.count(first) if writer.shards is None else range(first, writer.shards)
            yield from one_by_one(in_order(numbers, [actor.write.remote for actor in actors], 1))

    return Elsewhere(count, shards)
