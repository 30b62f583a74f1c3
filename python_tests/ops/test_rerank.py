"""rerank against its reference, and what is no draft."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import DTYPES, assert_close, rerank_inputs
from torch import Tensor

from cerberus_ext import ops
from cerberus_ext.drafting.conditional import conditional_logprobs
from cerberus_ext.ops import reference

NONE = -math.inf
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize(
    ("rows", "heads", "drafts", "rank"),
    [
        (0, 3, 4, 8),
        (1, 1, 4, 8),
        (1, 2, 1, 1),
        (1, 4, 32, 64),
        (3, 2, 7, 33),
        (2, 5, 17, 100),
        (7, 4, 31, 16),
        (1, 4, 3, 64),
    ],
)
def test_rerank(rows, heads, drafts, rank, dtype, device):
    a = rerank_inputs(rows, heads, drafts, rank, dtype=dtype, device=device)
    found = ops.rerank(**a)
    assert found.shape == (rows, heads - 1, drafts, drafts)
    assert_close("rerank", found, reference.rerank(**a), dtype)


def by_hand(device: str = "cpu") -> dict[str, Tensor]:
    """One row, two heads, three drafts of a vocabulary of four: after token 1, token 2 is e^2 times as likely."""
    a = {
        "ids": torch.tensor([[[1, 0, 3], [2, 3, 0]]]),
        "logprobs": torch.tensor([[[0.5, 0.3, 0.1], [0.4, 0.2, 0.2]]]).log(),
        "parents": torch.tensor([[[0.0], [2.0], [0.0], [0.0]]]),
        "children": torch.tensor([[0.0], [0.0], [1.0], [0.0]]),
        "slopes": torch.ones(1),
        "rest": torch.zeros(1),
    }
    return {name: tensor.to(device) for name, tensor in a.items()}


def test_by_hand(device):
    found = ops.rerank(**by_hand(device)).exp().cpu()
    mass = 0.4 * math.exp(2) + 0.6
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([0.4 * math.exp(2) / mass, 0.2 / mass, 0.2 / mass]))
    torch.testing.assert_close(found[0, 0, 1:], torch.tensor([[0.4, 0.2, 0.2]] * 2))


@pytest.mark.parametrize("wrong", [-1, 4, 2**62, -(2**63)])
def test_what_is_no_token(wrong, device):
    """As a draft it is none, and its probability belongs to the rest; after it as a parent the others stay."""
    a = by_hand(device)
    a["ids"][0, :, 0] = wrong
    found = ops.rerank(**a).cpu()
    assert (found[0, 0, :, 0] == NONE).all()
    torch.testing.assert_close(found[0, 0, 0, 1:], torch.tensor([0.2, 0.2]).log())
    torch.testing.assert_close(found.cpu(), reference.rerank(**a).cpu())


@dtypes
@pytest.mark.parametrize("number", [math.nan, math.inf, NONE])
@pytest.mark.parametrize("name", ["logprobs", "parents", "children", "slopes", "rest"])
def test_what_is_no_number(name, number, dtype, device):
    """It never gets further than to what it stands for: a draft without a number is none, and nothing else is NaN."""
    a = rerank_inputs(2, 3, 9, 8, dtype=dtype, device=device)
    a[name].view(-1)[3 if a[name].numel() > 3 else 0] = number
    if name in ("parents", "children"):
        a[name][..., int(a["ids"][0, 1, 2]), 5] = number
    found, expected = ops.rerank(**a), reference.rerank(**a)
    assert not found.isnan().any() and (found <= 1e-5).all()
    assert_close("rerank", found, expected, dtype)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_nothing_but_no_numbers(number, device):
    a = {name: t if t.dtype == torch.int64 else torch.full_like(t, number) for name, t in by_hand(device).items()}
    assert (ops.rerank(**a) == NONE).all()


def test_all_of_the_vocabulary_is_drafted(device):
    """What is left to the rest is never 0."""
    a = by_hand(device)
    a["logprobs"][0, 1] = torch.tensor([0.5, 0.25, 0.25]).log()
    found = ops.rerank(**a)
    assert_close("rerank", found, reference.rerank(**a), torch.float32)
    assert found[0, 0, 1].exp().sum().item() == pytest.approx(1 / 1.0001)


def test_formula_with_a_gradient_is_the_same():
    a = rerank_inputs(3, 4, 9, 16)
    ids, parents = a["ids"], a["parents"]
    rows = parents[torch.arange(3)[:, None], ids[:, :-1]]  # (B, K - 1, P, r)
    found = conditional_logprobs(rows, a["children"][ids[:, 1:]], a["logprobs"][:, 1:], a["slopes"], a["rest"])
    torch.testing.assert_close(found[..., :-1], ops.rerank(**a), rtol=2e-5, atol=2e-5)
