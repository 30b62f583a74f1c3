"""choose_tokens: the noise against published vectors, the choice against the reference and against statistics."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import DTYPES, SIZES, integers, normal

from cerberus_ext import ops
from cerberus_ext.ops import reference
from cerberus_ext.ops.verify import sampling_numbers

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    # The known answers that come with Random123.
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = reference.philox([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
    assert [int(word) for word in words] == expected


def test_gumbel_noise_of_the_first_words():
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    expected = [-math.log(-math.log((word + 0.5) / 2**32)) for word in words]
    noise = reference.gumbel_noise(torch.tensor([0]), 0, 6)[0, :4]
    torch.testing.assert_close(noise, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


@dtypes
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("vocab", [1, 33, 129, 4099])
def test_greedy(rows, vocab, dtype, device):
    """Small whole numbers, so that ties are the rule; the other arguments have no say at temperature 0."""
    logits = integers(-3, 4, rows, vocab).to(device, dtype)
    positions = torch.arange(rows, device=device)
    tokens = ops.choose_tokens(logits, positions, 5, 0.0, 3, 0.5)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, reference.choose_tokens(logits, positions, 5, 0.0, 3, 0.5))
    best = logits.max(-1, keepdim=True).values if rows else logits
    first = torch.where(logits == best, torch.arange(vocab, device=device), vocab).amin(-1)
    assert torch.equal(tokens, first)


@dtypes
@pytest.mark.parametrize(("rows", "vocab"), [*((rows, vocab) for rows in SIZES for vocab in (1, 33, 129)), (5, 4099)])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.9), (20, 0.6), (10000, 0.999)])
def test_sampled(rows, vocab, top_k, top_p, dtype, device):
    """Every drawn token is the reference's: the noise is the same, and near ties within rounding do not occur."""
    logits = normal(rows, vocab, seed=vocab, scale=2.0, dtype=dtype, device=device)
    positions = torch.arange(100, 100 + rows, device=device)
    for seed, temperature in ((0, 1.0), (2**63 - 1, 0.3), (-12345678901234, 3.0)):
        arguments = (logits, positions, seed, temperature, top_k, top_p)
        assert torch.equal(ops.choose_tokens(*arguments), reference.choose_tokens(*arguments))


@dtypes
def test_numbers_on_the_device(dtype, device):
    """They count, and not the arguments; at temperature 0, which is the caller's to say, nothing does."""
    logits = normal(3, 300, scale=2.0, dtype=dtype, device=device)
    positions = torch.arange(3, device=device)
    for numbers in ((-(2**63) + 5, 0.7, 40, 0.9), (3, 2.5, 0, 1.0)):
        expected = ops.choose_tokens(logits, positions, *numbers)
        given = sampling_numbers(*numbers).to(device)
        assert torch.equal(ops.choose_tokens(logits, positions, 1, 1.0, 3, 0.5, given), expected)
        assert torch.equal(ops.choose_tokens(logits, positions, 1, 0.0, 3, 0.5, given), logits.argmax(-1))


def test_position_counts_in_full(device):
    """Positions are 64 bits of the counter: high words tell positions apart, too, and each position gives one token."""
    positions = torch.tensor([0, 1, 2**31, 2**32, 2**32 + 1, 2**40, 0], device=device)
    logits = torch.zeros(7, 4099, device=device)
    tokens = ops.choose_tokens(logits, positions, 3, 1.0, 0, 1.0)
    assert torch.equal(tokens, reference.choose_tokens(logits, positions, 3, 1.0, 0, 1.0))
    assert tokens[0] == tokens[6] and len(set(tokens.tolist())) == 6


def test_seed_counts_in_full(device):
    logits, positions = torch.zeros(1, 4099, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    seeds = [0, 1, -1, 2**32, 2**32 + 1, -(2**63)]
    tokens = [int(ops.choose_tokens(logits, positions, seed, 1.0, 0, 1.0)) for seed in seeds]
    assert tokens == [int(reference.choose_tokens(logits, positions, seed, 1.0, 0, 1.0)) for seed in seeds]
    assert len(set(tokens)) == len(seeds)


def test_noise_near_one(device):
    """A word close to 2^32 must not round u to 1: its noise is 17, not infinite.

    With this seed, position and token the word is 2^32 - 123, which float32 would round to 2^32. A logit that is 40
    above that token's wins.
    """
    seed, position, lucky, vocab = 11, torch.tensor([741]), 36873, 1 << 16
    assert 17.37 < float(reference.gumbel_noise(position, seed, vocab)[0, lucky]) < 17.38
    logits = torch.full((1, vocab), -40.0, device=device)
    logits[0, 5] = 0.0
    assert int(ops.choose_tokens(logits, position.to(device), seed, 1.0, 0, 1.0)) == 5


def _chi_square(logits, temperature, top_k, top_p, draws, device):
    """Pearson's statistic of the drawn tokens against the softmax over the kept ones, and the number of those."""
    vocab = len(logits)
    expected = (logits.double() / temperature).softmax(-1)
    order = expected.argsort(descending=True)
    if top_k:
        expected[order[top_k:]] = 0
        expected /= expected.sum()
    if top_p < 1:
        mass_before = expected[order].cumsum(0) - expected[order]
        expected[order[mass_before >= top_p]] = 0
        expected /= expected.sum()
    rows = logits.to(device).expand(draws, vocab).contiguous()
    tokens = ops.choose_tokens(rows, torch.arange(draws, device=device), 42, temperature, top_k, top_p)
    count = torch.bincount(tokens.cpu(), minlength=vocab).double()
    kept = expected > 0
    assert count[~kept].sum() == 0, "a token was drawn that is not among the kept ones"
    wanted = expected[kept] * draws
    return float(((count[kept] - wanted) ** 2 / wanted).sum()), int(kept.sum())


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 8, 1.0), (1.0, 0, 0.8), (1.0, 12, 0.9)]
)
def test_frequencies_follow_the_softmax(temperature, top_k, top_p, device):
    """Pearson's chi-square over 20000 draws. Seed fixed: this passes always or never.

    Its expectation is n - 1 with variance 2 (n - 1): 4 standard deviations on either side.
    """
    logits = normal(17, seed=9)
    statistic, kept = _chi_square(logits, temperature, top_k, top_p, 20000, device)
    freedom = kept - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_frequencies_notice_a_wrong_temperature(device):
    """The statistic above would see a temperature that is off by a tenth."""
    logits = normal(17, seed=9)
    rows = logits.to(device).expand(20000, 17).contiguous()
    tokens = ops.choose_tokens(rows, torch.arange(20000, device=device), 42, 1.1, 0, 1.0)
    wanted = logits.double().softmax(-1) * 20000
    count = torch.bincount(tokens.cpu(), minlength=17).double()
    assert float(((count - wanted) ** 2 / wanted).sum()) > 16 + 4 * math.sqrt(32)


@dtypes
def test_top_k_keeps_the_lower_of_equal_ids(dtype, device):
    """All equal, top_k 3: only tokens 0, 1, 2 are ever drawn, and each of them is."""
    logits = torch.zeros(200, 129, dtype=dtype, device=device)
    tokens = ops.choose_tokens(logits, torch.arange(200, device=device), 1, 1.0, 3, 1.0)
    assert set(tokens.tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.3, {2}), (0.49, {2}), (0.51, {2, 0}), (0.74, {2, 0}), (0.76, {2, 0, 1}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_fewest(top_p, kept, device):
    """Probabilities 1/4, 1/8, 1/2, 1/8: equal ones join in order of id, and the one that reaches top_p is in."""
    probabilities = torch.tensor([0.25, 0.125, 0.5, 0.125])
    logits = probabilities.log().to(device).expand(400, 4).contiguous()
    tokens = ops.choose_tokens(logits, torch.arange(400, device=device), 1, 1.0, 0, top_p)
    assert set(tokens.tolist()) == kept


def test_top_p_reached_exactly(device):
    """Two equal logits: the first alone has a mass of exactly 1/2, and at least top_p is enough."""
    logits = torch.zeros(100, 2, device=device)
    assert set(ops.choose_tokens(logits, torch.arange(100, device=device), 1, 1.0, 0, 0.5).tolist()) == {0}


def test_top_p_is_taken_after_top_k(device):
    """0.4, 0.3, 0.2, 0.1: of the two best, the first has 0.57 of the mass, so that top_p 0.5 leaves it alone."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().to(device).expand(100, 4).contiguous()
    positions = torch.arange(100, device=device)
    assert set(ops.choose_tokens(logits, positions, 1, 1.0, 2, 0.5).tolist()) == {0}
    assert set(ops.choose_tokens(logits, positions, 1, 1.0, 0, 0.5).tolist()) == {0, 1}


@dtypes
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (2, 1.0), (0, 0.7), (2, 0.7)])
def test_nan_and_infinities(top_k, top_p, temperature, dtype, device):
    nan, inf = math.nan, math.inf
    rows = {
        (nan, nan, nan, nan): {0},
        (nan, 1.0, nan, nan): {1},
        (nan, -inf, nan, -inf): {1} if temperature == 0 else {1, 3},
        (1.0, nan, inf, 2.0): {2},
        (-inf, nan, 3.0, -inf): {2},
        (inf, nan, inf, 0.0): {0} if temperature == 0 else {0, 2},
        (nan, 3.0, 3.0, nan): {1} if temperature == 0 else {1, 2},
    }
    logits = torch.tensor(list(rows), device=device).to(dtype)
    for position in range(20):
        positions = torch.full((len(rows),), position, device=device)
        arguments = (logits, positions, 1, temperature, top_k, top_p)
        tokens = ops.choose_tokens(*arguments)
        assert all(token in allowed for token, allowed in zip(tokens.tolist(), rows.values(), strict=True))
        assert torch.equal(tokens, reference.choose_tokens(*arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_greedy_of_a_large_vocabulary(dtype):
    """Equal logits in different pieces of 2048, zeros of both signs, -inf alone, and NaN in between: the first one."""
    vocab = 3 * 2048 + 5
    places = [0, 1, 15, 16, 63, 64, 2047, 2048, 2111, 4095, 4096, 6143, 6144, vocab - 1]
    low = torch.full((vocab,), -3.0)
    rows, wanted = [], []
    for first in places:
        rows.append(
            low.scatter(0, torch.tensor([first, vocab - 1]), 2.0).scatter(0, torch.tensor([vocab - 2]), math.nan)
        )
        zeros = low.scatter(0, torch.tensor([vocab - 1]), 0.0)
        zeros[first] = -0.0 if first < vocab - 1 else 0.0
        rows.append(zeros)
        nothing = torch.full((vocab,), math.nan)
        nothing[first:] = -math.inf
        rows.append(nothing)
        wanted += [first, first, first]
    logits = torch.stack(rows).to(dtype)
    positions = torch.zeros(len(rows), dtype=torch.int64)
    assert ops.choose_tokens(logits, positions, 0, 0.0, 0, 1.0).tolist() == wanted
