"""A step as launches of the CUDA kernels, under emulation, against the same code on the CPU."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from device_steps import EmulatedStep, launches, run
from op_cases import DTYPES, assert_same_bits
from simt_library import Emulation
from step_codes import CHOSEN, EXPERTS, NONE, OUT, VOCAB, WIDTH, damaged, experts_step, linear_step, row
from torch import Tensor

from cerberus_ext.ops.step import NativeStep
from cerberus_ext.runtime.fused.program import RowOp

pytestmark = pytest.mark.usefixtures("simt")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
Code = tuple[list[Tensor], list[int]]
# Of a product: not at multiples of 16 bytes, and more chunks than a warp has stages, the last one not whole.
widths = pytest.mark.parametrize("width", [WIDTH, 4104])
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}


def tokens_of(nodes: int) -> Tensor:
    return torch.arange(nodes) * 5 % VOCAB


@widths
@dtypes
@pytest.mark.parametrize("nodes", [1, 9, 17, 70])
def test_products(nodes: int, dtype: torch.dtype, width: int) -> None:
    tensors, code = linear_step(dtype, packed=False, width=width)
    _, want, _ = run(NativeStep(tensors, torch.tensor(code)), tokens_of(nodes), dtype, (width, OUT))
    hidden, got, _ = run(EmulatedStep(tensors, torch.tensor(code)), tokens_of(nodes), dtype, (width, OUT))
    assert hidden.equal(tensors[0][tokens_of(nodes)])
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype] * width**0.5, rtol=TOLERANCE[dtype])


@widths
@dtypes
@pytest.mark.parametrize("of", [linear_step, experts_step])
def test_a_row_has_the_same_bits_whatever_the_others_are(
    of: Callable[..., Code], dtype: torch.dtype, width: int
) -> None:
    tensors, code = of(dtype, packed=False, width=width)
    step, size = EmulatedStep(tensors, torch.tensor(code)), OUT if of is linear_step else CHOSEN * OUT + CHOSEN
    everyone = run(step, tokens_of(70), dtype, (width, size))[1]
    for rows in (slice(69, 70), slice(5, 16), slice(3, 29)):
        assert_same_bits(run(step, tokens_of(70)[rows].contiguous(), dtype, (width, size))[1], everyone[rows])


@widths
@dtypes
@pytest.mark.parametrize("nodes", [1, 9])
def test_experts(nodes: int, dtype: torch.dtype, width: int) -> None:
    tensors, code = experts_step(dtype, packed=False, width=width)
    results = []
    for step in (NativeStep, EmulatedStep):
        sizes = (width, CHOSEN * OUT + CHOSEN)
        results.append(run(step(tensors, torch.tensor(code)), tokens_of(nodes), dtype, sizes)[1])
    torch.testing.assert_close(results[1], results[0], atol=TOLERANCE[dtype] * width**0.5 * 2, rtol=TOLERANCE[dtype])
    assert results[1][:, CHOSEN * OUT :].equal(results[0][:, CHOSEN * OUT :]), "what was chosen"


@pytest.mark.parametrize("place", [-1.0, 5.0, 3e9, torch.inf, -torch.inf, torch.nan])
def test_an_expert_that_there_is_not(place: float) -> None:
    """The product is 0, also of what is not finite."""
    weight, table = torch.ones(EXPERTS, 3, 1), torch.tensor([[torch.inf]])
    code = [1, 0, 1, 1, 4, 3, 2, 0, 1, 1, 0, 3, 0, 1, 1]
    code += [1, 0, 2, 0, 0, 1, 1, 1, *row(2, 0), *row(3, 1), *NONE, 0, 0, 1, 1, 1, *row(2, 2), *row(3, 2), *NONE]
    code += [3, 0, 1, 0, 1, 3, -1, 0, 0, EXPERTS, 2, 1, 1]
    step = EmulatedStep([weight, table, torch.tensor([place])], torch.tensor(code))
    assert run(step, tokens_of(1), torch.float32, (1, 3))[1].equal(torch.zeros(1, 3))


def test_parts_of_one_input_are_one_launch() -> None:
    """Nine parts of different sizes, some with a bias: as one product. A launch takes eight of them."""
    torch.manual_seed(0)
    table, weight, bias = torch.randn(VOCAB, WIDTH), torch.randn(90, WIDTH), torch.randn(90)
    sizes = [1, 16, 17, 3, 20, 5, 8, 19, 1]
    weights, biases = weight.split(sizes), bias.split(sizes)
    head = [1, 0, 1, 1, 4, 2]
    embed = [1, 0, 1, 0, 0, 1, 1, WIDTH, *row(2, 0), *row(5, 0), *NONE]
    code, first = [*head, 10, 0, 1, WIDTH, 0, 90, 0, *embed], 0
    for place, size in enumerate(sizes):
        has_bias = place % 2 == 0
        code += [4, 0, 1, 1 + 2 * place, WIDTH, size, 2 + 2 * place if has_bias else -1, 0, first]
        first += size
    tensors = [table, *(tensor for pair in zip(weights, biases, strict=True) for tensor in pair)]
    before = launches()
    got = run(EmulatedStep(tensors, torch.tensor(code)), tokens_of(5), torch.float32, (WIDTH, 90))[1]
    assert launches() == before + 3
    some = torch.cat([part * (place % 2 == 0) for place, part in enumerate(biases)])
    torch.testing.assert_close(got, table[tokens_of(5)] @ weight.T + some, atol=1e-4, rtol=1e-5)
    with pytest.raises(RuntimeError, match="a stage's kind must be 0 to 3, got 4"):
        NativeStep(tensors, torch.tensor(code))


# --- row instructions -------------------------------------------------------------------------------------------------

EXACT = {
    RowOp.COPY, RowOp.ADD, RowOp.SUB, RowOp.MUL, RowOp.DIV, RowOp.MAXIMUM, RowOp.MINIMUM, RowOp.NEG, RowOp.ABS,
    RowOp.SQRT, RowOp.RSQRT, RowOp.RECIPROCAL, RowOp.MAX, RowOp.RELU, RowOp.TOP, RowOp.PICK,
}  # fmt: skip
REDUCES = {RowOp.MEAN, RowOp.SUM, RowOp.MAX, RowOp.TOP, RowOp.PICK}


def one_instruction(op: RowOp, dtype: torch.dtype, runs: tuple[int, int], size: int) -> tuple[Code, int]:
    """op on runs of a table's row, the second operand backwards along the runs: tensors, code, size of the result."""
    torch.manual_seed(int(op))
    n2, n1 = runs
    values = torch.randn(VOCAB, n2 * n1 * size) * 8
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-40, -100.0, 100.0, 1.0, 3.0])
    values[:, ::7] = special[torch.randint(len(special), values[:, ::7].shape)]
    if op is RowOp.TOP:  # equal ones are ordered in another way than on a CPU: from 1 on every number of the dtype once
        ranks, kind = torch.rand_like(values).argsort(-1), {2: torch.int16, 4: torch.int32}[dtype.itemsize]
        values = (torch.ones((), dtype=dtype).view(kind) + ranks).to(kind).view(dtype)
    other = torch.randint(-1, size + 1, (VOCAB, n1 * n2)).float() if op is RowOp.PICK else torch.randn(VOCAB, n1 * size)
    tensors = [values.to(dtype), other.to(dtype)]
    width = n2 * n1 if op in REDUCES else n2 * n1 * size
    last = 0 if op in REDUCES else 1
    each = 1 if op in REDUCES else size
    scratch, rounds = 16 + n2 * n1 * size, int(dtype != torch.float32)
    source = [5, 0, 0, n1 * size, 0 if op is RowOp.TOP else size, 1]
    second = [5, 1, 0, n1, 1, 0] if op is RowOp.PICK else [5, 1, 0, 0, size, 1]
    two = RowOp.ADD <= op <= RowOp.MINIMUM or op is RowOp.PICK
    code = [1, DTYPES.index(dtype), 1, 1, 4, 2, 1, 0, 1, width, 0, width, 0, 1, scratch, 3]
    code += [op, rounds, n2, n1, size, 1, 0, 16, n1 * each, each, last, *source, *(second if two else NONE)]
    for result in (0, 1):
        code += [RowOp.COPY, 0, 1, 1, width, *row(2, result), *row(1, 0, 16), *NONE]
    return (tensors, code), width


@pytest.mark.pairwise
@dtypes
@pytest.mark.parametrize(("runs", "size"), [((1, 1), 1), ((1, 1), 577), ((1, 3), 70), ((5, 7), 33), ((20, 1), 8)])
@pytest.mark.parametrize("op", RowOp)
def test_row_ops(op: RowOp, runs: tuple[int, int], size: int, dtype: torch.dtype) -> None:
    if op is RowOp.TOP and runs[1] > size:
        pytest.skip("more of the largest than there are")
    (tensors, code), width = one_instruction(op, dtype, runs, size)
    steps = [step(tensors, torch.tensor(code)) for step in (NativeStep, EmulatedStep)]
    want, got = (run(step, tokens_of(3), dtype, (width, width))[0] for step in steps)
    if op in EXACT:
        assert torch.equal(got.isnan(), want.isnan()) and got.nan_to_num().equal(want.nan_to_num())
    else:
        places = {torch.float32: 2e-6, torch.bfloat16: 0.008, torch.float16: 0.001}[dtype]
        scale = 100.0 * size if op in REDUCES else 1.0
        torch.testing.assert_close(got, want, atol=places * scale, rtol=places, equal_nan=True)


@pytest.mark.parametrize("length", [-1, 0, 5, 8])
@dtypes
def test_writes_to_the_cache(dtype: torch.dtype, length: int) -> None:
    """Slots that there are not are left out."""
    values = torch.randn(VOCAB, 16).to(dtype)
    code = [1, DTYPES.index(dtype), 1, 2, 4, 2, 1, 0, 1, 16, 0, 1, 0, 1, 0, 3]
    code += [0, 0, 1, 2, 4, 6, 0, 0, 0, 4, 1, 5, 0, 0, 0, 4, 1, *NONE]
    code += [0, 0, 1, 2, 4, 7, 0, 0, 0, 4, 1, 5, 0, 8, 0, 4, 1, *NONE]
    code += [0, 0, 1, 1, 16, *row(2, 0), *row(5, 0), *NONE]
    steps = [step([values], torch.tensor(code)) for step in (NativeStep, EmulatedStep)]
    want, got = (run(step, tokens_of(5), dtype, (16, 1), length, 2)[2] for step in steps)
    assert_same_bits(got, want)
    assert bool(got.any()) == (0 <= length < 8)


def test_equal_largest_are_taken_in_order() -> None:
    values = torch.tensor([[1.0, torch.nan, 3.0, 3.0, torch.nan, 1.0, 3.0]])
    code = [1, 0, 1, 1, 4, 2, 1, 0, 1, 5, 0, 1, 0, 1, 0, 1, 31, 0, 1, 5, 7, 2, 0, 0, 0, 1, 0, *row(5, 0), *NONE]
    found = run(EmulatedStep([values], torch.tensor(code)), tokens_of(1), torch.float32, (5, 1))[0]
    assert found.tolist() == [[1, 4, 2, 3, 6]]


def test_scratch_that_is_too_large_for_shared_memory() -> None:
    width = 30000
    values = torch.randn(VOCAB, width)
    code = [1, 0, 1, 1, 4, 2, 1, 0, 1, width, 0, 1, 0, 1, width, 3]
    code += [2, 0, 1, 1, width, *row(1, 0), *row(5, 0), 8, 0, 1 << 30, 0, 0, 0]  # minus 2
    code += [0, 0, 1, 1, width, *row(2, 0), *row(1, 0), *NONE, 13, 0, 1, 1, width, *row(2, 1), *row(1, 0), *NONE]
    hidden, total, _ = run(EmulatedStep([values], torch.tensor(code)), tokens_of(2), torch.float32, (width, 1))
    assert hidden.equal(values[tokens_of(2)] - 2)
    torch.testing.assert_close(total, hidden.double().sum(-1, keepdim=True).float(), atol=0.01, rtol=1e-4)


# --- what is planned, and what is refused -----------------------------------------------------------------------------


def test_a_plan_is_run_again_with_what_its_tensors_hold_then() -> None:
    tensors, code = linear_step(torch.float32, packed=False)
    step, cache = EmulatedStep(tensors, torch.tensor(code)), torch.zeros(2, 1, 1, 8, 4)
    tokens, hidden, logits = tokens_of(3), torch.empty(3, WIDTH), torch.empty(3, OUT)
    nodes, length, ancestors = (tokens, torch.arange(3)), torch.tensor([0]), torch.zeros(3, 1, dtype=torch.int64)
    arguments = (*nodes, [length], [ancestors], [cache], hidden, logits)
    for first in range(3):
        tokens.add_(first)
        step.run(*arguments)
        assert hidden.equal(tensors[0][tokens.clamp(max=VOCAB - 1)])
    assert list(step.launches.values()) == [2]
    number = step._number
    step.run(*arguments[:4], [torch.zeros(2, 1, 1, 16, 4)], hidden, logits)
    assert list(step.launches.values()) == [2] and step._number != number, "plans of another cache are kept no longer"
    with pytest.raises(RuntimeError, match="run_device_step: cache, hidden and logits must be those of a plan"):
        torch.ops.cerberus_simt.run_device_step(step._number, *nodes, length, ancestors, cache, hidden, logits)
    with pytest.raises(RuntimeError, match="step must be one that make_device_step has returned"):
        torch.ops.cerberus_simt.run_device_step(number, *nodes, length, ancestors, cache, hidden, logits)
    with pytest.raises(RuntimeError, match="cache must be that of one text, got 2"):
        step.run(*nodes, [length] * 2, [ancestors] * 2, [cache] * 2, hidden, logits)


@pytest.mark.parametrize("of", [linear_step, experts_step])
def test_codes_that_are_wrong_are_refused_or_harmless(of: Callable[..., Code]) -> None:
    """Any number of a code replaced by any other; the sanitizers' build says whether anything else is touched."""
    tensors, code = of(torch.float32, packed=False)
    outputs = OUT if of is linear_step else CHOSEN * OUT + CHOSEN
    generator, refused = random.Random(0), 0
    for _ in range(300):
        try:
            step = EmulatedStep(tensors, torch.tensor(damaged(code, generator), dtype=torch.int64))
            run(step, tokens_of(3), torch.float32, (WIDTH, outputs))
        except RuntimeError as error:
            assert str(error).startswith(("make_step: ", "make_device_step: ", "plan_device_step: ")), error
            refused += 1
    assert refused > 100


def test_what_the_kernels_do_not_do_is_refused() -> None:
    tensors, code = experts_step(torch.float32, packed=False, transposed=True)
    with pytest.raises(RuntimeError, match="groups must not be transposed on CUDA"):
        EmulatedStep(tensors, torch.tensor(code))
    with pytest.raises(RuntimeError, match="elements to be ranked must be at most 4096"):
        code = [1, 0, 1, 1, 4, 2, 1, 0, 1, 5, 0, 1, 0, 1, 0, 1, 31, 0, 1, 5, 5000, 2, 0, 0, 0, 1, 0, *row(5, 0), *NONE]
        EmulatedStep([torch.zeros(1, 5000)], torch.tensor(code))


def test_schedules(simt: Emulation) -> None:
    """The same bits whichever thread goes first."""
    tensors, code = experts_step(torch.bfloat16, packed=False)
    found = []
    for seed in range(5):
        simt.seed(seed)
        step = EmulatedStep(tensors, torch.tensor(code))
        found.append(run(step, tokens_of(9), torch.bfloat16, (WIDTH, CHOSEN * OUT + CHOSEN))[1])
    for other in found[1:]:
        assert_same_bits(other, found[0])
