"""draft_topk: the CUDA kernels under emulation against the reference."""

import math

import pytest
import torch
from op_cases import DTYPES, assert_close, assert_same_bits, integers, normal

from cerberus_ext.ops import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random(rows, heads, size, vocab, dtype):
    states = normal(rows, heads, size, seed=1, dtype=dtype)
    return states, normal(vocab, size, seed=2, dtype=dtype, scale=4 * size**-0.5)


def exact(rows, heads, size, vocab, dtype):
    """Small whole numbers: logits are exact in float32 and full of ties, so that every id is determined."""
    states = integers(-2, 3, rows, heads, size, seed=3).to(dtype)
    return states, integers(-2, 3, vocab, size, seed=4).to(dtype)


def check_exact(simt, states, projection, drafts, offset=0):
    ids, logprobs = simt("draft_topk", states, projection, drafts, offset=offset)
    expected_ids, expected_logprobs = reference.draft_topk(states, projection, drafts)
    assert torch.equal(ids, expected_ids)
    assert_close("draft_topk", logprobs, expected_logprobs, states.dtype)


@dtypes
@pytest.mark.parametrize(
    ("rows", "heads", "size", "vocab", "drafts"),
    [
        (0, 4, 16, 33, 3),
        (1, 1, 1, 1, 1),
        (1, 4, 33, 65, 5),
        (3, 3, 7, 31, 2),
        (1, 1, 8, 129, 32),
        (1, 2, 72, 33, 32),
        (1, 3, 264, 40, 4),
        (1, 4, 16, 700, 10),
        (2, 4, 32, 100, 10),
        (17, 1, 16, 64, 3),
        (11, 3, 8, 47, 1),
        (35, 2, 24, 17, 16),
    ],
)
def test_sizes(rows, heads, size, vocab, drafts, dtype, simt):
    states, projection = random(rows, heads, size, vocab, dtype)
    ids, logprobs = simt("draft_topk", states, projection, drafts)
    assert ids.dtype == torch.int64 and ids.shape == logprobs.shape == (rows, heads, drafts)
    assert ids.numel() == 0 or (ids.sort(-1).values.diff(dim=-1) > 0).all(), "a token twice"
    # Tokens whose logits differ by less than float32 rounding may change places: compare what each id is worth.
    every = (states.double() @ projection.double().T).log_softmax(-1).float()
    assert_close("draft_topk", every.gather(-1, ids), logprobs, dtype)
    assert_close("draft_topk", logprobs, reference.draft_topk(states, projection, drafts)[1], dtype)


@dtypes
@pytest.mark.parametrize(
    ("rows", "heads", "size", "vocab", "drafts"),
    [
        (1, 1, 8, 5, 3),
        (1, 4, 40, 15, 15),
        (1, 2, 9, 16, 10),
        (2, 1, 64, 129, 32),
        (1, 3, 136, 257, 8),
        (5, 4, 16, 48, 10),
        (33, 1, 32, 33, 3),
    ],
)
def test_ids_are_exact(rows, heads, size, vocab, drafts, dtype, simt):
    check_exact(simt, *exact(rows, heads, size, vocab, dtype), drafts)


@dtypes
@pytest.mark.parametrize("heads", [1, 9])
def test_unaligned(heads, dtype, simt):
    check_exact(simt, *exact(1, heads, 16, 50, dtype), 4, offset=1)


@dtypes
@pytest.mark.parametrize("device", [(1, 1), (2, 1), (150, 1)], ids=str)
def test_devices(device, dtype, simt):
    """Few parts, of several rounds each, and more than the merge has threads."""
    simt.device(*device)
    vocab = 257 * 16 if device[0] == 150 and dtype == torch.bfloat16 else 300
    check_exact(simt, *exact(1, 1, 8, vocab, dtype), 7)


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize("heads", [1, 18])
@pytest.mark.parametrize("schedule", range(3))
def test_schedules(schedule, heads, dtype, simt):
    simt.seed(schedule)
    check_exact(simt, *exact(1, heads, 32, 90, dtype), 6)


@pytest.mark.parametrize("schedule", range(6))
def test_code_that_cannot_wait_does_not_overlap(schedule, simt):
    """Compiled for 8.0 alone, whatever device it runs on."""
    simt.device(ptx_version=80)
    simt.seed(schedule)
    check_exact(simt, *exact(1, 4, 32, 90, torch.float32), 6)


@dtypes
@pytest.mark.parametrize("size", [32, 9])
def test_rows_are_computed_alike(size, dtype, simt):
    """Bit for bit, whatever the other rows are and however many."""
    states, projection = random(70, 1, size, 90, dtype)
    all_ids, all_logprobs = simt("draft_topk", states, projection, 5)
    for rows in (slice(69, 70), slice(5, 14), slice(3, 29)):
        ids, logprobs = simt("draft_topk", states[rows].contiguous(), projection, 5)
        assert torch.equal(ids, all_ids[rows])
        assert_same_bits(logprobs, all_logprobs[rows])


@dtypes
@pytest.mark.parametrize("order", ["rising", "falling", "one part", "equal"])
def test_orders(order, dtype, simt):
    """The vocabulary in the worst order for whoever keeps the best seen so far; all of the best in one part; ties."""
    vocab = 200
    logits = torch.arange(vocab) / 4.0
    if order == "falling":
        logits = logits.flip(0)
    elif order == "one part":
        logits[140:] -= 50.0
    elif order == "equal":
        logits[:] = 1.0
    projection = torch.zeros(vocab, 8, dtype=dtype)
    projection[:, 3] = logits.to(dtype)
    states = torch.zeros(1, 2, 8, dtype=dtype)
    states[0, :, 3] = torch.tensor([1.0, -0.5])
    check_exact(simt, states, projection, 10)


@dtypes
@pytest.mark.parametrize("heads", [1, 4])
def test_nan_is_a_valid_call(heads, dtype, simt):
    """A state that is not a number: valid ids all the same, each once."""
    states, projection = exact(1, heads, 16, 50, dtype)
    states[0, 0] = math.nan
    ids, logprobs = simt("draft_topk", states, projection, 5)
    assert ids.min() >= 0 and ids.max() < 50 and (ids.sort(-1).values.diff(dim=-1) > 0).all()
    assert logprobs[0, 0].isnan().all() and not logprobs[0, 1:].isnan().any()


@dtypes
def test_a_logit_that_is_not_a_number_is_the_worst(dtype, simt):
    states, projection = exact(1, 2, 16, 50, dtype)
    ids, _ = reference.draft_topk(states, projection, 6)
    projection[40] = math.nan
    expected = [[token for token in head if token != 40][:5] for head in ids[0].tolist()]
    got, logprobs = simt("draft_topk", states, projection, 5)
    assert got[0].tolist() == expected
    assert logprobs.isnan().all()


@dtypes
def test_a_token_that_cannot_be(dtype, simt):
    """Logits of -inf have probability 0 and come last, the lowest ids first."""
    states, projection = torch.ones(1, 1, 16, dtype=dtype), torch.zeros(20, 16, dtype=dtype)
    projection[2:17, 5] = -math.inf
    ids, logprobs = simt("draft_topk", states, projection, 7)
    assert ids.flatten().tolist() == [0, 1, 17, 18, 19, 2, 3]
    expected = torch.tensor([-math.log(5)] * 5 + [-math.inf] * 2)
    torch.testing.assert_close(logprobs.flatten(), expected, rtol=1e-6, atol=0)
