"""Every check of every argument of every op: something wrong goes in, a message that names op and argument comes out.

Each message is "<op>: <argument> must be <what>, got <what it is>". The tables say what <what> is for every argument;
the wrong values are made from one correct call per op (`op_cases.example`), so that nothing else is wrong.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from op_cases import CUDA_OPS, EXAMPLES, example

from cerberus_ext import ops

# op -> tensor argument -> its axes as the messages write them, and the axes whose size the arguments before it fix.
SHAPES: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "hidden_entropy": {"hidden": ("(B, D)", ())},
    "head_stack": {
        "hidden": ("(B, D)", ()),
        "anchor": ("(B, D)", (0, 1)),
        "weight": ("(L, K, D, 2D) or (L, K, D, D) with D = 33", (2, 3)),
        "bias": ("(L, K, D)", (0, 1, 2)),
    },
    "draft_topk": {"states": ("(B, K, D)", ()), "projection": ("(Vd, D)", (1,))},
    "rerank": {
        "ids": ("(B, K, P)", ()),
        "logprobs": ("(B, K, P)", (0, 1, 2)),
        "parents": ("(K - 1, Vd, r)", (0,)),
        "children": ("(Vd, r)", (0, 1)),
        "slopes": ("(K - 1,)", (0,)),
        "rest": ("(K - 1,)", (0,)),
    },
    "choose_tokens": {"logits": ("(M, V)", ()), "positions": ("(M,)", (0,)), "numbers": ("(3,)", (0,))},
    "tree_attention": {
        "q": ("(B, N, Hq, E)", ()),
        "keys": ("(B, Hkv, S, E)", (0, 3)),
        "values": ("(B, Hkv, S, E)", (0, 1, 2, 3)),
        "length": ("(B,)", (0,)),
        "ancestors": ("(N, W)", (0, 1)),
        "sinks": ("(Hq,)", (0,)),
    },
    "write_cache": {
        "keys": ("(B, Hkv, S, E)", ()),
        "values": ("(B, Hkv, S, E)", (0, 1, 2, 3)),
        "new_keys": ("(B, N, Hkv, E)", (0, 2, 3)),
        "new_values": ("(B, N, Hkv, E)", (0, 1, 2, 3)),
        "length": ("(B,)", (0,)),
    },
    "verify_tree": {
        "draft": ("(B, N)", ()),
        "target": ("(B, N)", (0, 1)),
        "parents": ("(N,)", (0,)),
        "ancestors": ("(N, W)", (0, 1)),
    },
    "commit_cache": {
        "cache": ("(C, B, Hkv, S, E)", ()),
        "length": ("(B,)", (0,)),
        "path": ("(B, depth + 1)", (0,)),
        "accepted": ("(B,)", (0,)),
    },
    "linear": {"input": ("(M, I)", ()), "weight": ("(O, I)", (1,)), "bias": ("(O,)", (0,))},
    "activation": {"input": ("any", ())},
    "grouped_linear": {
        "input": ("(M, J, I) or (M, 1, I)", ()),
        "weight": ("(G, I, O)", (1,)),
        "bias": ("(G, O)", (0, 1)),
        "chosen": ("(M, J)", (0, 1)),
    },
}
ALWAYS_FLOAT32 = [("rerank", "logprobs"), ("rerank", "slopes"), ("rerank", "rest")]
FIRST_FLOATING = {"rerank": "parents"}  # where it is not the first argument
TENSORS = [(op, name) for op, arguments in SHAPES.items() for name in arguments]
WITH_RANK = [(op, name) for op, name in TENSORS if SHAPES[op][name][0] != "any"]
GROWN = [(op, name, axis) for op, arguments in SHAPES.items() for name in arguments for axis in arguments[name][1]]

# op, tensor argument, axis, letter: what may not be empty
NOT_EMPTY = [
    ("hidden_entropy", "hidden", 1, "D"),
    ("head_stack", "hidden", 1, "D"),
    ("head_stack", "weight", 0, "L"),
    ("head_stack", "weight", 1, "K"),
    ("draft_topk", "states", 2, "D"),
    ("rerank", "ids", 1, "K"),
    ("rerank", "parents", 2, "r"),
    ("choose_tokens", "logits", 1, "V"),
    ("tree_attention", "q", 3, "E"),
    ("tree_attention", "keys", 1, "Hkv"),
    ("verify_tree", "draft", 1, "N"),
    ("commit_cache", "path", 1, "depth + 1"),
]

# op, number, wrong value, what it must be, how the message writes the value
NUMBERS = [
    ("draft_topk", "drafts", 0, "1 to 32", "0"),
    ("draft_topk", "drafts", -1, "1 to 32", "-1"),
    ("draft_topk", "drafts", 33, "1 to 32", "33"),
    ("choose_tokens", "temperature", -0.5, "finite and >= 0", "-0.5"),
    ("choose_tokens", "temperature", math.nan, "finite and >= 0", "nan"),
    ("choose_tokens", "temperature", math.inf, "finite and >= 0", "inf"),
    ("choose_tokens", "top_k", -1, ">= 0", "-1"),
    ("choose_tokens", "top_p", 0.0, "> 0 and <= 1", "0"),
    ("choose_tokens", "top_p", 1.5, "> 0 and <= 1", "1.5"),
    ("choose_tokens", "top_p", math.nan, "> 0 and <= 1", "nan"),
    ("tree_attention", "scale", math.nan, "finite in float32", "nan"),
    ("tree_attention", "scale", math.inf, "finite in float32", "inf"),
    ("tree_attention", "scale", 1e39, "finite in float32", "1e+39"),
    ("tree_attention", "softcap", -1.0, "finite and >= 0 in float32", "-1"),
    ("tree_attention", "softcap", math.nan, "finite and >= 0 in float32", "nan"),
    ("tree_attention", "softcap", math.inf, "finite and >= 0 in float32", "inf"),
    ("tree_attention", "softcap", 1e39, "finite and >= 0 in float32", "1e+39"),
    ("tree_attention", "softcap", 1e-60, "finite and >= 0 in float32", "1e-60"),
    ("verify_tree", "depth", -1, "0 to N - 1 = 4", "-1"),
    ("verify_tree", "depth", 5, "0 to N - 1 = 4", "5"),
    ("verify_tree", "depth", 2**31, "0 to N - 1 = 4", "2147483648"),
    ("verify_tree", "depth", 2**63 - 1, "0 to N - 1 = 4", "9223372036854775807"),
]


def rejects(op: str, device: str, name: str, wrong: Any, must_be: str, got: str) -> None:
    """The call with this argument in place of the correct one fails with exactly this message."""
    if device != "cpu" and op not in CUDA_OPS:
        return
    message = f"{op}: {name} must be {must_be}, got {got}"
    with pytest.raises(RuntimeError, match=re.escape(message) + r"(\n|$)"):
        getattr(ops, op)(**example(op, device=device) | {name: wrong})


def test_tables_name_every_argument():
    """So that no argument is left without its checks. Some may be anything of their type."""
    checked = {(op, name) for op, name in TENSORS} | {(op, number) for op, number, *_ in NUMBERS}
    every = {(op, name) for op in EXAMPLES for name in example(op)}
    anything = {("choose_tokens", "seed"), ("tree_attention", "window"), ("activation", "kind")}
    assert every - checked == anything | {("linear", "transposed"), ("grouped_linear", "transposed")}


@pytest.mark.parametrize(("op", "name"), WITH_RANK)
def test_rank(op, name, device):
    right = example(op, device=device)[name]
    for wrong in (right[None], right[..., 0].contiguous()):
        shape = str(tuple(wrong.shape))
        rejects(op, device, name, wrong, SHAPES[op][name][0], shape)


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_dtype(op, name, device):
    arguments = example(op, device=device)
    right = arguments[name]
    first = FIRST_FLOATING.get(op, next(iter(arguments)))
    if right.dtype is torch.int64:
        rejects(op, device, name, right.int(), "torch.int64", "torch.int32")
    elif right.dtype is torch.int32:
        rejects(op, device, name, right.long(), "torch.int32", "torch.int64")
    elif (op, name) in ALWAYS_FLOAT32:
        for dtype in (torch.bfloat16, torch.float64, torch.int32):
            rejects(op, device, name, right.to(dtype), "torch.float32", str(dtype))
    elif name == first:
        for dtype in (torch.float64, torch.int64, torch.bool, torch.uint8):
            rejects(op, device, name, right.to(dtype), "torch.float32, torch.bfloat16 or torch.float16", str(dtype))
    else:
        for dtype in (torch.bfloat16, torch.float64, torch.int32):
            rejects(op, device, name, right.to(dtype), f"torch.float32 like {first}", str(dtype))


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_contiguous(op, name, device):
    """The same values, every other element of a larger tensor."""
    right = example(op, device=device)[name]
    wrong = torch.stack([right, right], -1)[..., 0]
    assert torch.equal(wrong.nan_to_num(), right.nan_to_num())
    shape, strides = tuple(wrong.shape), wrong.stride()
    rejects(op, device, name, wrong, "contiguous", f"shape {shape} with strides {strides}")


@pytest.mark.parametrize(("op", "name", "axis"), GROWN)
def test_size(op, name, axis, device):
    """One more along an axis that the arguments before it fix."""
    right = example(op, device=device)[name]
    shape = list(right.shape)
    shape[axis] += 1
    letters = SHAPES[op][name][0]
    if name == "ancestors":
        letters = "(N, W) with W = ceil(N / 64)"
    # The weight of the heads has two right shapes, which its letters spell out.
    must_be = letters if (op, name) == ("head_stack", "weight") else f"{letters} = {tuple(right.shape)}"
    rejects(op, device, name, right.new_zeros(shape), must_be, str(tuple(shape)))


@pytest.mark.parametrize(("op", "name", "axis", "letter"), NOT_EMPTY)
def test_not_empty(op, name, axis, letter, device):
    shape = list(example(op, device=device)[name].shape)
    shape[axis] = 0
    wrong = example(op, device=device)[name].new_zeros(shape)
    rejects(op, device, name, wrong, f"{SHAPES[op][name][0]} with {letter} >= 1", str(tuple(shape)))


@pytest.mark.parametrize(("op", "name", "wrong", "must_be", "got"), NUMBERS)
def test_number(op, name, wrong, must_be, got, device):
    rejects(op, device, name, wrong, must_be, got)


def test_more_drafts_than_tokens(device):
    arguments = example("draft_topk", device=device)
    arguments["projection"] = arguments["projection"][:4].contiguous()
    with pytest.raises(RuntimeError, match="draft_topk: drafts must be at most Vd = 4, got 5"):
        ops.draft_topk(**arguments)


@pytest.mark.parametrize("drafts", [0, 33])
def test_rerank_takes_so_many_drafts(drafts, device):
    wrong = torch.zeros(2, 3, drafts, dtype=torch.int64, device=device)
    rejects("rerank", device, "ids", wrong, "(B, K, P) with P from 1 to 32", str(drafts))


def test_query_heads_are_a_multiple(device):
    arguments = example("tree_attention", device=device)
    wrong = arguments["q"][:, :, :3].contiguous()
    must_be = "(B, N, Hq, E) with Hq a multiple of Hkv = 2"
    rejects("tree_attention", device, "q", wrong, must_be, str(tuple(wrong.shape)))


def test_columns_of_the_heads(device):
    """Neither D nor 2D columns."""
    wrong = example("head_stack", device=device)["weight"][..., :40].contiguous()
    must_be = SHAPES["head_stack"]["weight"][0]
    rejects("head_stack", device, "weight", wrong, must_be, "(2, 4, 33, 40)")


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in TENSORS if len(SHAPES[op]) > 1])
def test_device(op, name, device):
    """One tensor without data among tensors with data; on CUDA also one on the CPU."""
    arguments = example(op, device=device)
    names = list(SHAPES[op])
    for elsewhere in ("meta",) if device == "cpu" else ("meta", "cpu"):
        right, wrong = str(arguments[name].device), arguments[name].to(elsewhere)
        if name != names[0]:
            rejects(op, device, name, wrong, f"on {right} like {names[0]}", elsewhere)
            continue
        # The first one says where the others have to be, so that the second one is blamed.
        message = f"{op}: {names[1]} must be on {elsewhere} like {name}, got {right}"
        with pytest.raises(RuntimeError, match=re.escape(message)):
            getattr(ops, op)(**arguments | {name: wrong})


def test_a_wrong_call_changes_nothing(device):
    """The two ops that write check everything first."""
    for op, name in (("write_cache", "length"), ("commit_cache", "accepted")):
        arguments = example(op, device=device)
        before = {k: v.clone() for k, v in arguments.items()}
        with pytest.raises(RuntimeError, match=f"{op}: {name} must be"):
            getattr(ops, op)(**arguments | {name: arguments[name][:1]})
        assert all(torch.equal(arguments[k], before[k]) for k in before)
