"""`streamer.end` is called once, however a decode ends: who reads the stream waits for it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny_models import generated, prompt, tiny_model
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from cerberus_ext.drafting.gate import Gate, Signals
from cerberus_ext.engine.decode import decode

NEW = 12
PROMPT, END = prompt().tolist(), "end"


class Streamer(BaseStreamer):
    """Fails at its `fails`-th call, or in `end`."""

    def __init__(self, fails: int | str = -1, error: type[BaseException] = ZeroDivisionError) -> None:
        self.calls: list[Any] = []
        self.fails, self.error = fails, error

    def put(self, value: Tensor) -> None:
        self.calls.append(value.tolist())
        if len(self.calls) == self.fails:
            raise self.error("in put")

    def end(self) -> None:
        self.calls.append(END)
        if self.fails == END:
            raise self.error("in end")


class Failing(Gate):
    def __init__(self, error: type[BaseException]) -> None:
        self.error = error

    def decide(self, signals: Signals) -> int:
        raise self.error("in the middle")


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.mark.parametrize("new", [0, 1, NEW])
def test_once_at_the_end(new: int, llama: PreTrainedModel) -> None:
    streamer = Streamer()
    decode(llama, None, prompt(), max_new_tokens=new, streamer=streamer)
    assert streamer.calls == [
        PROMPT,
        *([token] for token in generated("llama", "cpu", NEW)[0, 9 : 9 + new].tolist()),
        END,
    ]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_after_an_error_in_the_middle(error: type[BaseException], llama: PreTrainedModel) -> None:
    streamer = Streamer()
    with pytest.raises(error, match="^in the middle$"):
        decode(llama, None, prompt(), max_new_tokens=NEW, gate=Failing(error), streamer=streamer)
    assert streamer.calls == [PROMPT, generated("llama", "cpu", NEW)[0, 9:10].tolist(), END]


@pytest.mark.parametrize("fails", [1, 2, 4])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_after_an_error_of_its_own(fails: int, error: type[BaseException], llama: PreTrainedModel) -> None:
    streamer = Streamer(fails, error)
    with pytest.raises(error, match="^in put$"):
        decode(llama, None, prompt(), max_new_tokens=NEW, streamer=streamer)
    assert streamer.calls[-1] == END and len(streamer.calls) == fails + 1


def test_an_error_of_end(llama: PreTrainedModel) -> None:
    """Reaches the caller, but not in the place of an earlier one."""
    streamer = Streamer(END)
    with pytest.raises(ZeroDivisionError, match="^in end$"):
        decode(llama, None, prompt(), max_new_tokens=2, streamer=streamer)
    assert streamer.calls.count(END) == 1
    streamer = Streamer(END)
    with pytest.raises(ValueError, match="^in the middle$"):
        decode(llama, None, prompt(), max_new_tokens=NEW, gate=Failing(ValueError), streamer=streamer)
    assert streamer.calls.count(END) == 1


@pytest.mark.parametrize(
    "case", ["argument", "tree", "graphs", "proposer", "generation_config", "positions", "prefill"]
)
def test_nothing_is_put_before_everything_is_checked(
    case: str, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(text: list[int]) -> Any:
        return 3

    def fail(*arguments: Any) -> Any:
        raise ValueError("found in the prompt's forward")

    options: dict[str, Any] = {"max_new_tokens": 4}
    ids = prompt()
    if case == "generation_config":
        monkeypatch.setattr(llama, "generation_config", GenerationConfig(num_beams=2))
    elif case == "positions":
        llama, ids = tiny_model("gpt2"), prompt(length=97)
    elif case == "prefill":
        monkeypatch.setattr("cerberus_ext.target.cache.TreeCache.extend", fail)
    else:
        wrong = {"argument": ("max_new_tokens", -1), "tree": ("tree", 1), "graphs": ("graphs", True)}
        name, value = wrong.get(case, ("proposers", [make]))
        options[name] = value
    streamer = Streamer()
    with pytest.raises((ValueError, TypeError)):
        decode(llama, None, ids, streamer=streamer, **options)
    assert streamer.calls == [END]


def test_a_reader_in_another_thread_does_not_wait(llama: PreTrainedModel) -> None:
    """As with transformers' TextIteratorStreamer."""
    from queue import Queue

    class Reading(Streamer):
        def __init__(self) -> None:
            super().__init__()
            self.queue: Queue[Any] = Queue()

        def put(self, value: Tensor) -> None:
            self.queue.put(value.tolist())

        def end(self) -> None:
            self.queue.put(END)

    streamer, errors = Reading(), []

    def run() -> None:
        try:
            decode(llama, None, prompt(), max_new_tokens=NEW, gate=Failing(ValueError), streamer=streamer)
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    assert list(iter(lambda: streamer.queue.get(timeout=60), END)) == [
        PROMPT,
        generated("llama", "cpu", NEW)[0, 9:10].tolist(),
    ]
    thread.join()
    assert errors == ["in the middle"]


def test_a_wrong_streamer(llama: PreTrainedModel) -> None:
    for wrong in (3, torch.zeros(1)):
        with pytest.raises(TypeError, match="streamer must have put and end"):
            decode(llama, None, prompt(), max_new_tokens=2, streamer=wrong)
