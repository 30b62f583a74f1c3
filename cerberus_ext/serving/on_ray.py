"""Answerers on a Ray cluster."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from .answerer import AHEAD, Answerer, Ask


@contextmanager
def replicas(address: str, count: int, cpus: int, gpus: bool | None, slots: int, **options: Any) -> Iterator[list[Ask]]:
    """So many answerers on the cluster at `address`, with the slots and the other options of Answerer.

    cpus: that each of them takes. gpus: whether each takes one; None: where the cluster has any. Ray starts one that
    dies again, on another node where its own is gone, and asks it again what it had not answered.
    """
    ray.init(address, logging_level=logging.WARNING)
    try:
        takes_gpu = "GPU" in ray.cluster_resources() if gpus is None else gpus
        kind = ray.remote(Answerer).options(
            num_cpus=cpus, num_gpus=int(takes_gpu), max_restarts=-1, max_task_retries=-1, max_concurrency=AHEAD * slots,
            scheduling_strategy="SPREAD",
        )  # fmt: skip
        actors: list[Any] = [kind.remote(slots=slots, **options) for _ in range(count)]
        yield [actor.answer.remote for actor in actors]
    finally:
        ray.shutdown()
