"""Design rule 6: on a CPU, what is computed for a row is bit-equal whatever else is in the call.

tree_attention has its own tests of this (a tree against one token at a time) beside its other ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from op_cases import (
    DTYPES,
    assert_close,
    assert_same_bits,
    attention_inputs,
    integers,
    normal,
    random_parents,
    rerank_inputs,
    tree,
)
from torch import Tensor
from torch.nn import functional as F

from cerberus_ext import ops
from cerberus_ext.ops import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
ROWS = 33


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_row_invariant(call: Callable[[Tensor], tuple[Tensor, ...]], rows: int) -> None:
    """call(index) computes the rows `index`, in that order. Alone, in any company, at any place: the same bits."""
    with threads(1):
        wanted = call(torch.arange(rows))
    alone = [torch.tensor([row]) for row in range(rows)]
    companies = [torch.arange(count) for count in (2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 32) if count < rows]
    companies += [torch.arange(rows), torch.arange(rows).flip(0), torch.tensor([rows - 1] * 5 + [0] * 3)]
    for count, indexes in ((1, alone + companies), (2, alone[::8] + companies)):
        with threads(count):
            for index in indexes:
                for got, whole in zip(call(index), wanted, strict=True):
                    assert_same_bits(got, whole[index])


@dtypes
@pytest.mark.parametrize("size", [1, 129, 576])
def test_hidden_entropy(size, dtype):
    hidden = normal(ROWS, size, scale=3.0, dtype=dtype)
    assert_row_invariant(lambda index: (ops.hidden_entropy(hidden[index]),), ROWS)


@dtypes
@pytest.mark.parametrize("chained", [True, False], ids=["chained", "unchained"])
@pytest.mark.parametrize("size", [33, 129, 192])
def test_head_stack(size, chained, dtype):
    hidden, anchor = normal(ROWS, size, seed=1, dtype=dtype), normal(ROWS, size, seed=2, dtype=dtype)
    columns = 2 * size if chained else size
    weight = normal(2, 3, size, columns, seed=3, scale=columns**-0.5, dtype=dtype)
    bias = normal(2, 3, size, seed=4, dtype=dtype)
    assert_row_invariant(lambda index: (ops.head_stack(hidden[index], anchor[index], weight, bias),), ROWS)


@dtypes
@pytest.mark.parametrize(("size", "vocab"), [(33, 129), (129, 1025), (576, 2000)])
def test_draft_topk(size, vocab, dtype):
    states = normal(ROWS, 2, size, seed=1, dtype=dtype)
    projection = normal(vocab, size, seed=2, scale=size**-0.5, dtype=dtype)
    assert_row_invariant(lambda index: ops.draft_topk(states[index], projection, 4), ROWS)


@dtypes
@pytest.mark.parametrize("drafts", [5, 32])
def test_rerank(drafts, dtype):
    a = rerank_inputs(ROWS, 3, drafts, 33, dtype=dtype)
    assert_row_invariant(
        lambda index: (ops.rerank(**a | {name: a[name][index] for name in ("ids", "logprobs")}),), ROWS
    )


@dtypes
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_choose_tokens(temperature, dtype):
    logits, positions = normal(ROWS, 1025, scale=2.0, dtype=dtype), torch.arange(ROWS)
    assert_row_invariant(
        lambda index: (ops.choose_tokens(logits[index], positions[index], 7, temperature, 100, 0.9),), ROWS
    )


@dtypes
def test_tree_attention_rows(dtype):
    lengths = [(13 * row) % 97 for row in range(ROWS)]
    a = attention_inputs(ROWS, random_parents(9, seed=1), lengths, query_heads=3, kv_heads=1, dtype=dtype)

    def call(index: Tensor) -> tuple[Tensor]:
        return (ops.tree_attention(**a | {name: a[name][index] for name in ("q", "keys", "values", "length")}),)

    assert_row_invariant(call, ROWS)


def test_verify_tree():
    parents, ancestors, depth = tree(random_parents(70, seed=1))
    draft, target = integers(0, 2, ROWS, 70, seed=1), integers(0, 2, ROWS, 70, seed=2)
    assert_row_invariant(lambda index: ops.verify_tree(draft[index], target[index], parents, ancestors, depth), ROWS)


# ---------------------------------------------------------------- matrix products: ours, and the machine's own

# What a small llama has: attention out, key/value, gate/up, down; and one with sizes that no vector length divides.
SHAPES = [(576, 576), (576, 192), (576, 1536), (1536, 576), (129, 131)]


def product_inputs(size: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    weight = normal(outputs, size, seed=2, scale=size**-0.5, dtype=dtype)
    return normal(32, size, seed=1, dtype=dtype), weight, normal(outputs, seed=3, dtype=dtype)


@dtypes
@pytest.mark.parametrize(("size", "outputs"), SHAPES)
def test_linear(size, outputs, dtype):
    input, weight, bias = product_inputs(size, outputs, dtype)
    assert_row_invariant(lambda index: (ops.linear(input[index], weight, bias),), 32)
    assert_row_invariant(lambda index: (ops.linear(input[index], weight, None),), 32)


@dtypes
def test_linear_of_more_rows_than_are_multiplied_at_a_time(dtype):
    """A prompt's: 150 rows of 1025 take several blocks, whatever the level of the instruction set."""
    weight, bias = normal(27, 1025, seed=1, dtype=dtype), normal(27, seed=2, dtype=dtype)
    input = normal(150, 1025, dtype=dtype)
    whole = ops.linear(input, weight, bias)
    for rows in (slice(0, 1), slice(30, 32), slice(15, 20), slice(149, 150), slice(60, 150)):
        assert_same_bits(ops.linear(input[rows].contiguous(), weight, bias), whole[rows])
    assert_close("linear", whole, reference.linear(input, weight, bias), dtype)


def rows_that_agree(product: Callable[[Tensor, Tensor], Tensor], input: Tensor, weight: Tensor) -> list[int]:
    """For how many rows m <= 32 the first m rows are bit-equal to the same rows among 32."""
    wanted = product(input, weight)
    return [m for m in range(1, 33) if torch.equal(product(input[:m].contiguous(), weight), wanted[:m])]


def ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 5] -> "1-3 5"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in found) or "none"


def test_which_linears_of_this_machine_are_row_invariant(record_property, capsys):
    """A report on torch's own linears, and the claim that ours agree for every number of rows.

    A linear that is not row-invariant makes decoding with drafts round differently from decoding without them, which is
    why a machine where the table below says less than "1-32" for a dtype decodes with `ops.linear`.
    """
    lines = [f"rows m of 1..32 whose bits equal those of the same rows among 32, {torch.get_num_threads()} threads"]
    for dtype in DTYPES:
        for size, outputs in SHAPES[1:4]:
            input, weight, _ = product_inputs(size, outputs, dtype)
            theirs = ranges(rows_that_agree(F.linear, input, weight))
            ours = ranges(rows_that_agree(lambda x, w: ops.linear(x, w, None), input, weight))
            name = f"{str(dtype).removeprefix('torch.')} {size} -> {outputs}"
            lines.append(f"{name:<22} torch: {theirs:<24} cerberus_ext: {ours}")
            record_property(f"torch linear {name}", theirs)
            assert ours == "1-32", lines[-1]
    with capsys.disabled():
        print("\n" + "\n".join(lines))
