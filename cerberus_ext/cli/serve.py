"""`cerberus serve`: answers over HTTP, as OpenAI's interface has them."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated, Any

import typer

from .failures import fail
from .shared import PACKAGED_HEADS, Device, DTypeName, HeadsOrNone, Model, Threads, load_any

KEY = "CERBERUS_API_KEY"


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
    timeout: Annotated[float, typer.Option(min=1, help="Seconds that a request may take, in all.")] = 600.0,
    max_body: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 1 << 20,
    drafts: Annotated[bool, typer.Option(help="--no-drafts: a token at every step, to compare with.")] = True,
    dtype: DTypeName = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Serves /v1/chat/completions, /v1/completions and /v1/models, with /health and /metrics.

    The environment variable CERBERUS_API_KEY, where it is set, is the key that clients have to send.
    """
    try:
        import uvicorn

        from ..serving.app import Settings, create_app
        from ..serving.engine import Engine
        from ..serving.prompts import positions_of
    except ModuleNotFoundError as error:
        fail(f'{error.name} is missing: pip install "cerberus_ext[serve]"', cause=error)
    from ..drafting.gate import AlwaysClosed
    from ..engine.checks import eos_token_ids
    from ..engine.decoder import Decoder

    target, tokenizer, trained = load_any(model, heads, dtype, device, threads)
    settings = Settings(
        model=name or model or PACKAGED_HEADS,
        positions=positions_of(target),
        max_new_tokens=max_new_tokens,
        ends=eos_token_ids(None, target.generation_config),
        key=os.environ.get(KEY, ""),
        timeout=timeout,
        max_body=max_body,
    )
    with Decoder(target, trained, gate=None if drafts else AlwaysClosed()) as decoder:
        decoder.warm_up()
        with Engine(decoder, waiting, slots) as engine:
            application = create_app(engine, tokenizer, settings)
            server = uvicorn.Server(uvicorn.Config(application, host, port, log_level="warning", access_log=False))
            _announce(server, settings.model)
            # uvicorn lets running answers end, then raises the signal again: what is open here is then to be closed.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            server.run()
            if not server.started:
                sys.exit(2)  # uvicorn has said why


def _announce(server: Any, model: str) -> None:
    """Says where it listens, once it does."""
    startup = server.startup

    async def announced(*arguments: Any, **keywords: Any) -> None:
        await startup(*arguments, **keywords)
        for listening in server.servers:
            for socket in listening.sockets:
                typer.echo("[serving {} at http://{}:{}/v1]".format(model, *socket.getsockname()[:2]), err=True)

    server.startup = announced
