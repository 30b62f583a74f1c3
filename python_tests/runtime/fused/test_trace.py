"""What is left of a trace in the model: nothing."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tiny_families import make_family
from tiny_models import prompt

from cerberus_ext.engine.decode import decode


def test_an_interrupt_leaves_the_model_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch puts them back itself, but not where the interrupt comes between two of its own lines."""
    model = make_family("llama")
    own = dict(model.named_parameters())

    def interrupted(model: Any, tensors: dict[str, Any], *arguments: Any) -> None:
        for path, tensor in tensors.items():
            owner, _, name = path.rpartition(".")
            model.get_submodule(owner)._parameters.pop(name, None)
            setattr(model.get_submodule(owner), name, tensor)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch.func, "functional_call", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decode(model, None, prompt(), max_new_tokens=4)
    assert all(tensor is own[name] for name, tensor in model.named_parameters())
    assert decode(model, None, prompt(), max_new_tokens=4).stats.fused


def test_ctrl_c_waits_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """At any of torch's own lines, it would leave torch's stack of modes as it is."""
    model, real, done = make_family("llama"), torch.func.functional_call, []

    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        done.append(real(*arguments))
        return done[-1]

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process ignores it
    try:
        with monkeypatch.context() as patched:
            patched.setattr(torch.func, "functional_call", interrupted)
            with pytest.raises(KeyboardInterrupt):
                decode(model, None, prompt(), max_new_tokens=4)
        assert len(done) == 1 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert torch._C._len_torch_dispatch_stack() == 0 and not torch.is_inference_mode_enabled()
    finally:
        signal.signal(signal.SIGINT, before)
    assert decode(model, None, prompt(), max_new_tokens=4).stats.fused


def test_in_another_thread() -> None:
    """Where no signal arrives."""
    with ThreadPoolExecutor() as pool:
        assert pool.submit(decode, make_family("llama"), None, prompt(), max_new_tokens=2).result().stats.fused


def test_a_prompt_that_takes_all_positions_is_tried_by_its_beginning() -> None:
    model = make_family("gpt2", n_positions=32)
    for length in (32, 9):
        assert decode(model, None, prompt(length=length), max_new_tokens=1).stats.fused
