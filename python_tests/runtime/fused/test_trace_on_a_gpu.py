"""What a model's step is traced to where the model is not on a CPU: the same. No GPU is needed: tensors without data
may be on the device "meta", too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fused_steps import every_call_seen
from tiny_families import tiny_family
from tiny_models import prompt
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cerberus_ext.runtime.fused import trace
from cerberus_ext.runtime.fused.trace import Trace, trace_step
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
