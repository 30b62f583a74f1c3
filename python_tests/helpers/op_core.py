"""A few cases of every op against its reference, quick enough to be run for each set of kernels; and linear_core's.

The kernels are chosen when the library is loaded, so that a test of other ones starts another process:
CERBERUS_ISA=portable python python_tests/helpers/op_core.py
"""

from __future__ import annotations

import linear_core
import torch
from block_weights import multiply, packed_in, q4_0, q4_1, q8_0
from op_cases import (
    DTYPES,
    EXAMPLES,
    TOLERANCE,
    assert_close,
    assert_same_bits,
    attention_inputs,
    chain,
    example,
    integers,
    normal,
    random_parents,
    rerank_inputs,
)

from cerberus_ext import ops
from cerberus_ext.ops import reference
from cerberus_ext.ops.step import block_bytes


def check_examples(dtype: torch.dtype) -> None:
    """The example of each op, the two that write included."""
    for op in EXAMPLES:
        mine, theirs = example(op, dtype), example(op, dtype)
        got, expected = getattr(ops, op)(**mine), getattr(reference, op)(**theirs)
        if got is None:
            got = tuple(mine.values())  # commit_cache leaves what it likes behind `length`: nothing, in this example
            expected = tuple(theirs.values())
        for g, e in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, expected)), strict=True):
            if g.is_floating_point() and op in TOLERANCE:
                assert_close(op, g, e, dtype)
            else:
                assert torch.equal(g, e), op


def check_products(dtype: torch.dtype) -> None:
    """Sizes that no vector length divides, and rows alone and in company."""
    for size, outputs in ((1, 1), (7, 5), (129, 131), (576, 200)):
        input, weight = normal(17, size, seed=1, dtype=dtype), normal(outputs, size, seed=2, scale=0.1, dtype=dtype)
        got = ops.linear(input, weight, None)
        assert_close("linear", got, reference.linear(input, weight, None), dtype)
        for rows in (1, 2, 3, 4, 5, 8, 16):
            assert_same_bits(ops.linear(input[:rows], weight, None), got[:rows])
    hidden, anchor = normal(9, 129, seed=1, dtype=dtype), normal(9, 129, seed=2, dtype=dtype)
    weight, bias = normal(3, 4, 129, 258, seed=3, scale=0.06, dtype=dtype), normal(3, 4, 129, seed=4, dtype=dtype)
    states = ops.head_stack(hidden, anchor, weight, bias)
    assert_close("head_stack", states, reference.head_stack(hidden, anchor, weight, bias), dtype)
    for row in range(9):
        assert_same_bits(ops.head_stack(hidden[row, None], anchor[row, None], weight, bias)[0], states[row])
    # Far outside of what exp can hold.
    hidden, weight, bias = (
        torch.zeros(1, 64, dtype=dtype),
        torch.zeros(1, 1, 64, 64, dtype=dtype),
        torch.linspace(-200, 200, 64),
    )
    arguments = (hidden, hidden, weight, bias.to(dtype)[None, None])
    assert_close("head_stack", ops.head_stack(*arguments), reference.head_stack(*arguments), dtype)
    states, projection = integers(-2, 3, 5, 2, 129, seed=5).to(dtype), integers(-2, 3, 1537, 129, seed=6).to(dtype)
    assert torch.equal(ops.draft_topk(states, projection, 9)[0], reference.draft_topk(states, projection, 9)[0])


def check_rerank(dtype: torch.dtype) -> None:
    for drafts, rank in ((1, 3), (7, 33), (32, 64)):
        a = rerank_inputs(2, 3, drafts, rank, dtype=dtype)
        assert_close("rerank", ops.rerank(**a), reference.rerank(**a), dtype)


def check_attention(dtype: torch.dtype) -> None:
    """Borders of blocks and vectors, windows, and a chain in one call against the same tokens one at a time."""
    for head_size in (1, 33, 64, 129):
        for window in (0, 40):
            a = attention_inputs(2, random_parents(33), [63, 130], head_size=head_size, dtype=dtype) | {
                "window": window
            }
            assert_close("tree_attention", ops.tree_attention(**a), reference.tree_attention(**a), dtype)
    a = attention_inputs(1, chain(70), [60], dtype=dtype) | {"softcap": 2.0, "sinks": normal(4, seed=5, dtype=dtype)}
    assert_close("tree_attention", ops.tree_attention(**a), reference.tree_attention(**a), dtype)
    whole = ops.tree_attention(**a)
    for node in range(70):
        alone = a | {
            "q": a["q"][:, node, None].contiguous(),
            "length": torch.tensor([60 + node]),
            "ancestors": torch.tensor([[1]]),
        }
        assert_same_bits(ops.tree_attention(**alone)[0, 0], whole[0, node])


def check_activations(dtype: torch.dtype) -> None:
    """Every kind, and the same bits from every place of a vector on."""
    x = normal(301, scale=4.0, dtype=dtype)
    for kind in reference._ACTIVATIONS:
        whole = ops.activation(x, kind)
        assert_close("activation", whole, reference.activation(x, kind), dtype)
        for offset in range(1, 34):
            assert_same_bits(ops.activation(x[offset:], kind), whole[offset:])
            assert_same_bits(ops.activation(x[: offset + 1], kind), whole[: offset + 1])


def check_choice(dtype: torch.dtype) -> None:
    logits, positions = normal(9, 1025, scale=2.0, dtype=dtype), torch.arange(9)
    for temperature, top_k, top_p in ((0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 40, 0.9)):
        arguments = (logits, positions, 3, temperature, top_k, top_p)
        assert torch.equal(ops.choose_tokens(*arguments), reference.choose_tokens(*arguments))


def check_blocks() -> None:
    """Weights in fewer bits, where this level has those: the bits of linear, for every number of rows of a tile."""
    for make, bits in ((q4_0, 4), (q4_1, 4), (q8_0, 8)):
        weight = make(50, 192)
        if not block_bytes(weight, 50, bits):
            continue
        memory = packed_in(bits, weight)
        assert memory is not None
        for rows in (*range(1, 10), 17, 33):
            x = normal(rows, 192, seed=rows, dtype=torch.bfloat16)
            assert_same_bits(multiply(memory, weight.shape, x), ops.linear(x, weight, None))


def check_every_op() -> None:
    for dtype in DTYPES:
        check_examples(dtype)
        check_products(dtype)
        check_rerank(dtype)
        check_attention(dtype)
        check_activations(dtype)
        check_choice(dtype)


if __name__ == "__main__":
    check_every_op()
    check_blocks()
    linear_core.check_all()
    print(f"checked: {torch.ops.cerberus_ext.cpu_isa()}")
