"""The server as an application of Ray Serve: replicas of it behind one address."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import FIFOMixin, RequestRouter

NAME = "cerberus"
TRIES = 3  # to start a replica, until the application is said to be broken


class FewestRequests(FIFOMixin, RequestRouter):
    """To the replica that has the fewest, on any node: Ray's own fills those on the head's node first."""

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        return [candidate_replicas]


@contextmanager
def deployed(
    make: Callable[[], AbstractContextManager[FastAPI]], takes: dict[str, Any], count: int, at_once: int,
    timeout: float, host: str, port: int,
) -> Iterator[None]:  # fmt: skip
    """On the cluster that is joined, `count` replicas; when it ends, what was asked is answered first.

    make: `service`, called in each replica. takes: see `on_ray.cluster`. at_once: requests that a replica has at a
    time, those that it tells to come back included. timeout: seconds that a request may take. host, port: of the
    cluster's head, where it listens.
    """

    def build() -> FastAPI:
        context = make()
        app = context.__enter__()
        app.state.service = context  # open as long as the application lives: the replica's process ends with it
        return app

    deployment = serve.deployment(
        serve.ingress(build)(), name=NAME, num_replicas=count, ray_actor_options=takes, max_ongoing_requests=at_once,
        graceful_shutdown_timeout_s=timeout, max_constructor_retry_count=TRIES,
        request_router_config=RequestRouterConfig(request_router_class=FewestRequests),
    )  # fmt: skip
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=quiet)
    try:
        serve.run(deployment.bind(), name=NAME, route_prefix="/", logging_config=quiet)
        yield
    finally:
        serve.delete(NAME)


def is_there() -> bool:
    """Whether the application is."""
    return NAME in serve.status().applications
