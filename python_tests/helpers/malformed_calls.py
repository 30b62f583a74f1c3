"""Malformed calls of every op: no crash, no hang, and every refusal names an argument.

    python malformed_calls.py FIRST COUNT

makes the calls FIRST .. FIRST + COUNT, the same ones at every run, writes each one's number before it is made, so that
whoever started this process knows which one ended it, and at last a line of JSON: how many were accepted and refused,
and the refusals that name no argument. Call number 7 alone: python malformed_calls.py 7 1

With a library that is built with the address sanitizer, see docs/testing.md, memory has no limit here: the sanitizer's
own is larger than any.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

import native_calls
import torch
from native_calls import NATIVE_EXAMPLES
from op_cases import DTYPES, EXAMPLES, example
from torch import Tensor

from cerberus_ext import ops

SECONDS = 20.0  # a call; far more than any takes
MEMORY = 8 << 30  # of addresses: what asks for more is refused, not left to the machine

# The letters of the axes: sizes that agree get deeper than sizes that do not.
AXES = {
    "hidden_entropy": "hidden BD",
    "head_stack": "hidden BD, anchor BD, weight LKDD, bias LKD",
    "draft_topk": "states BKD, projection VD",
    "rerank": "ids BKP, logprobs BKP, parents JVR, children VR, slopes J, rest J",
    "choose_tokens": "logits MV, positions M, numbers 3",
    "tree_attention": "q BNHE, keys BGSE, values BGSE, length B, ancestors NW, sinks H",
    "write_cache": "keys BHSE, values BHSE, new_keys BNHE, new_values BNHE, length B",
    "verify_tree": "draft BN, target BN, parents N, ancestors NW",
    "commit_cache": "cache CBHSE, length B, path BP, accepted B",
    "linear": "input MI, weight OI, bias O",
    "activation": "input XYZ",
}
HUGE = (2**40, 2**62)  # whose results never fit into memory either
INTEGERS = (-(2**63), -(2**31) - 1, -1, 0, 1, 2, 4, 5, 31, 32, 33, 2**31 - 1, 2**31, 2**40, 2**63 - 1)
FLOATS = (math.nan, math.inf, -math.inf, -1.0, -0.0, 0.0, 1e-320, 1e-60, 1e-40, 0.5, 1.0, 1e30, 1e39, 1e308)
OTHER = (None, "x", 1.5, True, [1], 2**63, -(2**63) - 1, 10**40, b"x", (), {})
TYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64, torch.bool,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint64,
)  # fmt: skip


# ---------------------------------------------------------------- one wrong tensor, of a right one


def _size(r: random.Random) -> int:
    return r.choice((0, 1, 2, 3, 5, 33, 64, 65))


def _possible(shape: list[int]) -> list[int]:
    """Not more elements than an op works through in no time; without elements, any sizes."""
    return shape if math.prod(shape) <= 2**20 else [min(size, 3) for size in shape]


def _other_shape(t: Tensor, r: random.Random) -> Tensor:
    shape = list(t.shape)
    kind = r.randrange(4)
    if kind == 0 and shape:
        shape[r.randrange(len(shape))] = _size(r)
    elif kind == 1 and shape:
        del shape[r.randrange(len(shape))]
    elif kind == 2:
        shape.insert(r.randint(0, len(shape)), r.choice((0, 1, 2)))
    else:
        shape = [r.choice((0, 1, 2, 3)) for _ in range(r.randrange(7))]
    return t.new_zeros(_possible(shape))


def _huge_and_empty(t: Tensor, r: random.Random) -> Tensor:
    shape = [r.choice((0, 1, 2)) for _ in t.shape] or [0]
    shape[r.randrange(len(shape))] = 0
    shape[r.randrange(len(shape))] = 2**40
    return t.new_zeros(shape if 0 in shape else [0])


def _values(t: Tensor, r: random.Random) -> Tensor:
    t = t.clone()
    if t.dtype in (torch.int32, torch.int64):
        limits = torch.iinfo(t.dtype)
        choices = [limits.min, limits.min + 1, -1, 0, 1, 7, 2**31 - 1, limits.max - 1, limits.max]
        return t.flatten().apply_(lambda _: r.choice(choices)).view(t.shape) if t.numel() < 10_000 else t
    if t.is_floating_point() and t.numel():
        t.view(-1)[:: r.randint(1, 3)] = r.choice((math.nan, math.inf, -math.inf, 3e38, 0.0, -0.0, 1e-45))
    return t


def _nested(layout: torch.layout) -> Callable[[Tensor, random.Random], Tensor]:
    return lambda t, r: torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(1, 3)], layout=layout)


def _rank_two(t: Tensor) -> Tensor:
    return t if t.dim() >= 2 else torch.zeros(4, 6, dtype=t.dtype)


MUTATIONS: dict[str, Callable[[Tensor, random.Random], Any]] = {
    "another shape": _other_shape,
    "huge and empty": _huge_and_empty,
    "other values": _values,
    "another dtype": lambda t, r: t.to(r.choice(TYPES)),
    "strided": lambda t, r: torch.stack([t, t], -1)[..., r.randrange(2)],
    "transposed": lambda t, r: t.transpose(0, -1) if t.dim() else t,
    "expanded": lambda t, r: t[..., :1].expand(t.shape) if t.dim() else t,
    "flipped": lambda t, r: t.flip(0) if t.dim() else t,
    "one element further": lambda t, r: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "sparse COO": lambda t, r: t.to_sparse(),
    "sparse CSR": lambda t, r: _rank_two(t).to_sparse_csr(),
    "sparse CSC": lambda t, r: _rank_two(t).to_sparse_csc(),
    "sparse BSR": lambda t, r: torch.zeros(4, 6, dtype=t.dtype).to_sparse_bsr((2, 3)),
    "mkldnn": lambda t, r: t.to_mkldnn(),
    "quantized": lambda t, r: torch.quantize_per_tensor(t.float(), 0.1, 0, r.choice((torch.qint8, torch.quint8))),
    "conj": lambda t, r: t.to(torch.complex64).conj(),
    "negated": lambda t, r: t.to(torch.complex64).conj().imag,
    "nested": _nested(torch.strided),
    "jagged": _nested(torch.jagged),
    "meta": lambda t, r: t.to("meta"),
    "huge meta": lambda t, r: t.new_empty([r.choice((1, 2**20, 2**31)) for _ in t.shape[:2]], device="meta"),
    "a parameter": lambda t, r: torch.nn.Parameter(t),
    "needs a gradient": lambda t, r: t.clone().requires_grad_(),
    "None": lambda t, r: None,
    "no tensor": lambda t, r: r.choice((1, 1.5, "x", [t], t.numpy() if t.dtype is not torch.bfloat16 else b"x")),
}  # fmt: skip


def _mutated(value: Tensor, r: random.Random) -> tuple[Any, str]:
    how = r.choice(sorted(MUTATIONS))
    try:
        return MUTATIONS[how](value, r), how
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError) as error:
        return value, f"not {how}: {str(error)[:40]}"  # torch cannot make such a tensor of this one


def _other_list(values: list[Tensor], r: random.Random) -> tuple[list[Any], str]:
    """One tensor of it another, more of it or less."""
    values, place = list(values), r.randrange(len(values))
    if r.random() < 0.7:
        values[place], how = _mutated(values[place], r)
        return values, f"[{place}] {how}"
    kept = r.choice((0, 1, place, len(values) + 1))
    return (values * 2)[:kept], f"{kept} of them"


def _number(value: Any, r: random.Random) -> Any:
    if r.random() < 0.2:
        return r.choice(OTHER)
    if isinstance(value, str):
        return r.choice(("", "silu", "cos", "sin ", "x" * 1000, "\0", "gelu"))
    return r.choice(FLOATS if isinstance(value, float) else INTEGERS)


# ---------------------------------------------------------------- calls


def _sized(op: str, dtype: torch.dtype, r: random.Random) -> dict[str, Any]:
    """A call whose sizes agree, 0 and huge ones among them."""
    arguments = example(op, dtype)
    axes = dict(text.split() for text in AXES[op].split(", "))
    sizes = {letter: _size(r) for letter in sorted(set("".join(axes.values())))}
    sizes["W"] = -(-sizes.get("N", 0) // 64)
    sizes["3"] = 3
    for letter in r.sample(sorted(sizes), r.randint(0, 2)):
        sizes[letter] = r.choice((0, *HUGE)) if letter != "W" else sizes[letter]
    for name, letters in axes.items():
        shape = [sizes[letter] for letter in letters]
        shape = _possible(shape)
        try:
            arguments[name] = torch.zeros(shape, dtype=arguments[name].dtype)
        except RuntimeError:  # torch itself does not make such a tensor
            arguments[name] = arguments[name].new_zeros([0] * len(shape))
    return arguments


def make(index: int) -> tuple[str, dict[str, Any], list[str]]:
    """Call number `index`: the op, its arguments, and what was done to them."""
    r = random.Random(index)
    torch.manual_seed(index)
    op = r.choice(sorted((*EXAMPLES, *NATIVE_EXAMPLES)))
    dtype = r.choice(DTYPES)
    done = []
    if op in AXES and r.random() < 0.4:
        arguments, done = _sized(op, dtype, r), ["sizes that agree"]
    else:
        arguments = example(op, dtype) if op in EXAMPLES else NATIVE_EXAMPLES[op](dtype)
    for name in r.sample(sorted(arguments), r.choice((0, 1, 1, 1, 2, 3)) % (len(arguments) + 1)):
        value = arguments[name]
        if isinstance(value, list):
            arguments[name], how = _other_list(value, r)
            done.append(f"{name}: {how}")
        elif isinstance(value, Tensor):
            arguments[name], how = _mutated(value, r)
            done.append(f"{name}: {how}")
        else:
            arguments[name] = _number(value, r)
            done.append(f"{name}: {arguments[name]!r}"[:80])
    return op, arguments, done


def describe(index: int) -> str:
    op, arguments, done = make(index)

    def text(value: Any) -> str:
        if not isinstance(value, Tensor) or value.is_nested:
            return repr(value)[:60]
        return f"{value.dtype} {tuple(value.shape)} {value.layout} {value.device}"

    given = ", ".join(f"{name}={text(value)}" for name, value in arguments.items())
    return f"call {index}: {op}({given}); {'; '.join(done)}"


def names_an_argument(op: str, message: str) -> bool:
    """As the op says it, or as torch does where it compares a call with the schema. Of NATIVE_EXAMPLES torch itself
    refuses nested, conjugate and negated tensors."""
    kept = (
        f"Could not run 'cerberus_ext::{op}' with arguments from", "Expected Tensor but got ", " fallback doesn't",
        "negation fallback does not support", "conjugate fallback does not support",
    )  # fmt: skip
    if op in NATIVE_EXAMPLES and message.startswith(kept):
        return True
    schema = [argument.name for argument in getattr(torch.ops.cerberus_ext, op).default._schema.arguments]
    said = re.match(rf"{op}: (\w+)(?:: .*)? must be ", message) or re.search(r"argument '(\w+)'", message)
    return said is not None and said[1] in schema


def run(first: int, count: int) -> dict[str, Any]:
    accepted, refused, wrong = 0, 0, []
    for index in range(first, first + count):
        op, arguments, _ = make(index)
        sys.stdout.write(f"{index}\n")
        sys.stdout.flush()
        signal.setitimer(signal.ITIMER_REAL, SECONDS)  # nobody catches the signal: it ends the process
        try:
            if op in EXAMPLES:
                getattr(ops, op)(**arguments)
            else:
                native_calls.call(op, arguments)
            accepted += 1
        except (RuntimeError, TypeError, ValueError) as error:
            refused += 1
            if not names_an_argument(op, str(error)):
                wrong.append(f"{describe(index)}\n  {type(error).__name__}: {str(error)[:300]}")
        except Exception as error:
            wrong.append(f"{describe(index)}\n  {error!r}"[:500])
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {"accepted": accepted, "refused": refused, "wrong": wrong}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(2)
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]))))
