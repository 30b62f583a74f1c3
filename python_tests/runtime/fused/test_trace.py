"""What is left of a trace in the model: nothing."""

from __future__ import annotations

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


def test_a_prompt_that_takes_all_positions_is_tried_by_its_beginning() -> None:
    model = make_family("gpt2", n_positions=32)
    for length in (32, 9):
        assert decode(model, None, prompt(length=length), max_new_tokens=1).stats.fused
