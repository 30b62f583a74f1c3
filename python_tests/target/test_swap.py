"""Steps that run at once, with weights of their own in the place of the model's: the model has its own back."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

from cerberus_ext.target.row_invariant import InvariantWeight, step_forward
from cerberus_ext.target.swap import weight_swap


class Waiting(nn.Module):
    """Says that it runs, and goes on when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.runs, self.may_go = threading.Event(), threading.Event()

    def forward(self, input: Tensor) -> Tensor:
        self.runs.set()
        assert self.may_go.wait(60)
        return input


@pytest.mark.parametrize("first_ends_first", [True, False])
def test_steps_at_once_of_models_that_share_a_module(first_ends_first: bool) -> None:
    shared = nn.Linear(8, 8)
    own = shared.weight
    models = [nn.Sequential(Waiting(), shared) for _ in range(2)]
    outputs: list[Tensor | None] = [None, None]

    def run(index: int) -> None:
        with torch.inference_mode():
            outputs[index] = step_forward(models[index], None)(input=torch.ones(1, 8))

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread, model in zip(threads, models, strict=True):
        thread.start()
        assert model[0].runs.wait(60)
        assert type(shared.weight) is InvariantWeight
    for index in (0, 1) if first_ends_first else (1, 0):
        models[index][0].may_go.set()
        threads[index].join(60)
    assert shared.weight is own
    assert outputs[0] is not None and outputs[1] is not None and outputs[0].equal(outputs[1])
    torch.testing.assert_close(outputs[0], shared(torch.ones(1, 8)))


def test_an_error_inside() -> None:
    linear = nn.Linear(4, 4)
    own = linear.weight
    with pytest.raises(KeyboardInterrupt), weight_swap(linear, {"weight": torch.zeros(4, 4)}):
        assert linear.weight is not own
        raise KeyboardInterrupt
    assert linear.weight is own


def test_an_interrupt_on_the_way_in() -> None:
    class Interrupted(dict[str, nn.Parameter]):
        def __setitem__(self, name: str, value: nn.Parameter) -> None:
            if not isinstance(value, nn.Parameter):
                raise KeyboardInterrupt
            super().__setitem__(name, value)

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    own = [linear.weight for linear in model]
    model[1]._parameters = Interrupted(model[1]._parameters)
    with pytest.raises(KeyboardInterrupt), weight_swap(model, {f"{i}.weight": torch.zeros(4, 4) for i in (0, 1)}):
        raise AssertionError
    assert all(linear.weight is weight for linear, weight in zip(model, own, strict=True))
    model[1]._parameters = dict(model[1]._parameters)
    with weight_swap(model, {f"{i}.weight": torch.zeros(4, 4) for i in (0, 1)}):
        assert all(linear.weight is not weight for linear, weight in zip(model, own, strict=True))
