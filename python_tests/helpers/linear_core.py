"""linear and grouped_linear: rows that depend on nothing but themselves, with sums in which every order shows.

Quick enough to be run for each set of kernels, see op_core.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from op_cases import DTYPES, assert_close, assert_same_bits, normal
from torch import Tensor

from cerberus_ext import ops
from cerberus_ext.ops import reference

SIZES = (1, 33, 129, 575)
OUTPUTS = 131  # no multiple of any tile
ROWS = 70
# Where many rows are multiplied a block of k at a time: the largest block of every level, and one k more.
BLOCKS = (767, 768, 769, 1024, 1025, 1537, 2049, 3073)


def cancelling(rows: int, outputs: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """input (rows, size), weight (outputs, size) whose products sum to little: of two large terms anywhere one takes
    away what the other adds, in every sum at once, and small terms stand between them. What float32 loses on the way
    is as large as the sum, so that even eight bits of it tell one order of summation from another."""
    generator = torch.Generator().manual_seed(0)

    def wide(*shape: int) -> Tensor:  # of very different size: products of 16 bits each would add up exactly
        return torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-6, 10, shape, generator=generator)

    input, weight = wide(rows, size), wide(outputs, size)
    order = torch.randperm(size, generator=generator)
    pairs = order[: size * 7 // 8 // 2 * 2].view(2, -1)
    input[:, pairs[1]] = input[:, pairs[0]]
    weight[:, pairs[1]] = -weight[:, pairs[0]]
    small = order[pairs.numel() :]
    input[:, small] *= 2**-14
    return input.to(dtype), weight.to(dtype)


def with_threads(count: int, call: Callable[[], Tensor]) -> Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def check_rows(dtype: torch.dtype, transposed: bool) -> None:
    """Each of 70 rows alone, and the first 1 to 70 of them, with one thread and with two."""
    for size in SIZES:
        input, weight = cancelling(ROWS, OUTPUTS, size, dtype)
        if size >= 129:
            # These inputs can tell: the same sums from the other end have other bits.
            there, back = ops.linear(input, weight, None), ops.linear(input.flip(1), weight.flip(1), None)
            assert (there != back).float().mean() > 0.3, f"{dtype}, {size}: the order of summation hardly shows"
        if transposed:
            weight = weight.T.contiguous()
        bias = normal(OUTPUTS, seed=3, dtype=dtype)
        for threads in (1, 2):

            def product(rows: Tensor, weight: Tensor = weight, bias: Tensor = bias, threads: int = threads) -> Tensor:
                return with_threads(threads, lambda: ops.linear(rows, weight, bias, transposed))

            alone = torch.cat([product(input[row, None]) for row in range(ROWS)])
            for count in range(1, ROWS + 1, 1 if threads == 2 else 3):
                assert_same_bits(product(input[:count]), alone[:count])
            assert_same_bits(product(input[37:]), alone[37:])


def check_blocks(dtype: torch.dtype) -> None:
    """Sums that go on from block to block: 1 to 30 rows, and so many that they are taken in blocks."""
    for size in BLOCKS:
        input, weight = cancelling(150, 53, size, dtype)
        bias = normal(53, seed=3, dtype=dtype)
        alone = torch.cat([ops.linear(row[None], weight, bias) for row in input])
        for count in (*range(1, 31), 32, 63, 64, 65, 129, 150):
            assert_same_bits(ops.linear(input[:count], weight, bias), alone[:count])


def check_groups(dtype: torch.dtype, transposed: bool) -> None:
    """Groups of every size, empty ones too, against `linear` with the weight of the group; groups that there are not;
    one row for all groups that it names."""
    for size in SIZES:
        input, weight = cancelling(90, 5 * OUTPUTS, size, dtype)
        weight = weight.view(5, OUTPUTS, size)
        if transposed:
            weight = weight.transpose(1, 2).contiguous()
        bias = normal(5, OUTPUTS, seed=3, dtype=dtype)
        every = torch.stack([ops.linear(input, *of, transposed) for of in zip(weight, bias, strict=True)], 1)
        for names in ([0], [4] * 89 + [1], [3, 0, 3, 1, 4, 0, 0], [-1, 5, 2, 2**62, -(2**63), 2, 2**32]):
            chosen = torch.tensor(names).repeat(90)[:90]
            known = (chosen >= 0) & (chosen < 5)
            expected = every[torch.arange(90), chosen * known].masked_fill(~known[:, None], 0)
            for threads in (1, 2):
                given = (input.view(30, 3, size), weight, bias, chosen.view(30, 3), transposed)
                got = with_threads(threads, lambda given=given: ops.grouped_linear(*given))
                assert_same_bits(got, expected.view(30, 3, OUTPUTS))
        shared = ops.grouped_linear(input[:, None], weight, bias, torch.tensor([[3, 0, 4]] * 90), transposed)
        assert_same_bits(shared, every[:, [3, 0, 4]])


def check_values(dtype: torch.dtype, transposed: bool) -> None:
    """Against the reference; what stands next to a row or a weight does not reach its sums, NaN least of all."""
    shapes = ((0, 5, 3), (3, 0, 5), (4, 7, 0), (1, 31, 17), (5, 64, 16), (18, 97, 40), (33, 1025, 49))
    for rows, size, outputs in shapes:
        input, weight = normal(rows, size, seed=1, dtype=dtype), normal(outputs, size, seed=2, dtype=dtype)
        weight *= max(1, size) ** -0.5
        if transposed:
            weight = weight.T.contiguous()
        bias = normal(outputs, seed=3, dtype=dtype)
        for added in (None, bias):
            got = ops.linear(input, weight, added, transposed)
            assert_close("linear", got, reference.linear(input, weight, added, transposed), dtype)
        if rows and size and outputs > 1:
            broken, row = input.clone(), rows // 2
            broken[row] = torch.nan
            columns = ops.linear(broken, weight, bias, transposed)
            others = torch.arange(rows) != row
            assert columns[row].isnan().all() and torch.equal(columns[others], got[others])
            wrong = weight.clone()
            (wrong[:, 1] if transposed else wrong[1]).fill_(torch.inf)
            columns = ops.linear(input, wrong, bias, transposed)
            kept = torch.arange(outputs) != 1
            assert torch.equal(columns[:, kept], got[:, kept]) and not columns[:, 1].isfinite().any()


def check_rounding(dtype: torch.dtype) -> None:
    """Products of one term, exact in float32, rounded as torch rounds them: tiles of every shape, ties, infinities,
    NaN, and float16's overflow and subnormal numbers."""
    generator = torch.Generator().manual_seed(0)
    largest = 8 if dtype is torch.float16 else 30

    def wide(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 2.0 ** torch.randint(
            -largest, largest, shape, generator=generator
        )

    for rows in range(1, 14):
        for outputs in (1, 3, 8, 24, 49, 131):
            input, weight = wide(rows, 1).to(dtype), wide(outputs, 1).to(dtype)
            weight[:: max(2, outputs // 5)] = torch.tensor(torch.nan)
            weight[1 :: max(2, outputs // 5)] = torch.tensor(-torch.inf)
            got, exact = ops.linear(input, weight, None), input.float() * weight.float().T
            assert torch.allclose(got.float(), exact.to(dtype).float(), rtol=0, atol=0, equal_nan=True), (rows, outputs)


def check_all() -> None:
    for dtype in DTYPES:
        check_rounding(dtype)
        check_blocks(dtype)
        for transposed in (False, True):
            check_values(dtype, transposed)
            check_rows(dtype, transposed)
            check_groups(dtype, transposed)
