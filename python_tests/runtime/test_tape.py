"""The recorder of these tests does what a CUDA graph does: the same again, on the same memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tape import CaptureError, Tape


def test_repeats_with_the_numbers_of_the_recording() -> None:
    x, total, length = torch.tensor([1.0, 2.0]), torch.zeros(1), 3
    with torch.inference_mode(), Tape() as tape:
        doubled = x * length
        total += doubled[1:].view(1)
    assert doubled.tolist() == [3, 6] and total.tolist() == [6]
    length = 100  # not seen: it is the host's
    x.copy_(torch.tensor([10.0, 20.0]))  # seen: it is in the memory that was recorded
    with torch.inference_mode():
        tape.replay()
    assert doubled.tolist() == [30, 60] and total.tolist() == [66] and length == 100


def test_writes_through_views_and_ops_without_results() -> None:
    keys = torch.zeros(1, 1, 4, 2)
    new, length = torch.ones(1, 1, 1, 2), torch.tensor([1])
    with torch.inference_mode(), Tape() as tape:
        torch.ops.cerberus_ext.write_cache(keys, keys.clone(), new, new, length)
        length.add_(1)
        keys.transpose(2, 3)[..., 0].fill_(7)
    with torch.inference_mode():
        tape.replay()
    assert keys[0, 0, :, 0].tolist() == [7, 1, 1, 0] and length.tolist() == [3]


REFUSED = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x[0] > 0),
    "equal": lambda x: torch.equal(x, x + 1),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x[x > 0],
    "unique": lambda x: x.unique(),
    "constant": lambda x: x + torch.tensor([1.0, 2.0]),
    "list as index": lambda x: x[[0, 1]],
    "iterating": lambda x: [float(value) for value in x],
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("inference", [True, False])
def test_refuses_what_makes_the_host_wait(what: str, inference: bool) -> None:
    x = torch.tensor([1.0, 2.0])
    with torch.inference_mode(inference), pytest.raises(CaptureError, match="not permitted"), Tape():
        REFUSED[what](x)


def test_allows_what_stays_on_the_device() -> None:
    x, places = torch.tensor([1.0, 2.0]), torch.tensor([1, 0])
    steps: list[Any] = [lambda: x[places], lambda: x.index_select(0, places), lambda: torch.arange(3) + places[:1]]
    with torch.inference_mode(), Tape():
        for step in steps:
            step()
