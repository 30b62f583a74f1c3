"""While `decode` runs, callbacks and other threads see the model as it was: the same logits, bit for bit."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny_families import make_family
from tiny_models import prompt
from torch import Tensor
from transformers import PreTrainedModel

from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.engine.decode import decode
from cerberus_ext.runtime.runtime import runtime_of
from cerberus_ext.target import swap

NEW = 6
# Named attention, seen call by call; with swapped weights; with windows; with soft caps; with experts; of its own.
FAMILIES = ("llama", "gpt2", "mistral", "gemma2", "mixtral", "gpt_oss", "falcon")
OTHER = prompt(length=12).flip(1)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.inference_mode():
        return model(OTHER).logits


def names(model: PreTrainedModel) -> tuple[Any, ...]:
    return model.config._attn_implementation, getattr(model.config, "_experts_implementation", None)


class Callback:
    """A streamer and a criterion that call `model`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.want, self.names = logits(model), names(model)
        self.calls = 0

    def check(self) -> None:
        assert names(self.model) == self.names
        assert logits(self.model).equal(self.want)
        self.calls += 1

    def put(self, tokens: Tensor) -> None:
        self.check()

    def end(self) -> None:
        self.check()

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.check()
        return torch.zeros(1, dtype=torch.bool)


def sharing(model: PreTrainedModel) -> PreTrainedModel:
    """Another model, of other weights, with the same config object."""
    torch.manual_seed(7)
    other = type(model)(model.config).eval()
    assert other.config is model.config
    return other


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_from_a_streamer_and_a_criterion(family: str, shared: bool) -> None:
    model = make_family(family)
    text = decode(model, None, prompt(), max_new_tokens=NEW).sequences
    callback = Callback(sharing(model) if shared else model)
    out = decode(model, None, prompt(), max_new_tokens=NEW, streamer=callback, stopping_criteria=[callback])
    assert out.sequences.equal(text) and callback.calls == 2 * NEW + 2


def in_a_thread(work: Any) -> None:
    """Runs it there, and raises here what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_from_another_thread_in_the_middle_of_a_step(family: str, shared: bool) -> None:
    """Where the config, and the model's weights, may be switched at that moment."""
    model = make_family(family)
    text = decode(model, None, prompt(), max_new_tokens=NEW).sequences
    other = sharing(model) if shared else model
    want, main, calls = logits(other), threading.get_ident(), []

    def hook(module: torch.nn.Module, *_: Any) -> None:
        if threading.get_ident() == main:
            in_a_thread(lambda: calls.append(logits(other).equal(want)))

    middle = [module for name, module in model.named_modules() if name.endswith(("layers.1", "h.1"))]
    assert len(middle) == 1
    with middle[0].register_forward_pre_hook(hook):
        runtime_of(model).capability()  # with its hook it is another model
        assert len(calls) > 5 and all(calls)
        calls.clear()
        out = decode(model, None, prompt(), max_new_tokens=NEW)
    assert out.sequences.equal(text)
    assert calls == [True] * (1 + out.stats.steps), "the prompt's forward, and every step"


def test_the_hidden_states_are_those_of_the_step() -> None:
    """Not those that another thread's forward of the same model hands to the LM head."""
    model, main, calls = make_family("llama"), threading.get_ident(), []
    tree = StaticPolicy.chain(2).tree

    def step() -> Tensor:
        with torch.inference_mode(), runtime_of(model).target(64) as base:
            base.prefill(prompt())
            return base.step(OTHER[:, :3], tree.on(OTHER.device))[0]

    def hook(module: torch.nn.Module, *_: Any) -> None:
        if threading.get_ident() == main:
            in_a_thread(lambda: calls.append(logits(model)))

    want = step()
    with model.lm_head.register_forward_pre_hook(hook), model.lm_head.register_forward_hook(hook):
        runtime_of(model).capability()  # with its hooks it is another model
        calls.clear()
        assert step().equal(want) and len(calls) == 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "falcon"])
def test_two_threads_decode_models_that_share_a_config(family: str) -> None:
    first = make_family(family)
    second = sharing(first)
    models, before = (first, second), names(first)
    want = [decode(model, None, prompt(), max_new_tokens=40).sequences for model in models]
    assert not want[0].equal(want[1])
    found: list[list[bool]] = [[], []]
    start = threading.Barrier(2)

    def work(index: int) -> None:
        start.wait(timeout=60)
        for _ in range(3):
            out = decode(models[index], None, prompt(), max_new_tokens=40)
            found[index].append(out.sequences.equal(want[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[True] * 3] * 2
    assert names(first) == before


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("where", ["streamer", "hook"])
def test_another_model_is_decoded_by_a_callback(where: str, family: str) -> None:
    model, other = make_family(family), make_family("mistral")
    text = decode(model, None, prompt(), max_new_tokens=NEW).sequences
    want = decode(other, None, prompt(), max_new_tokens=4).sequences
    calls = []

    class Nested(Callback):
        def check(self) -> None:
            calls.append(decode(other, None, prompt(), max_new_tokens=4).sequences.equal(want))

    nested = Nested(model)
    if where == "hook":  # in the middle of a step
        model.base_model.register_forward_pre_hook(lambda *_: nested.check())
    out = decode(model, None, prompt(), max_new_tokens=NEW, streamer=nested if where == "streamer" else None)
    assert out.sequences.equal(text) and len(calls) > 3 and all(calls)


@pytest.mark.parametrize("where", ["__enter__", "__exit__"])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_an_interrupt_on_the_way_into_a_step_or_out_of_it(
    family: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where neither the step's own end, nor the next step, would put the names back."""
    model = make_family(family)
    runtime_of(model).capability()
    before, whole = names(model), getattr(swap.Swap, where)

    def interrupted(self: swap.Swap, *exception: Any) -> None:
        if where == "__enter__" or self._read is not getattr:  # weights are put back by their own
            whole(self, *exception)
        if self._read is getattr:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(swap.Swap, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            decode(model, None, prompt(), max_new_tokens=NEW)
    assert names(model) == before and not swap._inside
