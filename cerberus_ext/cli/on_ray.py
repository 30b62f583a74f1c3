"""What the commands that can do their work on a Ray cluster share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from .failures import fail, sentence

Ray = Annotated[str | None, typer.Option(help="Do it on this Ray cluster: 'auto', an address, or 'local': a new one.")]
Replicas = Annotated[int, typer.Option(min=1, help="Copies of the model on the Ray cluster, of --threads CPUs each.")]


def check_installed() -> None:
    """So that nothing is loaded in vain."""
    try:
        import ray  # noqa: F401
    except ModuleNotFoundError as error:
        fail(f'--ray: {str(error.name).partition(".")[0]} is missing: pip install "cerberus_ext[ray]"', cause=error)


@contextmanager
def on_cluster(address: str, device: str | None, threads: int | None) -> Iterator[dict[str, Any]]:
    """`cluster` of serving/on_ray.py, by the options' values; what goes wrong with Ray is a failure of --ray."""
    check_installed()
    from ray.exceptions import RayError

    from ..serving.on_ray import cluster

    takes_gpu = None if device is None else device.startswith("cuda")
    try:
        with cluster(address, threads or 1, takes_gpu) as takes:
            yield takes
    except (RayError, ConnectionError) as error:
        cause = getattr(error, "cause", None)  # of a task: what it raised there
        fail(f"--ray: {sentence(cause if isinstance(cause, Exception) else error)}", cause=error)
