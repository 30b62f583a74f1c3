"""transformers' three streamers: the same text in the same pieces from `decode` and `generate` as without drafts."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from byte_tokenizer import byte_tokenizer
from generate_cases import NEW, cerberus, run
from stand_ins import OracleHeads
from tiny_models import VOCAB, generated, prompt, tiny_model
from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer, TextStreamer

from cerberus_ext import decode

TOKENIZER = byte_tokenizer(VOCAB)


class Following(OracleHeads):
    """Right heads, which pass on what is streamed to them."""

    def __init__(self, streamer: Any) -> None:
        super().__init__(generated("llama", "cpu", NEW), 3, VOCAB)
        self.streamer = streamer

    def put(self, tokens: Any) -> None:
        super().put(tokens)
        self.streamer.put(tokens)

    def end(self) -> None:
        super().end()
        self.streamer.end()


def by_decode(streamer: Any) -> None:
    heads = Following(streamer)
    stats = decode(tiny_model("llama"), heads, prompt(), max_new_tokens=NEW, tree=9, streamer=heads).stats
    assert stats.tokens_per_step > 2


def by_generate(streamer: Any) -> None:
    cerberus(tiny_model("llama"), prompt(), streamer=streamer)


def plainly(streamer: Any) -> None:
    run(tiny_model("llama"), prompt(), streamer=streamer)


def in_a_thread(work: Any, streamer: Any) -> threading.Thread:
    thread = threading.Thread(target=work, args=(streamer,))
    thread.start()
    return thread


@pytest.mark.parametrize("work", [by_decode, by_generate])
def test_printed(work: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plainly(TextStreamer(TOKENIZER))
    want = capsys.readouterr().out
    work(TextStreamer(TOKENIZER))
    assert capsys.readouterr().out == want != ""


@pytest.mark.parametrize("skip_prompt", [False, True])
@pytest.mark.parametrize("work", [by_decode, by_generate])
def test_iterated(work: Any, skip_prompt: bool) -> None:
    pieces = []
    for one in (plainly, work):
        streamer = TextIteratorStreamer(TOKENIZER, skip_prompt, timeout=120)  # type: ignore[arg-type]
        thread = in_a_thread(one, streamer)
        pieces.append(list(streamer))
        thread.join()
    assert pieces[0] == pieces[1] and "".join(pieces[0])


@pytest.mark.parametrize("work", [by_decode, by_generate])
def test_awaited(work: Any) -> None:
    async def pieces(one: Any) -> list[str]:
        streamer = AsyncTextIteratorStreamer(TOKENIZER, timeout=120)  # type: ignore[arg-type]
        thread = in_a_thread(one, streamer)
        found = [piece async for piece in streamer]
        thread.join()
        return found

    assert asyncio.run(pieces(work)) == asyncio.run(pieces(plainly)) != []
