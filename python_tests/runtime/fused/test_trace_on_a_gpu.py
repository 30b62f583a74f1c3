"""What a model's step is traced to where the model is not on a CPU: the same. No GPU is needed: tensors without data
may be on the device "meta", too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from context_stand_ins import heads_for
from fused_steps import every_call_seen
from tiny_families import tiny_family
from tiny_models import prompt, tiny_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cerberus_ext.runtime.fused import context, trace
from cerberus_ext.runtime.fused.context import trace_context
from cerberus_ext.runtime.fused.lower import lower
from cerberus_ext.runtime.fused.program import Rows
from cerberus_ext.runtime.fused.trace import Call, Ref, Trace, evaluate, trace_step
from cerberus_ext.runtime.runtime import runtime_of
from cerberus_ext.target.experts import experts_switch

ELSEWHERE = torch.device("meta")


class _Elsewhere(trace.Tracing):
    """Of a model on the CPU, as if it were elsewhere."""

    def __init__(self, named: Any, cache: Any, layers: int) -> None:
        from_tensor = FakeTensorMode.from_tensor

        def moved(mode: FakeTensorMode, tensor: Tensor, **options: Any) -> Any:
            fake = from_tensor(mode, tensor, **options)
            with mode:
                return torch.empty_like(fake, device=ELSEWHERE)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(FakeTensorMode, "from_tensor", moved)
            tensor: Any = SimpleNamespace(shape=cache.tensor.shape, dtype=cache.tensor.dtype, device=ELSEWHERE)
            super().__init__(named, SimpleNamespace(tensor=tensor), layers)  # type: ignore[arg-type]


def calls(found: Trace) -> list[tuple[Any, ...]]:
    """Without the devices that they name."""
    return [
        (call.op, call.args, {name: value for name, value in call.kwargs.items() if name != "device"}, call.outputs)
        for call in found.calls
    ]


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma", "gpt2", "gpt_neox", "phi3", "mixtral", "qwen3_moe"])
def test_is_the_trace_of_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_family(name)
    with torch.inference_mode(), every_call_seen(model) as target:
        target.prefill(prompt())
        here = trace_step(target)
        monkeypatch.setattr(trace, "Tracing", _Elsewhere)
        if experts_switch(model):  # which only a model on a CPU has by itself
            target._switches.pop()
        there = trace_step(target)
    assert there.device == ELSEWHERE and here.device == torch.device("cpu")
    assert calls(there) == calls(here)
    ours = {str(call.op) for call in there.calls if call.op.namespace == "cerberus_ext"}
    assert {"cerberus_ext.linear.default", "cerberus_ext.tree_attention.default"} <= ours
    assert ("cerberus_ext.grouped_linear.default" in ours) == (name in ("mixtral", "qwen3_moe"))


@pytest.mark.parametrize("keeps", [False, True])
def test_a_context_layer_is_the_program_of_the_cpu(keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    drafter: Any = heads_for(model).bind(model)
    found = []
    with torch.inference_mode(), runtime_of(model).target(64, context=True) as target:
        target.prefill(prompt())
        for tracing in (trace.Tracing, _Elsewhere):
            monkeypatch.setattr(context, "Tracing", tracing)
            traced = trace_context(drafter.context, target.cache, keeps)
            program = lower(traced, torch.float32, 2, 8, False, 300)
            stages = [
                [one.op for one in stage.instructions] if isinstance(stage, Rows) else type(stage)
                for stage in program.stages
            ]
            found.append((traced.device, stages))
    (here, ours), (there, theirs) = found
    assert (here, there) == (torch.device("cpu"), ELSEWHERE)
    assert ours == theirs and len(ours) == (3 if keeps else 8)


def test_ops_that_only_a_cpu_has_are_called_there() -> None:
    """A table of positions, or a constant, is made of them on the way to a GPU."""
    given = []

    class Op:
        namespace = "cerberus_ext"

        def __call__(self, input: Tensor, kind: str) -> Tensor:
            given.append(input.device.type)
            return input * 2

    with FakeTensorMode():
        (made,) = evaluate(Call(Op(), (Ref(0), "cos"), {}, (1,)), {0: torch.empty(3, device="cuda:0")})
    assert given == ["cpu"] and made.device.type == "cuda"
