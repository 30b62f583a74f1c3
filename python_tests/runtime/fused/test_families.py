"""A model's step as a program: the same bits as op by op, or close to them where a layer norm is taken apart."""

from __future__ import annotations

import pytest
import torch
from fused_steps import both_ways, every_call_seen
from tiny_families import tiny_family
from tiny_models import prompt

from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.drafting.tree import tree_of_ranks
from cerberus_ext.ops.step import packed_bytes
from cerberus_ext.runtime.fused.step import FusedStep
from cerberus_ext.runtime.fused.trace import NotFused

EQUAL = [
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3", "granite",
    "glm4",
]  # fmt: skip
CLOSE = ["gpt2", "gpt_neox", "opt", "phi", "stablelm", "starcoder2"]
TREES = {
    "root": StaticPolicy.chain(0).tree,
    "two": StaticPolicy.chain(1).tree,
    "bush": tree_of_ranks([-1, 0, 0, 1, 1, 2, 3, 6, 0, 8, 5], [0] * 11),
    "many": StaticPolicy.from_widths([9, 8]).tree,
}


@pytest.mark.pairwise
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", EQUAL)
def test_equals_the_step_op_by_op(name: str, dtype: torch.dtype, tree: str) -> None:
    for ours, theirs in zip(*both_ways(tiny_family(name, dtype), TREES[tree]), strict=True):
        assert ours.equal(theirs)


@pytest.mark.pairwise
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CLOSE)
def test_is_close_to_the_step_op_by_op(name: str, dtype: torch.dtype, tree: str) -> None:
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for ours, theirs in zip(*both_ways(tiny_family(name, dtype), TREES[tree]), strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_reads_the_models_own_weights_where_nothing_is_packed(name: str) -> None:
    model = tiny_family(name, torch.bfloat16)
    packed, _ = both_ways(model, TREES["bush"], pack=True)
    for ours, theirs in zip(both_ways(model, TREES["bush"], pack=False)[0], packed, strict=True):
        assert ours.equal(theirs)


def test_nothing_is_copied_where_nothing_is_packed() -> None:
    model = tiny_family("llama")
    own = {parameter.data_ptr() for parameter in model.parameters()}
    with torch.inference_mode(), every_call_seen(model) as target:
        target.prefill(prompt())
        fused = FusedStep(target, pack=False)
        assert {weight.data_ptr() for weight in fused._weights} <= own and not fused.packed
        assert FusedStep(target, pack=True).packed == bool(packed_bytes(model.lm_head.weight, 3))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("mixtral", "bincount"), ("qwen3_moe", "bincount"), ("falcon", "tracing a step failed")],
)
def test_says_what_is_not_fused(name: str, reason: str) -> None:
    with torch.inference_mode(), every_call_seen(tiny_family(name)) as target:
        target.prefill(prompt())
        with pytest.raises(NotFused, match=reason):
            FusedStep(target)
