"""linear and grouped_linear with weights the other way round than in their examples: checks, fakes, tracing.

What they compute is in linear_core.py, which test_isa.py runs for every set of kernels.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from op_cases import example, normal

from cerberus_ext import ops


def other_way(op: str) -> dict[str, Any]:
    arguments = example(op)
    weight = arguments["weight"].transpose(-1, -2).contiguous()
    return arguments | {"weight": weight, "transposed": not arguments["transposed"]}


@pytest.mark.parametrize("op", ["linear", "grouped_linear"])
def test_the_same_result_either_way(op):
    """And opcheck: schema, fake implementation, tracing."""
    arguments = other_way(op)
    torch.testing.assert_close(getattr(ops, op)(**arguments), getattr(ops, op)(**example(op)), rtol=2e-5, atol=2e-5)
    results = torch.library.opcheck(getattr(torch.ops.cerberus_ext, op), tuple(arguments.values()))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("op", "message"),
    [
        ("linear", "linear: weight must be (I, O) = (129, 34), got (130, 34)"),
        ("grouped_linear", "grouped_linear: weight must be (G, O, I) = (3, 34, 129), got (3, 34, 130)"),
    ],
)
def test_message_says_which_way(op, message):
    arguments = other_way(op)
    shape = (130, 34) if op == "linear" else (3, 34, 130)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        getattr(ops, op)(**arguments | {"weight": torch.zeros(shape)})


def test_many_groups_of_few_rows():
    """More groups than rows, as of experts in a decoding step, in one call: each row as `linear` gives it."""
    input, weight = normal(5, 64, seed=1, dtype=torch.bfloat16), normal(60, 40, 64, seed=2, dtype=torch.bfloat16)
    chosen = torch.tensor([17, 3, 59, 3, 40])
    got = ops.grouped_linear(input[:, None], weight, None, chosen[:, None])
    for row, group in enumerate(chosen):
        assert torch.equal(got[row], ops.linear(input[row, None], weight[group], None))


@pytest.mark.parametrize(("rows", "each", "groups", "size"), [(3, 2, 0, 8), (0, 2, 3, 8), (3, 0, 3, 8), (3, 2, 3, 0)])
def test_nothing_to_multiply(rows, each, groups, size):
    chosen = torch.zeros(rows, each, dtype=torch.int64)
    got = ops.grouped_linear(torch.ones(rows, each, size), torch.zeros(groups, 4, size), None, chosen)
    assert torch.equal(got, torch.zeros(rows, each, 4))
