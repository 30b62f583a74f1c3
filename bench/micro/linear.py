r"""`linear` at the shapes of small and large models, beside torch's and both limits: memory and multiply-adds.

    GOMP_SPINCOUNT=20000 python bench/micro/linear.py [--op linear] [--dtype bfloat16] \
        [--other OLD_LIBRARY.so=NAMESPACE] [--out RESULT.json]

One process, calls take turns: torch, the other build, ours, a plain sum over the same weights, which is what reading
them takes, and a loop of multiply-adds over registers (multiply_adds.cpp, compiled here). Weights have left the last
cache before they are used again. The share is the larger of these two limits over our time; medians, and the fastest
tenth (p10), which tells more where other programs run. Without GOMP_SPINCOUNT torch's threads spin on behind a call for
some 20 ms where a pause takes 140 cycles (Emerald Rapids), beside whatever is measured next.

`transposed` has weights (I, O), beside torch's matmul, as GPT-2's Conv1D; `grouped` 8 weights, and the rows in 8 groups
(fewer where there are fewer rows) beside a loop of torch's linear over the groups, as a mixture model's experts. At a
lower level (CERBERUS_ISA) torch is to be held to the same one: ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY and
MKL_ENABLE_INSTRUCTIONS, which the result names.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cerberus_ext import ops

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "shared"))
import machine  # noqa: E402

SHAPES = ((576, 576), (192, 576), (1536, 576), (576, 1536), (49152, 576), (4096, 4096), (14336, 4096))  # (O, I)
ROWS = (1, 2, 4, 6, 8, 12, 16, 32, 64, 512)
COLD_BYTES = 2**27  # of weights that take turns: several last caches
FEWEST, MOST = 5, 400
IN_A_ROW, PAUSE, WARM_UP = 4, 0.003, 0.002  # calls, seconds, seconds
GROUPS = 8
SETTINGS = ("GOMP_SPINCOUNT", "CERBERUS_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")


def multiply_adds(dtype: torch.dtype) -> Callable[[], float]:
    """A function that says how many a second torch's number of threads do right now."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "multiply_adds.so"
        source = Path(__file__).parent / "multiply_adds.cpp"
        compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
        flags = ["-std=c++17", "-O3", "-march=native", "-pthread", "-shared", "-fPIC"]
        subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
        loop = ctypes.CDLL(str(library)).multiply_adds
    loop.argtypes, loop.restype = (ctypes.c_int, ctypes.c_bool), ctypes.c_double
    paired = torch.ops.cerberus_ext.cpu_isa() in ("avx512_bf16", "amx_bf16")
    return lambda: float(loop(torch.get_num_threads(), paired and dtype is torch.bfloat16))


def weights_of(op: str, outputs: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    shape = {"linear": (outputs, size), "transposed": (size, outputs), "grouped": (GROUPS, outputs, size)}[op]
    first = (torch.randn(shape) * size**-0.5).to(dtype)
    count = max(2, -(-COLD_BYTES // first.nbytes))
    return [first] + [first.clone() for _ in range(count - 1)]


def percentile(seconds: list[float], share: float) -> float:
    return sorted(seconds)[int(share * (len(seconds) - 1))]


def measure(
    calls: dict[str, Callable[[Tensor], Any]], weights: list[Tensor], peak: Callable[[], float], budget: float
) -> dict[str, list[float]]:
    """name -> seconds of each call, "peak": multiply-adds a second; a call reads weights that none has read for long.

    A few calls of each in a row: torch's threads go on spinning behind a call, beside what comes next. So there is a
    pause before each, and its first calls, for which threads wake up, do not count.
    """
    found: dict[str, list[float]] = {name: [] for name in (*calls, "peak")}
    turn = 0
    until = time.perf_counter() + budget
    while (time.perf_counter() < until or turn < FEWEST * len(calls)) and turn < MOST * len(calls):
        for name, call in calls.items():
            time.sleep(PAUSE)
            begun, counted = time.perf_counter(), 0
            while counted < IN_A_ROW:
                weight = weights[turn % len(weights)]
                start = time.perf_counter()
                call(weight)
                end = time.perf_counter()
                if start - begun > WARM_UP:
                    found[name].append(end - start)
                    counted += 1
                turn += 1
        found["peak"].append(peak())
    return found


def calls_of(op: str, input: Tensor, others: dict[str, Any]) -> dict[str, Callable[[Tensor], Any]]:
    """What takes turns, each a function of the weights."""
    rows = len(input)
    if op == "grouped":
        active = min(GROUPS, rows)
        groups = list(enumerate(pairwise(rows * group // active for group in range(active + 1))))
        chosen = torch.tensor([group for group, (a, b) in groups for _ in range(a, b)])[:, None]
        return {
            "torch": lambda weight: [F.linear(input[a:b], weight[group]) for group, (a, b) in groups],
            "ours": lambda weight: ops.grouped_linear(input[:, None], weight, None, chosen),
            "sum": lambda weight: weight[:active].view(-1).view(torch.float32).sum(),
        }
    transposed = op == "transposed"
    calls: dict[str, Callable[[Tensor], Any]] = {"torch": input.matmul if transposed else partial(F.linear, input)}
    for name, linear in others.items():
        calls[name] = partial(linear, input, bias=None)
    calls["ours"] = lambda weight: ops.linear(input, weight, None, transposed)
    calls["sum"] = lambda weight: weight.view(-1).view(torch.float32).sum()
    return calls


def case(
    op: str,
    shape: tuple[int, int, int],
    weights: list[Tensor],
    others: dict[str, Any],
    peak: Callable[[], float],
    budget: float,
) -> dict[str, Any]:
    outputs, size, rows = shape
    calls = calls_of(op, torch.randn(rows, size).to(weights[0].dtype), others)
    seconds = measure(calls, weights, peak, budget)
    rates = seconds.pop("peak")
    result: dict[str, Any] = {"outputs": outputs, "inputs": size, "rows": rows}
    for label, share in (("median", 0.5), ("p10", 0.1)):
        found = {name: percentile(each, share) * 1e6 for name, each in seconds.items()}
        found["multiply_adds"] = rows * outputs * size / percentile(rates, 1 - share) * 1e6
        result[label] = {name: round(value, 1) for name, value in found.items()}
        result[label]["share"] = round(max(found["sum"], found["multiply_adds"]) / found["ours"], 3)
    result["calls"] = len(seconds["ours"])
    return result


def line(result: dict[str, Any], others: dict[str, Any]) -> str:
    text = f"({result['outputs']}, {result['inputs']})".ljust(15) + f"{result['rows']:>4}"
    for label in ("median", "p10"):
        found = result[label]
        names = ["torch", *others, "ours", "sum", "multiply_adds"]
        text += " |" + "".join(f"{found[name]:>10.1f}" for name in names) + f" {found['share']:>5.0%}"
    return text


def loaded(other: str | None) -> dict[str, Any]:
    """The `linear` of another build, whose library registers its ops under a namespace of its own."""
    if other is None:
        return {}
    library, namespace = other.rsplit("=", 1)
    torch.ops.load_library(library)
    return {"other": getattr(torch.ops, namespace).linear}


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", default="linear", choices=["linear", "transposed", "grouped"])
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--other", help="LIBRARY=NAMESPACE of another build")
    parser.add_argument("--shapes", help="like 576x576,192x576: outputs x inputs")
    parser.add_argument("--rows", help="like 1,8,16")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each shape and number of rows")
    parser.add_argument("--out", type=Path, help="JSON")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    shapes = [tuple(map(int, s.split("x"))) for s in arguments.shapes.split(",")] if arguments.shapes else SHAPES
    rows = [int(r) for r in arguments.rows.split(",")] if arguments.rows else ROWS
    others = loaded(arguments.other)
    peak = multiply_adds(dtype)
    print(machine.text())
    print("microseconds, median | fastest tenth; the last two are the limits, memory and multiply-adds:")
    names = "".join(f"{name:>10}" for name in ["torch", *others, "ours", "sum", "madds"])
    print(f"{'(O, I)':<15}rows |{names} share |{names} share")
    results = []
    for outputs, size in shapes:
        weights = weights_of(arguments.op, outputs, size, dtype)
        for count in rows:
            shape = (outputs, size, count)
            results.append(case(arguments.op, shape, weights, others, peak, arguments.seconds))
            print(line(results[-1], others), flush=True)
        del weights
    if arguments.out:
        about = machine.describe() | {"date": date.today().isoformat(), "commit": commit()}
        about |= {"op": arguments.op, "dtype": arguments.dtype}
        about |= {name: os.environ[name] for name in SETTINGS if name in os.environ}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        cases = ",\n".join(json.dumps(result) for result in results)
        arguments.out.write_text('{"machine": ' + json.dumps(about, indent=1) + ',\n"cases": [\n' + cases + "\n]}\n")


if __name__ == "__main__":
    main()
