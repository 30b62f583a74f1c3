"""A model, loaded, and the application that answers with it: in this process, or in each replica on a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI

from ..drafting.gate import AlwaysClosed
from ..engine.checks import eos_token_ids
from ..engine.decoder import Decoder
from .app import Settings, create_app
from .engine import Engine
from .prompts import positions_of


@contextmanager
def service(
    load: Callable[[], tuple[Any, Any, Any]], slots: int, waiting: int, drafts: bool, **settings: Any
) -> Iterator[FastAPI]:
    """Answers while it is open; when it ends, what was asked is answered first.

    load: makes model, tokenizer and heads. slots, waiting: Engine's. settings: those of Settings that the model does
    not give.
    """
    target, tokenizer, heads = load()
    ends = eos_token_ids(None, target.generation_config)
    own = Settings(positions=positions_of(target), ends=ends, **settings)
    with Decoder(target, heads, gate=None if drafts else AlwaysClosed()) as decoder:
        decoder.warm_up()
        with Engine(decoder, waiting, slots) as engine:
            yield create_app(engine, tokenizer, own)
