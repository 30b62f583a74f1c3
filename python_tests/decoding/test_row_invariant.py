"""Linears of a decoding step: a row has the same bits whatever else is in the call."""

from __future__ import annotations

import pytest
import torch
from tiny_models import prompt, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from cerberus_ext import ops, row_invariant
from cerberus_ext.row_invariant import InvariantWeight, linears_row_invariant, step_forward

SHAPES = [(576, 576), (1536, 576), (576, 1536)]


@pytest.fixture
def never_invariant(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU whose linears depend on the number of rows."""
    monkeypatch.setattr(row_invariant, "linears_row_invariant", lambda weights: False)


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    calls: list[tuple[int, ...]] = []

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(tuple(weight.shape))
        assert type(weight) is Tensor
        return real(input, weight, bias)

    real = ops.linear
    monkeypatch.setattr(row_invariant.ops, "linear", linear)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_weight_stands_in(dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    layer = nn.Linear(48, 33, bias=bias, dtype=dtype)
    weight = InvariantWeight.of(layer.weight)
    assert weight.data_ptr() == layer.weight.data_ptr()
    x = torch.randn(2, 5, 48, dtype=dtype)
    output = F.linear(x, weight, layer.bias)
    assert calls == [(33, 48)] and output.shape == (2, 5, 33) and type(output) is Tensor
    # Three roundings of a sum of 48 products, at most.
    torch.testing.assert_close(output, layer(x), atol=3e-2 if dtype == torch.bfloat16 else 5e-3, rtol=2e-2)


def test_weight_is_an_ordinary_tensor_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    plain = torch.randn(4, 3)
    weight = InvariantWeight.of(plain)
    assert weight.dtype == torch.float32 and (weight + 1).equal(plain + 1) and weight.shape == (4, 3)
    x = torch.randn(2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="dtype"):
        F.linear(x, weight)
    assert not calls


def test_step_forward(never_invariant: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    parameters = dict(model.named_parameters())
    forward = step_forward(model)
    calls = count_calls(monkeypatch)
    with torch.inference_mode():
        output = forward(input_ids=prompt(), use_cache=False).logits
        torch.testing.assert_close(output, model(prompt(), use_cache=False).logits, atol=1e-4, rtol=1e-4)
    assert len(calls) == 3 * 7 + 1, "7 linears a layer, and the LM head"
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_model_with_invariant_linears_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_invariant, "linears_row_invariant", lambda weights: True)
    monkeypatch.setattr(row_invariant, "_is_native", lambda weight: True)
    model = tiny_model("llama")
    assert step_forward(model) is model


def test_types_the_cpu_does_not_multiply_are_not_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_invariant, "linears_row_invariant", lambda weights: True)
    monkeypatch.setattr(row_invariant, "_is_native", lambda weight: False)
    model = tiny_model("llama")
    assert step_forward(model) is not model


def test_models_without_cpu_linears_are_taken_as_they_are(never_invariant: None) -> None:
    model = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.LayerNorm(4))
    assert step_forward(model) is model


@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_whole_step(name: str, dtype: torch.dtype, never_invariant: None, monkeypatch) -> None:
    """Every op of a forward over a tree, attention included: each node has the bits it has on its own."""
    from cerberus_ext import base_model
    from cerberus_ext.base_model import BaseModel
    from cerberus_ext.tree import DraftTree

    model = tiny_model(name, dtype=dtype)
    tree = DraftTree.from_widths([40])
    tokens = torch.arange(tree.size)[None] % 97
    # What the linears of this machine are like must not matter here.
    monkeypatch.setattr(base_model, "step_forward", row_invariant.step_forward)
    with torch.inference_mode(), BaseModel(model, 64, 1) as base:
        base.prefill(prompt())
        hidden, logits = base.step(tokens, tree.on(tokens.device))
        for node in (1, 17, 40):
            path = DraftTree.from_widths([1])
            alone_hidden, alone_logits = base.step(tokens[:, [0, node]], path.on(tokens.device))
            assert alone_logits[0, 1].equal(logits[0, node]) and alone_hidden[0, 1].equal(hidden[0, node])
        root_hidden, root_logits = base.step(tokens[:, :1], DraftTree.root().on(tokens.device))
        assert root_logits[0, 0].equal(logits[0, 0]) and root_hidden[0, 0].equal(hidden[0, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_probe_sees_what_a_comparison_sees(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, x = torch.randn(shape).to(dtype), torch.randn(32, shape[1]).to(dtype)
    full = F.linear(x, weight)
    agree = all(F.linear(x[:rows], weight).equal(full[:rows]) for rows in range(1, 33))
    if linears_row_invariant([weight]):
        assert agree, f"{shape} {dtype}: rows differ, which the probe did not notice"
    elif agree:
        pytest.fail(f"{shape} {dtype}: the probe saw rows that differ, a comparison of all row counts saw none")
