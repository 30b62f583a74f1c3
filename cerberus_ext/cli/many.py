"""`cerberus generate --file`: all prompts of a file, here or on a Ray cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .failures import fail, option
from .on_ray import on_cluster
from .shared import load_any

Raw = Annotated[bool, typer.Option(help="Give the prompt as it is, without the chat template.")]
File = Annotated[
    Path | None, typer.Option(help='Answer the prompts of this file instead: JSON lines with "prompt" or "messages".')
]
Output = Annotated[
    Path | None, typer.Option(help="JSON lines with the answers to --file, in its order. What is there is kept.")
]
Slots = Annotated[int, typer.Option(min=1, help="Answers to --file that are decoded at once, by each copy.")]


def answer_file(
    file: Path, output: Path | None, ray: str | None, replicas: int, slots: int, loading: tuple[Any, ...],
    **options: Any,
) -> None:  # fmt: skip
    """loading: arguments of load_any. options: Answerer's. Status 1 where some prompts could not be answered,
    now or before."""
    from ..serving.answer_file import answered, line_of, read_questions
    from ..serving.answerer import AHEAD, in_order

    if output is None:
        fail("--output: must be given with --file")
    with option("--file"):
        questions = read_questions(file)
    with option("--output"):
        there, errors = answered(output, questions, file)
        to = output.open("ab", buffering=0)  # closing has nothing left to write that could fail
    options |= {"load": partial(load_any, *loading), "slots": slots}

    async def write(workers: Any) -> int:
        refused = errors
        async for answer in in_order(questions[there:], workers, AHEAD * slots):
            refused += "error" in answer
            line = line_of(answer)
            with option("--output"):  # a full disk takes a part of a line
                while line:
                    line = line[to.write(line) :]
        return refused

    with to, _here(**options) if ray is None else _on_ray(ray, replicas, loading, **options) as workers:
        refused = asyncio.run(write(workers))
    old = there - errors
    typer.echo(f"[{len(questions) - old - refused} answered, {old} were there, {refused} refused]", err=True)
    if refused:
        raise typer.Exit(1)


@contextmanager
def _here(**options: Any) -> Iterator[list[Any]]:
    from ..serving.answerer import Answerer

    with Answerer(**options) as answerer:
        yield [answerer.answer]


@contextmanager
def _on_ray(address: str, count: int, loading: tuple[Any, ...], **options: Any) -> Iterator[list[Any]]:
    with on_cluster(address, *loading[-2:]) as takes:
        from ..serving.answerer import AHEAD, Answerer
        from ..serving.on_ray import replicas

        actors = replicas(Answerer, takes, count, AHEAD * options["slots"], **options)
        yield [actor.answer.remote for actor in actors]
