"""Drafting by weights in eight bits, against plain PyTorch with the same rounded weights."""

from __future__ import annotations

import pytest
import torch
from eight_bits import through_eight_bits
from torch import Tensor

from cerberus_ext.ops import reference
from cerberus_ext.ops.draft import draft, eight_bit_linear, in_eight_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # rows lose a little, too


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "outputs", "size"), [(0, 5, 4), (1, 1, 1), (2, 16, 2), (3, 17, 33), (9, 40, 129)])
def test_products(rows: int, outputs: int, size: int, dtype: torch.dtype) -> None:
    """With weights that are so many steps exactly: those in between may be rounded either way."""
    steps = normal(outputs, size).mul(40).round().clamp(-127, 127)
    steps[:, -1] = 127
    weight, x = (steps / 64).to(dtype), normal(rows, size, seed=1).to(dtype)
    got = eight_bit_linear(x, in_eight_bits(weight), outputs)
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE[dtype] / 3, atol=TOLERANCE[dtype] * size**0.5 / 9)


def test_sums_are_exact() -> None:
    """Large terms of both signs, small ones between: whatever the order, nothing is lost; nor do sums overflow."""
    size = 9000
    x, weight = torch.zeros(1, size), torch.zeros(1, size)
    x[0, 0], x[0, 1::2], weight[0, 0] = 127.0, 1.0, 1.0
    weight[0, 1::2] = torch.where(torch.arange(size // 2) % 2 == 0, 127.0, -127.0)
    assert eight_bit_linear(x, in_eight_bits(weight), 1).item() == pytest.approx(127, rel=1e-2)
    largest = torch.full((1, size), 127.0)
    assert eight_bit_linear(largest, in_eight_bits(largest), 1).item() == pytest.approx(127.0**2 * size, rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    weight, x = in_eight_bits(normal(70, 96).to(dtype)), normal(41, 96, seed=1).to(dtype)
    together = eight_bit_linear(x, weight, 70)
    for first, last in ((0, 1), (1, 3), (3, 12), (12, 41)):
        assert eight_bit_linear(x[first:last].contiguous(), weight, 70).equal(together[first:last])


def test_rows_of_zeros_tiny_numbers_and_none() -> None:
    weight = torch.stack(
        [torch.zeros(8), torch.full((8,), 1e-40), torch.full((8,), 0.5), torch.tensor([torch.inf] * 8)]
    )
    packed = in_eight_bits(weight)
    got = eight_bit_linear(torch.tensor([[1.0] * 8, [0.0] * 8, [1e-42] * 8, [torch.nan] * 8]), packed, 4)
    assert got[:3, :2].eq(0).all() and got[0, 2].item() == pytest.approx(4, rel=1e-3) and got[1:3, 2].eq(0).all()
    assert got[3].isnan().all() and got[:, 3].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize(("batch", "size", "vocab", "drafts"), [(1, 96, 1100, 7), (3, 33, 129, 5), (2, 17, 40, 32)])
def test_drafts(batch: int, size: int, vocab: int, drafts: int, chained: bool, dtype: torch.dtype) -> None:
    layers, heads = 2, 3
    hidden, embeddings = normal(batch, size).to(dtype), normal(vocab + 3, size, seed=1).to(dtype)
    stack = normal(layers, heads, size, size * (1 + chained), scale=0.3 / size**0.5, seed=2).to(dtype)
    bias, projection = normal(layers, heads, size, scale=0.1).to(dtype), normal(vocab, size, scale=size**-0.5).to(dtype)
    pending, scale = torch.arange(batch) * 5, torch.tensor(0.7).to(dtype)
    vocabulary = torch.arange(vocab) + 3
    parts = in_eight_bits(stack), bias, in_eight_bits(projection), vocab
    ids, logprobs = draft(hidden, pending, embeddings, scale, *parts, vocabulary, drafts)

    anchor = embeddings[pending] * scale
    states = reference.head_stack(hidden.float(), anchor.float(), through_eight_bits(stack), bias.float())
    logits = states.double() @ through_eight_bits(projection).double().T
    expected = logits.log_softmax(-1)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(logprobs.double(), expected.topk(drafts).values, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(logprobs.double(), expected.gather(-1, ids - 3), rtol=tolerance, atol=tolerance)
    alone, _ = draft(hidden[:1], pending[:1], embeddings, None, *parts, None, drafts)
    assert alone.equal(draft(hidden, pending, embeddings, None, *parts, None, drafts)[0][:1])


def test_drafts_that_are_none() -> None:
    parts = in_eight_bits(torch.zeros(1, 1, 4, 8)), torch.zeros(1, 1, 4), in_eight_bits(torch.eye(4)), 4
    hidden, embeddings, pending = torch.full((1, 4), torch.nan), torch.zeros(5, 4), torch.tensor([99])
    ids, logprobs = draft(hidden, pending, embeddings, torch.ones(()), *parts, torch.arange(4), 2)
    assert ids.eq(-1).all() and not logprobs.isfinite().any()


def test_refused() -> None:
    packed, x = in_eight_bits(torch.ones(3, 4)), torch.ones(2, 4)
    with pytest.raises(RuntimeError, match=r"eight_bit_linear: weight must be \(n,\) = "):
        eight_bit_linear(x, packed, 17)
    with pytest.raises(RuntimeError, match="eight_bit_linear: weight must be torch.int16"):
        eight_bit_linear(x, torch.ones(3), 3)
    with pytest.raises(RuntimeError, match="eight_bit_linear: input must be contiguous"):
        eight_bit_linear(torch.ones(4, 2).T, packed, 3)
    stack, bias = in_eight_bits(torch.ones(1, 1, 4, 8)), torch.ones(1, 1, 4)
    good = [x, torch.zeros(2, dtype=torch.int64), torch.ones(5, 4), torch.ones(()), stack, bias, packed, 3, None, 2]
    draft(*good)  # type: ignore[arg-type]
    for place, wrong, message in (
        (0, x.double(), "hidden must be torch.float32, torch.bfloat16 or torch.float16"),
        (1, torch.zeros(3, dtype=torch.int64), r"pending must be \(B,\) = \(2,\)"),
        (2, torch.ones(5, 3), r"embeddings must be \(V, D\)"),
        (3, torch.ones(1), r"anchor_scale must be \(\)"),
        (4, stack[:-1], r"stack must be \(n,\)"),
        (5, bias.half(), "bias must be torch.float32 like hidden"),
        (6, packed[1:], r"projection must be \(n,\)"),
        (7, 0, "vocab must be 1 to"),
        (8, torch.arange(4), r"vocabulary must be \(Vd,\)"),
        (9, 4, "ids must be"),
    ):
        with pytest.raises(RuntimeError, match=f"^draft: {message}"):
            draft(*good[:place], wrong, *good[place + 1 :])  # type: ignore[arg-type]
