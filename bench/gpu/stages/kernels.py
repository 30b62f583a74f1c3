"""Stage "kernels" of a GPU session: every op at the sizes of three models, against PyTorch and against a copy's speed.

Each number is the median of a call, within a CUDA graph of many and alone, on inputs that have left the L2 cache where
they are large enough (timing.py). PyTorch's version and cuBLAS or SDPA alone are timed in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import machine
import op_calls
import stage
import torch
from op_calls import TOLERANCE, Calls
from shapes import SHAPES, Shapes
from timing import Call, alone, copies_for, in_graph, tried

LENGTHS = (512, 2048, 8192)
SAMPLED = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}


@dataclass(frozen=True)
class Case:
    """A row of the table: an op, a model's shapes, and what else the call is made with."""

    op: str
    model: str
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        options = " ".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.model} {str(self.dtype).removeprefix('torch.')} {self.op} {options}".strip()

    def make(self, device: str) -> Calls:
        return getattr(op_calls, self.op)(SHAPES[self.model], self.dtype, device, **self.options)


def cases(model: str, dtype: torch.dtype) -> Iterator[Case]:
    """Those first that there is a target for."""
    shapes = SHAPES[model]

    def case(op: str, **options: Any) -> Case:
        return Case(op, model, dtype, options)

    yield case("head_stack", rows=1)
    for vocab in shapes.draft_vocabs:
        yield case("draft_topk", vocab=vocab, rows=1)
    for length in _lengths(shapes):
        yield case("tree_attention", nodes=64, length=length)
    yield case("after_forward")
    for length in LENGTHS[1:]:
        yield case("tree_attention", nodes=1, length=length)
    yield case("hidden_entropy")
    yield case("rerank")
    yield case("choose_tokens")
    yield case("choose_tokens", **SAMPLED)
    yield case("verify_tree")
    yield case("write_cache")
    yield case("commit_cache")
    if model != "135M":
        yield case("head_stack", rows=8)
        yield case("draft_topk", vocab=shapes.draft_vocabs[0], rows=8)


def _lengths(shapes: Shapes) -> tuple[int, ...]:
    return (*LENGTHS, 32768) if shapes.name == "8B" else LENGTHS


def plan(device: str) -> list[Case]:
    if device == "cpu":
        return list(cases("tiny", torch.float32))
    bf16, fp32 = torch.bfloat16, torch.float32
    return [case for model, dtype in (("8B", bf16), ("135M", bf16), ("1B", bf16), ("135M", fp32))
            for case in cases(model, dtype)]  # fmt: skip


def measure(case: Case, device: str, copy_speed: float) -> tuple[dict[str, Any], list[str]]:
    """The row, and what is wrong with the op's result or its call."""
    torch.manual_seed(0)
    first = case.make(device)
    count, cold = (2, False) if device == "cpu" else copies_for(first.bytes, device)
    row: dict[str, Any] = {
        "op": case.op,
        "model": case.model,
        "dtype": str(case.dtype).removeprefix("torch."),
        **case.options,
        "bytes": first.bytes,
        "copies": count,
        "cold": cold,
        "notes": {},
    }
    row["difference"], failure = tried(lambda: difference(first), device)
    if failure:
        return row | {"error": failure}, [f"{case.key}: {failure}"]
    problems = []
    if row["difference"] is not None and not row["difference"] <= TOLERANCE[case.dtype]:  # NaN, too
        problems.append(f"{case.key}: differs from PyTorch by {row['difference']:.2g} of its norm")
    everyone = [first, *(case.make(device) for _ in range(count - 1))]
    for side in ("ours", "eager", "library"):
        calls = [call for call in (getattr(one, side) for one in everyone) if call is not None]
        if calls:
            times, notes = timings(calls, [one.reset for one in everyone if one.reset is not None], device)
            row |= {f"{side}_{name}": value for name, value in times.items()}
            row["notes"] |= {f"{side} {name}": failure for name, failure in notes.items()}
    problems += [f"{case.key}: {name}: {failure}" for name, failure in row["notes"].items() if name.startswith("ours")]
    return row | compared(row, copy_speed), problems


def timings(calls: list[Call], resets: list[Call], device: str) -> tuple[dict[str, float | None], dict[str, str]]:
    """Microseconds in a graph, alone, and the one of both that counts; and what went wrong with either."""

    def reset() -> None:
        for one in resets:
            one()

    times: dict[str, float | None] = {}
    notes = {}
    ways: dict[str, Callable[[], float]] = {"alone": lambda: alone(calls, reset, device, repeats(device))}
    if device != "cpu":
        ways["graph"] = lambda: in_graph(calls, reset)
    for name, way in ways.items():
        seconds, failure = tried(way, device)
        times[f"{name}_us"] = None if seconds is None else seconds * 1e6
        if failure:
            notes[name] = failure
    return times | {"us": times.get("graph_us") or times["alone_us"]}, notes


def compared(row: dict[str, Any], copy_speed: float) -> dict[str, float | None]:
    """What the times of a row say about each other and about the memory."""
    ours = row["ours_us"]
    if ours is None:
        return {}
    others = [row[name] for name in ("eager_us", "library_us") if row.get(name)]
    speed = row["bytes"] / ours * 1e6
    return {
        "gigabytes_per_second": speed / 1e9,
        "share_of_copy": speed / copy_speed,
        "over_eager": row["eager_us"] / ours if row["eager_us"] else None,
        "over_best_pytorch": min(others) / ours if others else None,
    }


def repeats(device: str) -> int:
    return 3 if device == "cpu" else 30


def difference(calls: Calls) -> float | None:
    got, want = calls.ours(), calls.eager()
    found = None if calls.difference is None else calls.difference(got, want)
    if calls.reset is not None:
        calls.reset()
    return found


def body(run: stage.Stage) -> None:
    copy_speed = run.result["copy_bytes_per_second"] = machine.copy_bandwidth(run.device)
    for case in plan(run.device):
        if run.begin(case.key, limit=30):
            row, problems = measure(case, run.device, copy_speed)
            run.problems += problems
            run.add(case.key, row)
            print(case.key, row, flush=True)
            if run.device == "cuda":
                torch.cuda.empty_cache()
