"""Operations of a decoding step: a row has the same bits whatever else is in the call."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import pytest
import torch
from stand_ins import OracleHeads
from tiny_families import make_family
from tiny_models import VOCAB, prompt, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from cerberus_ext import ops
from cerberus_ext.drafting.gate import AlwaysClosed
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.drafting.tree import ALONE
from cerberus_ext.engine.decode import decode
from cerberus_ext.runtime.runtime import runtime_of
from cerberus_ext.target import row_invariant
from cerberus_ext.target.model import StepWay, TargetModel
from cerberus_ext.target.row_invariant import (
    InvariantWeight,
    RowInvariant,
    plain,
    product_weights,
    prompt_forward,
    step_forward,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the weights, from here on."""
    calls: list[tuple[int, ...]] = []

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
        calls.append(tuple(weight.shape))
        assert type(weight) in (Tensor, nn.Parameter)
        return real(input, weight, bias, transposed)

    real = ops.linear
    monkeypatch.setattr(row_invariant.ops, "linear", linear)
    return calls


@pytest.fixture
def swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """As inside of `step_forward`."""
    monkeypatch.setattr(row_invariant._thread, "swapped", True)


@pytest.mark.usefixtures("swapped")
class TestWeight:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bias", [False, True])
    def test_stands_in(self, dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = count_calls(monkeypatch)
        layer = nn.Linear(48, 33, bias=bias, dtype=dtype)
        weight = InvariantWeight.of(layer.weight)
        assert weight.data_ptr() == layer.weight.data_ptr()
        x = torch.randn(2, 5, 48, dtype=dtype)
        output = F.linear(x, weight, layer.bias)
        assert calls == [(33, 48)] and output.shape == (2, 5, 33) and type(output) is Tensor
        # Three roundings of a sum of 48 products, at most.
        torch.testing.assert_close(output, layer(x), atol=3e-2 if dtype == torch.bfloat16 else 5e-3, rtol=2e-2)

    def test_of_a_conv1d(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """transformers', whose weight is (I, O)."""
        calls = count_calls(monkeypatch)
        weight, bias, x = torch.randn(48, 33), torch.randn(33), torch.randn(5, 48)
        output = torch.addmm(bias, x, InvariantWeight.of(weight))
        assert calls == [(48, 33)]
        torch.testing.assert_close(output, torch.addmm(bias, x, weight), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("product", [torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, lambda x, w: x @ w])
    def test_of_products_written_out(self, product: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = count_calls(monkeypatch)
        weight, x = torch.randn(33, 48), torch.randn(5, 48)
        torch.testing.assert_close(product(x, InvariantWeight.of(weight).t()), x @ weight.t(), atol=1e-4, rtol=1e-4)
        assert calls == [(33, 48)]

    def test_is_an_ordinary_tensor_to_other_threads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(row_invariant._thread, "swapped", False)
        calls, weight, x = count_calls(monkeypatch), torch.randn(33, 48), torch.randn(5, 48)
        assert F.linear(x, InvariantWeight.of(weight)).equal(F.linear(x, weight)) and not calls

    def test_is_an_ordinary_tensor_otherwise(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = count_calls(monkeypatch)
        ordinary = torch.randn(4, 3)
        weight = InvariantWeight.of(ordinary)
        assert weight.dtype == torch.float32 and (weight + 1).equal(ordinary + 1) and weight.shape == (4, 3)
        assert plain(weight).data_ptr() == ordinary.data_ptr() and type(plain(weight[1:])) is Tensor
        x = torch.randn(2, 3, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="dtype"):
            F.linear(x, weight)
        scaled = torch.addmm(torch.zeros(3), torch.ones(2, 4), weight, alpha=2)
        torch.testing.assert_close(scaled, 2 * torch.ones(2, 4) @ ordinary)
        assert not calls


@pytest.mark.parametrize("sees_all", [False, True])
def test_step_forward(sees_all: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    parameters = dict(model.named_parameters())
    forward = step_forward(model, RowInvariant if sees_all else None)
    calls = count_calls(monkeypatch)
    with torch.inference_mode():
        output = forward(input_ids=prompt(), use_cache=False).logits
        torch.testing.assert_close(output, model(prompt(), use_cache=False).logits, atol=1e-4, rtol=1e-4)
    assert len(calls) == 3 * 7 + 1, "7 linears a layer, and the LM head"
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_weights_of_products() -> None:
    """All matrices but the embeddings, those of experts included."""
    names = set(product_weights(make_family("mixtral")))
    assert {"lm_head.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.gate.weight"} <= names
    assert {name.rsplit(".", 1)[1] for name in names if ".experts." in name} == {"gate_up_proj", "down_proj"}
    assert not any("embed" in name or "norm" in name for name in names)


@pytest.mark.parametrize("native", [True, False])
def test_whose_products_the_prompt_has(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_invariant, "_is_native", lambda weight: native)
    model = tiny_model("llama")
    step = step_forward(model, None)
    assert prompt_forward(model, step) is (model if native else step)


def test_models_without_weights_on_a_cpu_are_taken_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.LayerNorm(4))
    assert step_forward(model, None) is model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", row_invariant.ELEMENTWISE, ids=attrgetter("__name__"))
def test_functions_of_single_elements(function: Any, dtype: torch.dtype) -> None:
    """Close to torch's, and the same bits for an element wherever it lies, also behind the last whole vector."""
    x = torch.randn(3, 129, generator=torch.Generator().manual_seed(0)).to(dtype)
    with RowInvariant():
        output = function(x)
        alone = [function(x[row]) for row in range(3)]
        single = torch.stack([function(x[1, column : column + 1])[0] for column in range(129)])
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(output, function(x), atol=tolerance, rtol=tolerance)
    assert output.equal(torch.stack(alone)) and output[1].equal(single)


def test_options_of_functions_are_left_to_torch() -> None:
    x = torch.randn(65)
    with RowInvariant():
        tanh = F.gelu(x, approximate="tanh")
        soft = F.softplus(x, beta=2)
        in_place = F.silu(x.clone(), inplace=True)
    torch.testing.assert_close(tanh, F.gelu(x, approximate="tanh"), atol=1e-6, rtol=1e-5)
    assert soft.equal(F.softplus(x, beta=2)) and in_place.equal(F.silu(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.matmul(x, other=x.t()),
        lambda x: torch.mm(x, x.t(), out=torch.empty(3, 3)),
        lambda x: torch.addmm(input=torch.ones(3), mat1=x, mat2=x.t()),
        lambda x: torch.addmm(torch.ones(3), x, x.t(), out=torch.empty(3, 3)),
        lambda x: torch.sigmoid(x, out=torch.empty_like(x)),
        lambda x: torch.sum(x.max(), 0),
        lambda x: torch.mean(x.max(), -1),
    ],
)
def test_other_ways_of_calling_are_left_to_torch(function: Any) -> None:
    x = torch.randn(3, 8)
    with RowInvariant():
        output = function(x)
    assert output.equal(function(x))


@pytest.mark.parametrize("function", [torch.sum, Tensor.sum, torch.mean, Tensor.mean])
def test_small_sums(function: Any) -> None:
    """Of terms that do not lie along the last axis; they cancel, so that another order shows."""
    x = torch.tensor([1e8, 1.0, -1e8, 1.0])[:, None, None].expand(4, 5, 7) * torch.linspace(0.5, 2, 7)
    with RowInvariant():
        total, alone = function(x, 0), function(x[:, 2:3], 0)
        kept = function(x, 0, keepdim=True)
    want = ((x[0] + x[1]) + x[2]) + x[3]
    assert total.equal(want / 4 if "mean" in str(function) else want) and alone.equal(total[2:3])
    assert kept.equal(total[None])
    assert RowInvariant().replaced(torch.sum, (x, -1), {}) is NotImplemented
    assert RowInvariant().replaced(torch.sum, (torch.zeros(9, 2), 0), {}) is NotImplemented


@pytest.mark.parametrize("function", [F.softmax, torch.softmax, Tensor.softmax])
@pytest.mark.parametrize("wide", [{}, {"dtype": torch.float32}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax(dtype: torch.dtype, wide: dict[str, Any], function: Any) -> None:
    x = (8 * torch.randn(33, 60)).to(dtype)
    x[3, 5:] = -torch.inf
    x[4, 7] = torch.nan
    want = function(x, dim=-1, **wide)
    with RowInvariant():
        got, alone = function(x, dim=-1, **wide), function(x[2:3], dim=1, **wide)
    assert got.dtype == want.dtype and alone.equal(got[2:3])
    torch.testing.assert_close(got, want, equal_nan=True)
    for other, axis in ((x, 0), (torch.zeros(()), -1), (torch.zeros(2, 0), -1), (torch.zeros(1, 1 << 15), -1)):
        assert RowInvariant().replaced(function, (other, axis), {}) is NotImplemented


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_whole_step(name: str, dtype: torch.dtype) -> None:
    """Every op of a forward over a tree, attention included: each node has the bits it has on its own."""
    model = tiny_model(name, dtype=dtype)
    tree = StaticPolicy.from_widths([40]).tree
    tokens = torch.arange(tree.size)[None] % 97
    with torch.inference_mode(), runtime_of(model).target(64) as base:
        base.prefill(prompt())
        hidden, logits = base.step(tokens, tree.on(tokens.device))
        for node in (1, 17, 40):
            path = StaticPolicy.from_widths([1]).tree
            alone_hidden, alone_logits = base.step(tokens[:, [0, node]], path.on(tokens.device))
            assert alone_logits[0, 1].equal(logits[0, node]) and alone_hidden[0, 1].equal(hidden[0, node])
        root_hidden, root_logits = base.step(tokens[:, :1], ALONE.on(tokens.device))
        assert root_logits[0, 0].equal(logits[0, 0]) and root_hidden[0, 0].equal(hidden[0, 0])


class TestPadding:
    """gpt2's steps see only calls with weights, and are filled up for its activation, which is left to torch."""

    def test_a_step_that_is_filled_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = make_family("gpt2")
        way = StepWay(names_attention=True, sees_all=False, widths=frozenset({32}))  # an even number of nodes
        sizes: list[int] = []
        tree, tokens = StaticPolicy.from_widths([4]).tree, torch.tensor([[5, 60, 7, 88, 9]])
        found = []
        for one in (way, StepWay(names_attention=True, sees_all=True)):
            with torch.inference_mode(), TargetModel(model, one, 32) as base:
                real = base.run

                def run(forward: Any, tokens: Tensor, *rest: Any, real: Any = real) -> Any:
                    sizes.append(tokens.shape[1])
                    return real(forward, tokens, *rest)

                monkeypatch.setattr(base, "run", run)
                base.prefill(prompt())
                hidden, logits = base.step(tokens, tree.on(tokens.device))
                assert hidden.shape == (1, 5, 64) and logits.shape == (1, 5, VOCAB)
                assert base.cache.committed == 9
                found.append(logits)
        assert sizes == [10, 6, 9, 5]  # of prompts and steps
        torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_text_stays_the_same(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        model = make_family("gpt2", dtype)
        capability = runtime_of(model).capability()
        assert capability.way == StepWay(names_attention=True, sees_all=False, widths=frozenset({256}))
        want = decode(model, None, prompt(), max_new_tokens=40, gate=AlwaysClosed(), fuse=False).sequences
        padded: list[tuple[int, int]] = []
        from cerberus_ext.target import model as base_model

        def fill(nodes: int, tokens: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            nodes += 3 * (tokens.shape[1] > 1)  # any number of copies of the root
            padded.append((tokens.shape[1], nodes))
            return real(nodes, tokens, *rest)

        real = base_model.filled
        monkeypatch.setattr(base_model, "filled", fill)
        heads = OracleHeads(want, 4, VOCAB)
        options = {"tree": 7, "proposers": [], "fuse": False}
        out = decode(model, heads, prompt(), max_new_tokens=40, streamer=heads, **options)
        assert out.sequences.equal(want) and out.stats.tokens_per_step > 1.5
        assert (7, 10) in padded and out.stats.trace[0][0] == 7
