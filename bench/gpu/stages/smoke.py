"""The checks of bench/gpu/smoke.py, the quickest and most telling ones first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import kernels
import machine
import stage
import steps
import torch
from op_cases import CUDA_OPS, TOLERANCE, assert_close, assert_same_bits, example
from shapes import SHAPES
from subject import our_way, random_heads
from torch import Tensor
from torch.utils._pytree import tree_leaves

from cerberus_ext import Decoder, decode, ops
from cerberus_ext.ops import libraries
from cerberus_ext.runtime.recorder import CudaRecorder
from cerberus_ext.runtime.runtime import runtime_of

REPLAYS = 2000
KERNELS = 5
Row = dict[str, Any]


def library_row(run: stage.Stage) -> Row:
    loaded = {library.name: library.reason or "loaded" for library in libraries.load_libraries()}
    wanted = ("_C.so",) if run.on_cpu else ("_C.so", "_cuda.so")
    assert all(loaded.get(name) == "loaded" for name in wanted), loaded
    return loaded


def copy_row(run: stage.Stage) -> Row:
    return {"copy_bytes_per_second": machine.copy_bandwidth(run.device)}


def tensors_of(results: Any, arguments: Row) -> list[Tensor]:
    """What an op returns; where it returns nothing, what it was given."""
    return [leaf for leaf in tree_leaves(arguments if results is None else results) if isinstance(leaf, Tensor)]


def op_row(run: stage.Stage, op: str) -> Row:
    """The op against its twin on the CPU, in every dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = []
        for device in ("cpu", run.device):
            arguments = example(op, dtype, device)
            found.append(tensors_of(getattr(ops, op)(**arguments), arguments))
        for want, got in zip(*found, strict=True):
            if op in TOLERANCE and want.is_floating_point():
                assert_close(op, got.cpu(), want, dtype, cuda=True)
            else:
                assert torch.equal(got.cpu(), want), f"{op} differs in {dtype}"
    return {"dtypes": 3}


def graph_row(run: stage.Stage) -> Row:
    """All ops in one graph, replayed and compared with a run that waited for each."""
    calls = [(op, example(op, torch.bfloat16, run.device)) for op in CUDA_OPS]
    written = [leaf for _, arguments in calls for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    before, results = [tensor.clone() for tensor in written], list[Tensor]()

    def every() -> None:
        torch._foreach_copy_(written, before)
        results[:] = [leaf for op, given in calls for leaf in tensors_of(getattr(ops, op)(**given), given)]

    every()
    want = [result.clone() for result in results]
    if run.on_cpu:
        every()
    else:
        recorder = CudaRecorder(torch.device(run.device))
        recorder.warm_up(every, last=True)
        replay = recorder.record(every)
        for _ in range(REPLAYS):
            replay()
        torch.cuda.synchronize()
    for got, right in zip(results, want, strict=True):
        assert_same_bits(got.cpu(), right.cpu())
    return {"ops": len(calls), "replays": 0 if run.on_cpu else REPLAYS}


def decode_row(run: stage.Stage) -> Row:
    """The text of a small model, with graphs and without, with drafts and without."""
    shapes = SHAPES["tiny"]
    model = steps.random_model(shapes, run.device, 256).float()
    heads = random_heads(shapes.vocab, shapes.hidden).to(run.device)
    ids = torch.arange(9, device=run.device)[None] % shapes.vocab
    texts = {}
    for graphs in (False,) if run.on_cpu else (False, True):
        for tree in (2, 16):
            out = decode(model, heads, ids, max_new_tokens=40, tree=tree, graphs=graphs)
            texts[f"graphs {graphs}, {tree} nodes"] = out.sequences.tolist()
            assert graphs == (out.stats.graphed_steps > 0), out.stats.fallback
    assert len({str(text) for text in texts.values()}) == 1, texts
    return {"texts": len(texts)}


def kernel_row(run: stage.Stage, case: kernels.Case) -> Row:
    row, problems = kernels.measure(case, run.device, machine.copy_bandwidth(run.device))
    assert not problems, problems
    return row


def blocks_row(run: stage.Stage) -> Row:
    """The text of a small model from a file of fewer bits, with the weights in blocks and as they are."""
    shapes = SHAPES["tiny"]
    model = steps.random_model(shapes, run.device, 256).bfloat16()
    steps.put_few_bits(model)
    ids = torch.arange(9, device=run.device)[None] % shapes.vocab
    texts, packed = [], {}
    for pack in (False, True):
        for tree in (2, 16):
            out = decode(model, None, ids, max_new_tokens=40, tree=tree, fuse=True, pack=pack)
            texts.append(out.sequences.tolist())
        fused = runtime_of(model)._fused
        packed = {} if fused is None else fused[1].packed
    Decoder(model).close()
    assert texts.count(texts[0]) == len(texts), texts
    return {"texts": len(texts), "packed": packed}


def step_row(run: stage.Stage, name: str, nodes: int, few_bits: bool = False) -> Row:
    context = 64 if run.on_cpu else 512
    measured = steps.Steps(SHAPES[name], run.device, (context,), few_bits)
    row, problem = steps.measure(measured, context, nodes, machine.copy_bandwidth(run.device), run)
    assert problem is None, problem
    ids = torch.zeros(1, context, dtype=torch.int64, device=run.device)
    our_way("", measured.model, measured.heads, nodes, not run.on_cpu).run(ids, 4)
    fused = runtime_of(measured.model)._fused
    launches = {} if fused is None else getattr(fused[1]._native, "launches", {})  # a step on a CPU has none
    Decoder(measured.model).close()
    return row | {"launches": max(launches.values(), default=None)}


def checks(run: stage.Stage) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Their names, and what gives a row or raises."""
    yield "libraries", lambda: library_row(run)
    yield "copy", lambda: copy_row(run)
    for op in CUDA_OPS:
        yield f"op {op}", lambda op=op: op_row(run, op)  # type: ignore[misc]
    yield "graph of all ops", lambda: graph_row(run)
    yield "decode", lambda: decode_row(run)
    yield "decode with weights in blocks", lambda: blocks_row(run)
    for case in kernels.plan(run.device)[:KERNELS]:
        yield f"kernel {case.key}", lambda case=case: kernel_row(run, case)  # type: ignore[misc]
    for nodes in (1, 32):
        name = "tiny" if run.on_cpu else "135M"
        yield f"step {name} {nodes}", lambda name=name, nodes=nodes: step_row(run, name, nodes)  # type: ignore[misc]
    yield f"step {name} 1 in four bits", lambda: step_row(run, name, 1, few_bits=True)


def body(run: stage.Stage) -> None:
    for name, check in checks(run):
        if not run.begin(name, limit=60):
            continue
        try:
            row = check()
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
            run.problems.append(f"{name}: {row['error']}")
        run.add(name, row)
        print(f"{name}: {row}", flush=True)
