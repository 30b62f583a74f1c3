"""Which gate decides where nobody has named one."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model

from cerberus_ext.drafting.gate import AlwaysClosed, AlwaysOpen, ConfidenceGate, Signals
from cerberus_ext.engine.plan import default_gate, default_policy, make_plan

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_default_gate_of_a_cpu_weighs_drafts(dtype):
    """Drafts that are nearly certain are all taken, those that are nearly impossible are not."""
    gate, nodes = default_gate(CPU, dtype), default_policy(CPU).size
    assert isinstance(gate, ConfidenceGate)
    for probability, wanted in ((0.99, nodes), (0.01, 1)):
        tokens = (probability ** torch.arange(nodes)).cumsum(0).numpy()
        assert gate.decide(Signals(nodes, expected_tokens=tokens)) == wanted


def test_default_gate_of_a_gpu_is_open():
    assert isinstance(default_gate(GPU, torch.bfloat16), AlwaysOpen)


def test_a_tree_or_a_gate_of_the_callers_own_is_taken_as_it_is():
    model, closed = tiny_model("llama"), AlwaysClosed()
    assert isinstance(make_plan(model, None).gate, ConfidenceGate)
    assert isinstance(make_plan(model, None, tree=8).gate, AlwaysOpen)
    assert make_plan(model, None, gate=closed).gate is closed
