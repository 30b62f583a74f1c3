"""activation: within half a unit of its dtype of the reference, and the same bits wherever an element lies."""

from __future__ import annotations

import math

import pytest
import torch
from op_cases import DTYPES, assert_close, assert_same_bits, normal
from torch import Tensor

from cerberus_ext import ops
from cerberus_ext.ops import reference

KINDS = ("silu", "gelu", "gelu_tanh", "tanh", "sigmoid", "exp", "erf", "softplus", "cos", "sin")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
kinds = pytest.mark.parametrize("kind", KINDS)


def units_off(got: Tensor, wanted: Tensor) -> Tensor:
    """How many units in the last place of its dtype `got` lies from wanted (float64). Infinity equals itself only."""
    info = torch.finfo(got.dtype)
    exponent = wanted.abs().clamp(info.tiny, info.max).log2().floor()
    rounded = wanted.to(got.dtype)
    same = (got == rounded) | (got.isnan() & wanted.isnan())
    off = (got.double() - wanted).abs() / (torch.exp2(exponent) * info.eps)
    return off.masked_fill(same & ~rounded.isfinite(), 0.0)


@kinds
def test_error(kind):
    """All exponents and signs, and densely where the functions bend: 0.501 units, 0.561 of libm's cos and sin."""
    every = torch.arange(-(2**31), 2**31, 21_001).int().view(torch.float32)
    x = torch.cat([every, torch.linspace(-20, 20, 200_001), torch.linspace(-105, 105, 100_001)])
    if kind in ("cos", "sin"):
        x = x[~(x.abs() > 2**20)]
    got, wanted = ops.activation(x, kind), reference._ACTIVATIONS[kind](x.double())
    assert torch.equal(got.isnan(), wanted.isnan())
    assert units_off(got, wanted).max() < (0.57 if kind in ("cos", "sin") else 0.5011)
    assert torch.equal(got.signbit()[got == 0], wanted.float().signbit()[got == 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@kinds
def test_error_of_16_bits(kind, dtype):
    """Every number there is: computed in float32, a result is off by hardly more than its own rounding (0.5002)."""
    x = torch.arange(-(2**15), 2**15).short().view(dtype)
    if kind in ("cos", "sin"):
        x = x[~(x.abs() > 2**20)]
    got, wanted = ops.activation(x, kind), reference._ACTIVATIONS[kind](x.double())
    assert torch.equal(got.isnan(), wanted.isnan())
    assert units_off(got, wanted).max() < 0.5003
    assert torch.equal(got.signbit()[got == 0], wanted.to(dtype).signbit()[got == 0])


@kinds
def test_special_values(kind):
    """What torch's own function gives in float64, written out."""
    inf, nan, e = math.inf, math.nan, math.e
    tiny = 2.0**-149
    x = torch.tensor([0.0, -0.0, inf, -inf, nan, 3e38, -3e38, tiny, -tiny, 1.0])
    expected = {
        "silu": [0.0, -0.0, inf, nan, nan, 3e38, -0.0, 0.0, -0.0, e / (1 + e)],
        "gelu": [0.0, -0.0, inf, nan, nan, 3e38, -0.0, 0.0, -0.0, 0.8413447460685429],
        "gelu_tanh": [0.0, -0.0, inf, nan, nan, 3e38, -0.0, 0.0, -0.0, 0.8411919906082768],
        "tanh": [0.0, -0.0, 1.0, -1.0, nan, 1.0, -1.0, tiny, -tiny, math.tanh(1.0)],
        "sigmoid": [0.5, 0.5, 1.0, 0.0, nan, 1.0, 0.0, 0.5, 0.5, e / (1 + e)],
        "exp": [1.0, 1.0, inf, 0.0, nan, inf, 0.0, 1.0, 1.0, e],
        "erf": [0.0, -0.0, 1.0, -1.0, nan, 1.0, -1.0, tiny, -tiny, math.erf(1.0)],
        "softplus": [math.log(2), math.log(2), inf, 0.0, nan, 3e38, 0.0, math.log(2), math.log(2), math.log1p(e)],
        "cos": [1.0, 1.0, nan, nan, nan, None, None, 1.0, 1.0, math.cos(1.0)],
        "sin": [0.0, -0.0, nan, nan, nan, None, None, tiny, -tiny, math.sin(1.0)],
    }[kind]
    known = torch.tensor([value is not None for value in expected])
    wanted = torch.tensor([value if value is not None else 0.0 for value in expected])
    if kind in ("silu", "gelu", "gelu_tanh"):  # half of the smallest number is a tie, which goes to 0
        assert ops.activation(x, kind)[7:9].tolist() == [0.0, -0.0]
    assert_same_bits(canonical(ops.activation(x, kind)[known]), canonical(wanted[known]))


def canonical(x: Tensor) -> Tensor:
    """Every NaN the same."""
    return x.masked_fill(x.isnan(), math.nan)


@dtypes
@kinds
@pytest.mark.parametrize("size", [0, 1, 33, 129, 5000])
def test_sizes(size, kind, dtype):
    x = normal(size, scale=4.0, dtype=dtype)
    assert_close("activation", ops.activation(x, kind), reference.activation(x, kind), dtype)


@dtypes
@pytest.mark.parametrize("shape", [(), (3, 0, 5), (2, 3, 4, 5), (1,) * 9 + (7,)], ids=str)
def test_shapes(shape, dtype):
    x = normal(*shape, dtype=dtype)
    got = ops.activation(x, "silu")
    assert (
        got.shape == x.shape
        and got.dtype is dtype
        and got.is_contiguous()
        and got.data_ptr() != x.data_ptr()
        or not x.numel()
    )
    assert_close("activation", got, reference.activation(x, "silu"), dtype)


@dtypes
@kinds
def test_bits_do_not_depend_on_the_place(kind, dtype):
    """Slices from every offset of a vector, of every length up to several, and several tasks on 1 to 3 threads."""
    x = normal(9001, seed=2, scale=3.0, dtype=dtype)
    whole = ops.activation(x, kind)
    for offset in range(67):
        for length in (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 257):
            assert_same_bits(ops.activation(x[offset : offset + length], kind), whole[offset : offset + length])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for offset in (0, 1, 13, 4095, 4096):
                assert_same_bits(ops.activation(x[offset:], kind), whole[offset:])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["", "Silu", "relu", "silu "])
def test_unknown_kind(kind):
    with pytest.raises(RuntimeError, match=f"activation: kind must be one of {', '.join(KINDS)}, got {kind}"):
        ops.activation(torch.zeros(3), kind)


def test_kinds_of_the_reference():
    assert tuple(reference._ACTIVATIONS) == KINDS
