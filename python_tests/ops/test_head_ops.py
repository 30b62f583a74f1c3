"""hidden_entropy, head_stack, draft_topk and linear against their references."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import DTYPES, SIZES, assert_close, integers, normal

from cerberus_ext import ops
from cerberus_ext.ops import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("size", [1, 33, 129, 576])
def test_hidden_entropy(rows, size, dtype, device):
    hidden = normal(rows, size, scale=3.0, dtype=dtype, device=device)
    entropy = ops.hidden_entropy(hidden)
    assert entropy.shape == (rows,)
    assert_close("hidden_entropy", entropy, reference.hidden_entropy(hidden), dtype)


@dtypes
def test_hidden_entropy_extremes(dtype, device):
    """Known without computing: all equal gives log D, one far above the rest gives 0, wherever the values lie."""
    rows = torch.zeros(4, 129)
    rows[1] = 20000.0
    rows[2, 7] = 30000.0
    rows[3] = -30000.0
    rows[3, 128] = -29000.0
    entropy = ops.hidden_entropy(rows.to(device, dtype)).cpu()
    log_size = math.log(129)
    torch.testing.assert_close(entropy, torch.tensor([log_size, log_size, 0.0, 0.0]), rtol=1e-6, atol=1e-6)


@dtypes
@pytest.mark.parametrize("place", [0, 7, 128])
def test_hidden_entropy_of_nan_is_nan(place, dtype, device):
    hidden = normal(2, 129, dtype=dtype, device=device)
    hidden[1, place] = float("nan")
    assert ops.hidden_entropy(hidden).isnan().tolist() == [False, True]


@dtypes
@pytest.mark.parametrize("offset", [1000.0, -1000.0])
def test_hidden_entropy_ignores_an_offset(offset, dtype, device):
    hidden = (integers(-4, 5, 33, 129).float() * 8 + offset).to(device, dtype)  # exact in every dtype
    assert_close("hidden_entropy", ops.hidden_entropy(hidden), reference.hidden_entropy(hidden), dtype)


@dtypes
@pytest.mark.parametrize("chained", [True, False], ids=["chained", "unchained"])
@pytest.mark.parametrize(
    ("rows", "heads", "layers", "size"),
    [
        (0, 4, 2, 33),
        (1, 1, 1, 1),
        (1, 4, 2, 129),
        (1, 4, 2, 576),
        (33, 3, 1, 33),
        (33, 4, 3, 33),
        (129, 2, 2, 129),
        (2, 33, 2, 1),
    ],
)
def test_head_stack(rows, heads, layers, size, chained, dtype, device):
    columns = 2 * size if chained else size
    given = {"dtype": dtype, "device": device}
    hidden = normal(rows, size, seed=1, **given)
    anchor = normal(rows, size, seed=2, **given)
    weight = normal(layers, heads, size, columns, seed=3, scale=columns**-0.5, **given)
    bias = normal(layers, heads, size, seed=4, **given)
    states = ops.head_stack(hidden, anchor, weight, bias)
    assert_close("head_stack", states, reference.head_stack(hidden, anchor, weight, bias), dtype)


def test_head_stack_by_hand(device):
    """Two heads, two layers, size 1; weights chosen so that every term of the formula is seen.

    silu(x) is x for 20 and more and 0 for -20 and less, to float32.
    """
    hidden, anchor = torch.tensor([[100.0]]), torch.tensor([[1000.0]])
    # (layer, head): the multiples of x and of the neighbour
    weight = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]], [[[0.0, 2.0]], [[1.0, 3.0]]]])
    bias = torch.tensor([[[0.0], [-1100.0]], [[7.0], [0.5]]])
    # layer 1: head 1: 100 + 1 * 100 = 200; head 2: 1000 - 1100 = -100 -> silu 0 -> stays 100
    # layer 2: head 1: 200 + (2 * 1000 + 7) = 2207; head 2: 100 + (1 * 100 + 3 * 200 + 0.5) = 800.5
    states = ops.head_stack(*(t.to(device) for t in (hidden, anchor, weight, bias)))
    assert states.flatten().tolist() == [2207.0, 800.5]


@dtypes
def test_head_stack_far_from_zero(dtype, device):
    """silu where exp(-x) leaves float32: it goes to 0 on one side and to x on the other, and NaN stays NaN."""
    before = [-30000.0, -1000.0, -200.0, -100.0, -90.0, -89.0, -88.5, -88.0, -80.0, -20.0, 80.0, 88.0, 100.0, 30000.0]
    bias = torch.tensor([[[*before, float("nan")]]]).to(device, dtype)
    size = bias.shape[-1]
    zeros = torch.zeros(1, size, dtype=dtype, device=device)
    weight = torch.zeros(1, 1, size, 2 * size, dtype=dtype, device=device)
    states = ops.head_stack(zeros, zeros, weight, bias).flatten()
    assert states[-1].isnan()
    expected = reference.head_stack(zeros, zeros, weight, bias).flatten()
    assert_close("head_stack", states[:-1], expected[:-1], dtype)


@dtypes
def test_head_stack_untrained_is_hidden(dtype, device):
    """Zero weights and biases: every head's state is the hidden state itself, bit for bit."""
    hidden = normal(3, 33, dtype=dtype, device=device)
    zeros = torch.zeros(2, 4, 33, 66, dtype=dtype, device=device)
    states = ops.head_stack(hidden, hidden, zeros, zeros[..., 0].contiguous())
    assert torch.equal(states, hidden[:, None].expand(3, 4, 33))


TOPK_SIZES = [
    # rows, heads, size, vocab, drafts
    (0, 4, 33, 129, 3),
    (1, 1, 1, 1, 1),
    (1, 4, 129, 1025, 8),
    (33, 1, 33, 33, 32),
    (129, 1, 33, 129, 2),
    (2, 3, 576, 257, 10),
    (1, 2, 1, 32, 32),
]


@dtypes
@pytest.mark.parametrize(("rows", "heads", "size", "vocab", "drafts"), TOPK_SIZES)
def test_draft_topk(rows, heads, size, vocab, drafts, dtype, device):
    states = normal(rows, heads, size, seed=1, dtype=dtype, device=device)
    projection = normal(vocab, size, seed=2, dtype=dtype, scale=4 * size**-0.5, device=device)
    ids, logprobs = ops.draft_topk(states, projection, drafts)
    assert ids.dtype == torch.int64 and ids.shape == logprobs.shape == (rows, heads, drafts)
    assert ids.numel() == 0 or (ids.sort(-1).values.diff(dim=-1) > 0).all(), "a token twice"
    # Tokens whose logits differ by less than float32 rounding may change places: compare what each id is worth.
    every = (states.double() @ projection.double().T).log_softmax(-1).float()
    assert_close("draft_topk", every.gather(-1, ids), logprobs, dtype)
    assert_close("draft_topk", logprobs, reference.draft_topk(states, projection, drafts)[1], dtype)


@dtypes
@pytest.mark.parametrize(("rows", "heads", "size", "vocab", "drafts"), TOPK_SIZES)
def test_draft_topk_ids_are_exact(rows, heads, size, vocab, drafts, dtype, device):
    """Small whole numbers: logits are exact in float32 and full of ties, so that every id is determined."""
    states = integers(-2, 3, rows, heads, size, seed=3).to(device, dtype)
    projection = integers(-2, 3, vocab, size, seed=4).to(device, dtype)
    ids, logprobs = ops.draft_topk(states, projection, drafts)
    expected_ids, expected_logprobs = reference.draft_topk(states, projection, drafts)
    assert torch.equal(ids, expected_ids)
    assert_close("draft_topk", logprobs, expected_logprobs, dtype)


@dtypes
def test_draft_topk_ties_go_to_the_lowest_id(dtype, device):
    states = torch.zeros(2, 2, 33, dtype=dtype, device=device)
    ids, logprobs = ops.draft_topk(states, normal(1000, 33, dtype=dtype, device=device), 32)
    assert torch.equal(ids.cpu(), torch.arange(32).expand(2, 2, 32))
    torch.testing.assert_close(logprobs.cpu(), torch.full((2, 2, 32), -math.log(1000)), rtol=1e-6, atol=0)


@dtypes
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("order", ["rising", "falling", "equal", "all alike"])
def test_draft_topk_of_many_parts(order, threads, dtype):
    """What a part leaves out because of another one is in no list of the best: logits that rise and fall, and ties.

    Ten parts of the vocabulary; 0 to 49, 100 or 1 different logits.
    """
    vocab, drafts = 5000, 32
    logits = {
        "rising": torch.arange(vocab) // 100,
        "falling": (vocab - 1 - torch.arange(vocab)) // 100,
        "equal": torch.arange(vocab) * 37 % 100,
        "all alike": torch.zeros(vocab, dtype=torch.int64),
    }[order]
    projection = torch.stack([logits, logits * 0 + 1], 1).to(dtype)
    states = torch.tensor([[[1.0, 0.0], [-1.0, 3.0], [0.0, 1.0]]], dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        got = ops.draft_topk(states, projection, drafts)
    finally:
        torch.set_num_threads(before)
    wanted = reference.draft_topk(states, projection, drafts)
    assert torch.equal(got[0], wanted[0])
    assert_close("draft_topk", got[1], wanted[1], dtype)


@dtypes
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize(("size", "outputs"), [(0, 5), (33, 0), (1, 1), (33, 129), (129, 33), (576, 65)])
def test_linear(rows, size, outputs, with_bias, dtype):
    input = normal(rows, size, seed=1, dtype=dtype)
    weight = normal(outputs, size, seed=2, scale=max(size, 1) ** -0.5, dtype=dtype)
    bias = normal(outputs, seed=3, dtype=dtype) if with_bias else None
    assert_close("linear", ops.linear(input, weight, bias), reference.linear(input, weight, bias), dtype)


@dtypes
def test_linear_adds_the_bias_before_rounding(dtype):
    """1 + 2^-9 - 1: rounding the product first would lose the 2^-9 in bfloat16."""
    input = torch.tensor([[1.0, 2**-9]], dtype=dtype)
    got = ops.linear(input, torch.ones(3, 2, dtype=dtype), torch.full((3,), -1.0, dtype=dtype))
    assert got.tolist() == [[2**-9] * 3]


@dtypes
@pytest.mark.parametrize("outputs", [1, 2, 3, 24, 25])
def test_linear_rounds_to_nearest_even(outputs, dtype):
    """Products of one element each, of any bits: subnormal, infinite and not a number among them.

    The processors' bfloat16 instructions take subnormal inputs and results for zeros.
    """
    flushes = dtype is torch.bfloat16 and torch.ops.cerberus_ext.cpu_isa() in ("avx512_bf16", "amx_bf16")

    def kept(x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(x.abs() < 2.0**-126, 0) if flushes else x

    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    limits = torch.iinfo(bits)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(limits.min, limits.max, (67 + outputs, 1), generator=generator, dtype=bits).view(dtype)
    input, weight = factors[:67], factors[67:]
    expected = kept(kept(input.float()) * kept(weight.float()).T).to(dtype)
    torch.testing.assert_close(ops.linear(input, weight, None), expected, rtol=0, atol=0, equal_nan=True)
