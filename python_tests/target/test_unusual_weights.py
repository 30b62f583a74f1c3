"""Weights that are not plain tensors in memory: decoded, with what can be promised, or refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from stand_ins import OracleHeads
from tiny_families import make_family
from tiny_models import VOCAB, generate, prompt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from cerberus_ext.drafting.gate import AlwaysClosed
from cerberus_ext.engine.decode import decode

NEW = 24


@pytest.fixture
def llama() -> PreTrainedModel:
    return make_family("llama")


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    """One scale for the inputs of all rows of a product: a token's numbers depend on the others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves it elsewhere
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def test_dynamic_int8_decodes_without_drafts(llama: PreTrainedModel) -> None:
    model = quantized(llama)
    with pytest.warns(RuntimeWarning, match="^decode: no drafts: LlamaForCausalLM computes other numbers") as said:
        want = decode(model, None, prompt(), max_new_tokens=NEW, gate=AlwaysClosed())
    assert len([one for one in said if one.category is RuntimeWarning]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # once per model
        for tree in (8, 32):
            heads = OracleHeads(want.sequences, 3, VOCAB)
            out = decode(model, heads, prompt(), max_new_tokens=NEW, tree=tree, streamer=heads)
            assert out.sequences.equal(want.sequences)
            assert out.stats.no_drafts_because == want.stats.no_drafts_because and out.stats.open_steps == 0
            assert "LlamaForCausalLM" in out.stats.no_drafts_because and out.stats.exact is True
    with pytest.warns(RuntimeWarning, match="^decode: no drafts"):
        decode(copy.deepcopy(model), None, prompt(), max_new_tokens=1)  # another model


def test_dynamic_int8_is_what_the_model_writes_one_by_one(llama: PreTrainedModel) -> None:
    """Each step's forward sees one token, as in `generate`."""
    model = quantized(llama)
    with pytest.warns(RuntimeWarning, match="^decode: no drafts"):
        ids = decode(model, None, prompt(), max_new_tokens=NEW).sequences
    assert ids.equal(generate(model, prompt(), max_new_tokens=NEW))


class Named(Tensor):
    """A tensor with another type, as libraries of all kinds make them; it computes as torch's do."""


class Scaled(Tensor):
    """int8 values and a scale for each row. It can be multiplied with, and detached; nothing else."""

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor) -> Scaled:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    @staticmethod
    def of(weight: Tensor) -> Scaled:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return Scaled((weight / scale).round().to(torch.int8), scale)

    def plain(self) -> Tensor:
        return self.values.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Scaled(args[0].values, args[0].scale)
        aten = torch.ops.aten
        if func not in (aten.t.default, aten.mm.default, aten.addmm.default, aten.linear.default):
            raise NotImplementedError(f"Scaled has no {func}")
        return func(*tree_map(lambda one: one.plain() if isinstance(one, Scaled) else one, args))


def with_weights(model: PreTrainedModel, make: Any) -> PreTrainedModel:
    """With all products' weights of another type."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(make(module.weight.detach()), requires_grad=False)
    return model


@pytest.mark.parametrize("make", [lambda weight: weight.as_subclass(Named), Scaled.of], ids=["named", "scaled"])
def test_tensor_subclasses(make: Any, llama: PreTrainedModel) -> None:
    """Products with them are torch's, and may or may not depend on the number of rows: nothing is promised."""
    model = with_weights(llama, make)
    kind = type(model.lm_head.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # where the proof finds that they do
        closed = decode(model, None, prompt(), max_new_tokens=NEW, gate=AlwaysClosed())
        heads = OracleHeads(closed.sequences, 3, VOCAB)
        out = decode(model, heads, prompt(), max_new_tokens=NEW, tree=8, streamer=heads)
    assert closed.sequences.equal(generate(model, prompt(), max_new_tokens=NEW))
    assert type(model.lm_head.weight) is kind and kind is not nn.Parameter
    for stats in (closed.stats, out.stats):
        if stats.no_drafts_because is None:
            assert stats.exact is False and stats.inexact_because == "Linear calls linear"
    assert out.sequences.equal(closed.sequences)


def test_weights_that_scale_compute_what_they_say(llama: PreTrainedModel) -> None:
    weight, x = llama.lm_head.weight.detach(), torch.randn(3, 64)
    torch.testing.assert_close(F.linear(x, Scaled.of(weight)), F.linear(x, weight), atol=0.2, rtol=0.02)


MISSING = (
    "^decode: model must have its weights in memory, some of LlamaForCausalLM are on meta: offloaded, or not loaded$"
)


def test_meta(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=MISSING):
        decode(llama.to("meta"), None, prompt(), max_new_tokens=NEW)


@pytest.mark.parametrize("some", [False, True])
def test_cpu_offload(some: bool, llama: PreTrainedModel) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(llama.model.layers[1] if some else llama, execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in llama.parameters()} == ({"cpu", "meta"} if some else {"meta"})
    with pytest.raises(ValueError, match=MISSING):
        decode(llama, None, prompt(), max_new_tokens=NEW)


def test_a_body_without_an_lm_head(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="^decode: model must have an LM head, LlamaModel has none$"):
        decode(llama.model, None, prompt(), max_new_tokens=NEW)


def test_a_class_that_was_made_without_a_file(llama: PreTrainedModel) -> None:
    """As in a notebook; its attention cannot be read there, but it names the one that it calls."""
    space: dict[str, Any] = {"Base": type(llama), "__name__": "somewhere"}
    exec("class Made(Base): pass", space)
    model = copy.deepcopy(llama)
    model.__class__ = space["Made"]
    assert decode(model, None, prompt(), max_new_tokens=4).sequences.equal(
        decode(llama, None, prompt(), max_new_tokens=4).sequences
    )
    falcon = make_family("falcon")
    space["Base"] = type(falcon)
    exec("class Made(Base): pass", space)
    falcon.__class__ = space["Made"]
    assert decode(falcon, None, prompt(), max_new_tokens=4).stats.exact is True
