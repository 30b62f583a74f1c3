"""A model's step as a program: the same bits as op by op, or close to them where a layer norm is taken apart."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from block_weights import q4_0, q4_1, q5_0, q5_1, q6_k, q8_0
from fused_steps import both_ways, every_call_seen
from tiny_families import make_family, tiny_family
from tiny_models import prompt
from torch import Tensor, nn

from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.drafting.tree import tree_of_ranks
from cerberus_ext.ops.step import block_bytes, packed_bytes
from cerberus_ext.runtime.fused.step import FusedStep
from cerberus_ext.runtime.fused.trace import NotFused

EQUAL = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3", "granite",
    "glm4", "mixtral", "qwen3_moe", "olmoe", "gpt_oss",
]  # fmt: skip
CLOSE = ["gpt2", "gpt_neox", "opt", "phi", "stablelm", "starcoder2"]
TREES = {
    "root": StaticPolicy.chain(0).tree,
    "two": StaticPolicy.chain(1).tree,
    "bush": tree_of_ranks([-1, 0, 0, 1, 1, 2, 3, 6, 0, 8, 5], [0] * 11),
    "many": StaticPolicy.from_widths([9, 8]).tree,
}

Maker = Callable[[int, int], Tensor]


@pytest.mark.pairwise
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EQUAL)
def test_equals_the_step_op_by_op(name: str, dtype: torch.dtype, tree: str) -> None:
    for ours, theirs in zip(*both_ways(tiny_family(name, dtype), TREES[tree]), strict=True):
        assert ours.equal(theirs)


class _Picks(nn.Module):
    """A layer that no family has: it picks values of a row by the places of the largest of another."""

    def forward(self, x: Tensor) -> Tensor:
        values, places = x.unflatten(-1, (4, 16)).topk(3)
        picked = x.neg().unflatten(-1, (4, 16)).gather(-1, places)
        weighted = picked.clamp(max=0.5) * values.clamp(-1, 2).float().softmax(-1).to(x.dtype)
        return x + weighted.repeat_interleave(16, -2).flatten(-2)[..., :64].contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_picks_of_rows(dtype: torch.dtype) -> None:
    model = make_family("llama", dtype)
    model.model.layers[1].mlp = _Picks()
    for ours, theirs in zip(*both_ways(model, TREES["bush"]), strict=True):
        assert ours.equal(theirs)


@pytest.mark.pairwise
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CLOSE)
def test_is_close_to_the_step_op_by_op(name: str, dtype: torch.dtype, tree: str) -> None:
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for ours, theirs in zip(*both_ways(tiny_family(name, dtype), TREES[tree]), strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma", "phi3", "mixtral"])
def test_one_key_value_head(name: str, dtype: torch.dtype) -> None:
    for ours, theirs in zip(*both_ways(make_family(name, dtype, num_key_value_heads=1), TREES["bush"]), strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "gpt_oss"])
def test_reads_the_models_own_weights_where_nothing_is_packed(name: str) -> None:
    model = tiny_family(name, torch.bfloat16)
    packed, _ = both_ways(model, TREES["bush"], pack=True)
    for ours, theirs in zip(both_ways(model, TREES["bush"], pack=False)[0], packed, strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_nothing_is_copied_where_nothing_is_packed(name: str) -> None:
    model = tiny_family(name)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    with torch.inference_mode(), every_call_seen(model) as target:
        target.prefill(prompt())
        fused = FusedStep(target, pack=False)
        assert {weight.data_ptr() for weight in fused._weights} <= own and not fused.packed
        assert bool(FusedStep(target, pack=True).packed) == bool(packed_bytes(model.lm_head.weight, 3))


@pytest.mark.parametrize("tree", ["root", "bush"])
@pytest.mark.parametrize(
    ("layers", "values", "head", "packed"),
    [
        (q4_1, q4_1, q8_0, {"four": 8, "eight": 1}),
        (q4_0, q6_k, q6_k, {"four": 8, "eight": 3}),
        (q5_0, q8_0, q8_0, {"five": 8, "eight": 3}),
        (q5_1, q5_1, q5_1, {"five": 9}),
        (q6_k, q6_k, q5_0, {"five": 1, "eight": 8}),
    ],
)
def test_weights_of_a_file_of_fewer_bits(
    layers: Maker, values: Maker, head: Maker, packed: dict[str, int], tree: str
) -> None:
    """Of formats that files mix, with the bits of the step op by op. Values of a form of their own are a product of
    their own. packed: how many products are, in so many bits."""
    model = deepcopy(tiny_family("llama", torch.bfloat16))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            make = head if module is model.lm_head else values if name.endswith("v_proj") else layers
            module.weight.data.copy_(make(*module.weight.shape))
    with torch.inference_mode(), every_call_seen(model) as target:
        target.prefill(prompt())
        kinds = FusedStep(target, pack=True).packed
    if block_bytes(model.lm_head.weight, 1, 8):
        assert kinds == {f"packed in {bits} bits": count for bits, count in packed.items()}
    for ours, theirs in zip(*both_ways(model, TREES[tree], pack=True), strict=True):
        assert ours.equal(theirs)


class _Wide(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.weight.float()).to(x.dtype)


class _Smallest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.topk(1, largest=False).values


@pytest.mark.parametrize(
    ("module", "name", "reason"),
    [
        (_Smallest(), "mlp", "topk.default is called with"),
        (_Wide(64, 96, bias=False), "mlp.up_proj", "multiplies in torch.float32"),
    ],
)
def test_says_what_is_not_known(module: nn.Module, name: str, reason: str) -> None:
    model = make_family("llama", torch.bfloat16)
    model.model.layers[0].set_submodule(name, module.bfloat16())
    assert_not_fused(model, reason)


def test_says_that_a_step_cannot_be_traced() -> None:
    assert_not_fused(tiny_family("falcon"), "tracing a step failed")


def assert_not_fused(model: Any, reason: str) -> None:
    with torch.inference_mode(), every_call_seen(model) as target:
        target.prefill(prompt())
        with pytest.raises(NotFused, match=reason):
            FusedStep(target)
