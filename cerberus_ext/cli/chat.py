"""`cerberus chat`: a conversation, of which every turn reads only what is new."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .failures import fail
from .shared import Device, DTypeName, HeadsOrNone, Model, Threads, load_any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..engine.decoder import Decoder


def chat(
    model: Model = None,
    heads: HeadsOrNone = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    dtype: DTypeName = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Answers line after line of standard input, each with all that was said before in mind.

    Ctrl-C ends an answer; Ctrl-D, or `exit`, the conversation.
    """
    from ..engine.decoder import Decoder
    from ..io.prompts import encode_chat

    target, tokenizer, trained = load_any(model, heads, dtype, device, threads)
    turns: list[str] = []
    with Decoder(target, trained) as decoder:
        for line in _lines():
            turns.append(line)
            ids = encode_chat(tokenizer, turns).to(target.device)
            turns.append(_answer(decoder, tokenizer, ids, max_new_tokens))
            stats: Any = decoder.stats
            speed, steps = stats.tokens_per_second, stats.tokens_per_step
            typer.echo(
                f"[{stats.new_tokens} tokens, {speed:.1f} tokens/s, {steps:.2f} tokens per step,"
                f" {stats.reused_tokens} of {ids.shape[1]} prompt tokens reused]"
            )


def _lines() -> Iterator[str]:
    """What the user says."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
            line.encode()
        except EOFError:
            return
        except UnicodeError as error:
            fail("standard input: must be UTF-8 text", cause=error)
        if line == "exit":
            return
        if line:
            yield line


def _answer(decoder: Decoder, tokenizer: PreTrainedTokenizerBase, ids: Any, max_new_tokens: int) -> str:
    """Prints the answer while it is generated. An interrupt ends it where it is."""
    import torch
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    stream: Any = decoder.stream(ids, max_new_tokens=max_new_tokens)
    tokens: list[int] = []
    with suppress(KeyboardInterrupt), closing(stream):
        for chunk in stream:
            tokens += chunk.tokens
            streamer.put(torch.tensor(chunk.tokens))
    streamer.end()
    return str(tokenizer.decode(tokens, skip_special_tokens=True))
