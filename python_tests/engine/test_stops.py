"""Every kind of stop, at every place of what one step has accepted: the text ends at that token, as from `generate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from generate_cases import cerberus, run
from stand_ins import OracleHeads
from tiny_models import VOCAB, generate, tiny_model
from torch import Tensor
from transformers import MaxTimeCriteria, StoppingCriteria, StopStringCriteria

from cerberus_ext import Decoder, StaticPolicy, decode

HEADS, NEW, START = 5, 24, 9
IDS = torch.randint(
    VOCAB, (1, START), generator=torch.Generator().manual_seed(3)
)  # of what follows no token recurs soon
TREE = StaticPolicy.chain(HEADS)  # each step adds HEADS + 1 tokens: first 1, then those up to 7, 13, 19 ...
PLACES = range(2, 15)  # new tokens: every place of two steps, their ends included


@cache
def text() -> Tensor:
    """What the model makes of IDS."""
    return generate(tiny_model("qwen2"), IDS, max_new_tokens=NEW)


class At(StoppingCriteria):
    """Ends after so many tokens; it is called once for each of them."""

    def __init__(self, length: int, error: type[BaseException] | None = None) -> None:
        self.length, self.error, self.seen = length, error, list[int]()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.seen.append(input_ids.shape[1])
        if self.error is not None and input_ids.shape[1] == self.length:
            raise self.error("in a criterion")
        return torch.tensor([input_ids.shape[1] >= self.length])


class Late(MaxTimeCriteria):
    """Its time is over at that length."""

    def __init__(self, length: int) -> None:
        super().__init__(1000.0)
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Any:
        if input_ids.shape[1] == self.length:
            self.initial_timestamp = time.time() - 2000
        return super().__call__(input_ids, scores, **options)


def eos(new: int) -> int:
    return int(text()[0, START + new - 1])


# Of the number of new tokens -> arguments of `decode`, and of `generate` where it has others.
KINDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "max_new_tokens": lambda new: {"max_new_tokens": new},
    "eos": lambda new: {"eos_token_id": eos(new)},
    "several eos": lambda new: {"eos_token_id": [VOCAB + 7, eos(new), 2]},
    "tensor of eos": lambda new: {"eos_token_id": torch.tensor([2, eos(new)])},
    "tensor of one eos": lambda new: {"eos_token_id": torch.tensor(eos(new))},
    "criterion": lambda new: {"stopping_criteria": [At(START + new)]},
    "two criteria": lambda new: {"stopping_criteria": [At(START + new + 1), At(START + new)]},
    "time": lambda new: {"stopping_criteria": [Late(START + new)]},
    "stop string": lambda new: {"stopping_criteria": [StopStringCriteria(*stop_string(new))]},
}


def stop_string(new: int) -> tuple[Any, list[str]]:
    """One that the text has when two tokens more than new - 2 are there."""
    tokenizer = byte_tokenizer(VOCAB)
    return tokenizer, [tokenizer.decode(text()[0, START + new - 2 : START + new])]


def oracle() -> OracleHeads:
    return OracleHeads(text(), HEADS, VOCAB)


@pytest.mark.parametrize("kind", KINDS)
def test_at_every_place(kind: str) -> None:
    model = tiny_model("qwen2")
    with Decoder(model, heads := oracle(), tree=TREE) as decoder:
        for new in PLACES:
            options = {"max_new_tokens": NEW, **KINDS[kind](new)}
            assert run(model, IDS, **options).equal(text()[:, : START + new])
            options |= KINDS[kind](new)  # criteria that have seen nothing
            out = decoder.decode(IDS, streamer=heads, **options)
            assert out.sequences.equal(text()[:, : START + new]) and out.stats.new_tokens == new
            assert out.stats.steps <= 1 + (new - 2) // (HEADS + 1)


def test_max_length_at_every_place() -> None:
    """`generate`'s own way of saying it."""
    model, heads = tiny_model("qwen2"), oracle()
    for new in PLACES:
        options = {"max_new_tokens": None, "max_length": START + new}
        got = cerberus(model, IDS, heads=heads, tree=TREE, streamer=heads, **options)
        assert got.equal(run(model, IDS, **options)) and got.shape[1] == START + new


def test_a_criterion_is_called_once_for_each_token() -> None:
    for new in PLACES:
        at, heads = At(START + new), oracle()
        decode(tiny_model("qwen2"), heads, IDS, tree=TREE, streamer=heads, stopping_criteria=[at])
        assert at.seen == list(range(START + 1, START + new + 1))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("of", ["criterion", "streamer"])
def test_errors_at_every_place(of: str, error: type[BaseException]) -> None:
    """Model, cache and Decoder go on, with what was read before."""

    class Failing(OracleHeads):
        def put(self, tokens: Tensor) -> None:
            super().put(tokens)
            if of == "streamer" and self.seen == self.fails:
                raise error("in a criterion")

    model = tiny_model("qwen2")
    with Decoder(model, heads := Failing(text(), HEADS, VOCAB), tree=TREE) as decoder:
        for new in PLACES:
            heads.fails = START + new
            criteria: Any = [At(START + new, error)] if of == "criterion" else None
            with pytest.raises(error, match="in a criterion"):
                decoder.decode(IDS, max_new_tokens=NEW, streamer=heads, stopping_criteria=criteria)
            assert heads.seen == 0, "its end was called"
            heads.fails = -1
            out = decoder.decode(IDS, max_new_tokens=NEW, streamer=heads)
            assert out.sequences.equal(text()) and out.stats.reused_tokens >= START - 1
    assert run(model, IDS, max_new_tokens=NEW).equal(text())
