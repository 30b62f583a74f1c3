"""Answerers on a Ray cluster."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray


@contextmanager
def cluster(address: str, cpus: int, gpus: bool | None) -> Iterator[dict[str, Any]]:
    """The one at `address`, joined; what each replica of a model takes of it, as options of Ray's actors.

    cpus: of each. gpus: whether each takes one; None: where the cluster has any.
    """
    ray.init(address, logging_level=logging.WARNING)
    try:
        takes_gpu = "GPU" in ray.cluster_resources() if gpus is None else gpus
        yield {"num_cpus": cpus, "num_gpus": int(takes_gpu)}
    finally:
        ray.shutdown()


def replicas(kind: type, takes: dict[str, Any], count: int, at_once: int, **options: Any) -> list[Any]:
    """So many actors of the class, made with `options`, for use inside `cluster`, whose `takes` it is.

    at_once: calls that each has at a time. Ray starts one that dies again, on another node where its own is gone, and
    asks it again what it had not answered.
    """
    restarts = {"max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": "SPREAD"}
    actor = ray.remote(kind).options(**takes, **restarts, max_concurrency=at_once)
    return [actor.remote(**options) for _ in range(count)]
