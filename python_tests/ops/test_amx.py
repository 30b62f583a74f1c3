"""Level amx_bf16 on a machine without AMX: the kernel as it is, its tile instructions in plain C++."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from linear_core import OUTPUTS, cancelling
from op_cases import assert_close, assert_same_bits, normal
from torch import Tensor

from cerberus_ext.ops import reference

AMX = Path(__file__).parents[1] / "helpers" / "amx"
CSRC = Path(__file__).parents[2] / "csrc"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The products compiled without any instruction that a processor of the last ten years may lack."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    out = tmp_path_factory.mktemp("amx") / "amx.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    flags += ["-fsanitize=undefined", "-fno-sanitize-recover=undefined"]
    flags += ["-DCERBERUS_AMX", "-DCERBERUS_BFLOAT16_ONLY", "-DCERBERUS_ISA=amx_bf16"]
    flags += [f"-I{AMX}", f"-I{CSRC}"]
    proposers = [str(AMX / "library.cpp"), str(CSRC / "cpu" / "linear.cpp")]
    done = subprocess.run([compiler, *flags, *proposers, "-o", str(out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(out))


def guarded(values: Tensor) -> Tensor:
    """The same values with a page behind them that ends the process when it is read: the last weight is the last."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    page = os.sysconf("SC_PAGE_SIZE")
    size = values.numel() * values.element_size()
    pages = -(-size // page) + 1
    start = libc.mmap(None, ctypes.c_size_t(pages * page), 3, 0x22, -1, ctypes.c_size_t(0))
    assert libc.mprotect(ctypes.c_void_p(start + (pages - 1) * page), ctypes.c_size_t(page), 0) == 0
    memory = (ctypes.c_char * size).from_address(start + (pages - 1) * page - size)
    out = torch.frombuffer(memory, dtype=values.dtype).view(values.shape)
    return out.copy_(values)


def linear(
    library: ctypes.CDLL,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ends: Tensor | None = None,
    threads: int = 2,
) -> Tensor:
    rows, size = input.shape
    groups = 1 if ends is None else len(ends)
    out_size = weight.shape[-2]
    out = torch.full((rows, out_size), torch.nan, dtype=torch.bfloat16)
    pointers = [None if x is None else ctypes.c_void_p(x.data_ptr()) for x in (input, weight, bias, ends, out)]
    numbers = [ctypes.c_int64(x) for x in (rows, size, out_size, groups)]
    library.amx_linear(*numbers, *pointers, ctypes.c_int64(threads))
    return out


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 129, 575, 576])
@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 32, 47, 131])
def test_against_the_reference(size, outputs, library):
    """Odd sizes, the last weight and the last input at the end of a page; bias or none."""
    for rows in (1, 15, 16, 17, 32, 49):
        input = guarded(normal(rows, size, seed=1, dtype=torch.bfloat16))
        weight = guarded(normal(outputs, size, seed=2, scale=size**-0.5, dtype=torch.bfloat16))
        bias = normal(outputs, seed=3, dtype=torch.bfloat16) if rows % 2 else None
        got = linear(library, input, weight, bias)
        assert_close("linear", got, reference.linear(input, weight, bias), torch.bfloat16)


@pytest.mark.parametrize("size", [1, 33, 129, 575])
def test_row_invariance(size, library):
    """64 rows, one by one and the first 1 to 64, with sums that cancel and where another order shows."""
    input, weight = cancelling(64, OUTPUTS, size, torch.bfloat16)
    alone = torch.cat([linear(library, input[row, None], weight, None) for row in range(64)])
    if size >= 129:
        back = linear(library, input.flip(1).contiguous(), weight.flip(1).contiguous(), None)
        assert (alone != back).float().mean() > 0.3
    for rows in range(1, 65):
        assert_same_bits(linear(library, input[:rows], weight, None, threads=1 + rows % 2), alone[:rows])


@pytest.mark.parametrize("ends", [[0, 1, 1, 40, 70], [70] * 5, [3, 5, 9, 14, 20], [50, 20, 70, -1, 2**62]])
def test_groups(ends, library):
    input, weights = cancelling(70, 5 * 33, 129, torch.bfloat16)
    weight, bias = weights.view(5, 33, 129), normal(5, 33, seed=3, dtype=torch.bfloat16)
    expected = torch.zeros(70, 33, dtype=torch.bfloat16)
    first = 0
    for group, end in enumerate(ends):
        last = min(70, max(first, end))
        if last > first:
            expected[first:last] = linear(library, input[first:last], weight[group], bias[group])
        first = last
    assert_same_bits(linear(library, input, weight, bias, torch.tensor(ends)), expected)


def test_what_is_next_to_a_sum_does_not_reach_it(library):
    """Infinite weights and NaN rows beside: the zeros that fill a tile are zeros, not neighbours times zero."""
    input, weight = normal(17, 33, seed=1, dtype=torch.bfloat16), normal(17, 33, seed=2, dtype=torch.bfloat16)
    whole = linear(library, input, weight, None)
    input[3], weight[5] = torch.nan, torch.inf
    rows, outputs = torch.arange(17) != 3, torch.arange(17) != 5
    assert_same_bits(linear(library, input, weight, None)[rows][:, outputs], whole[rows][:, outputs])


def test_denormals_are_zeros(library):
    tiny = torch.full((1, 32), 2.0**-130, dtype=torch.bfloat16)
    assert linear(library, tiny, torch.full((1, 32), 2.0**100, dtype=torch.bfloat16), None).item() == 0
