"""`cerberus serve`: answers over HTTP, as OpenAI's interface has them."""

from __future__ import annotations

import os
import signal
import sys
import time
from functools import partial
from typing import Annotated

import typer

from .failures import fail
from .on_ray import Ray, Replicas, on_cluster
from .shared import PACKAGED_HEADS, Device, DTypeName, HeadsOrNone, Model, Threads, load_any

KEY = "CERBERUS_API_KEY"
MOST_SECONDS = 1_000_000


def serve(
    model: Model = None,
    heads: HeadsOrNone = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all of the machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Of the model, for clients. Default: --model's, or smollm2-135m-instruct.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer where a client does not say.")] = 1024,
    slots: Annotated[int, typer.Option(min=1, help="Answers that are decoded at once.")] = 8,
    waiting: Annotated[int, typer.Option(min=1, help="Answers that may wait; more are told to come back.")] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take, in all.")] = 600.0,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 1 << 20,
    drafts: Annotated[bool, typer.Option(help="--no-drafts: a token at every step, to compare with.")] = True,
    ray: Ray = None,
    replicas: Replicas = 1,
    dtype: DTypeName = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Serves /v1/chat/completions, /v1/completions and /v1/models, with /health and /metrics.

    The environment variable CERBERUS_API_KEY, where it is set, is the key that clients have to send.
    With --ray the head of the cluster listens, and --slots and --waiting are those of each replica.
    """
    if not 1 <= timeout <= MOST_SECONDS:  # nan is not
        fail(f"--timeout: must be in 1..{MOST_SECONDS}, got {timeout:g}")
    try:
        from ..serving.listen import listen
        from ..serving.service import service
    except ModuleNotFoundError as error:
        fail(f'{error.name} is missing: pip install "cerberus_ext[serve]"', cause=error)
    shown = name or model or PACKAGED_HEADS
    make = partial(
        service, partial(load_any, model, heads, dtype, device, threads), slots, waiting, drafts, model=shown,
        max_new_tokens=max_new_tokens, key=os.environ.get(KEY, ""), timeout=timeout, max_body=max_body,
    )  # fmt: skip

    def say(at: str, port: int) -> None:
        typer.echo(f"[serving {shown} at http://{at}:{port}/v1]", err=True)

    if ray is None:
        with make() as application:
            # uvicorn lets running answers end, then raises the signal again: what is open here is then to be closed.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            if not listen(application, host, port, timeout, say):
                sys.exit(2)
        return
    with on_cluster(ray, device, threads) as takes:
        from ..serving.ray_serve import deployed, is_there

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        # More requests than a replica can take: it says itself that it has enough.
        with deployed(make, takes, replicas, 2 * (slots + waiting), timeout, host, port):
            say(host, port)
            while is_there():
                time.sleep(1)
