"""Experts of mixture models in a step: what the model's own compute, and the same bits for every row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import make_family, tiny_family
from tiny_models import prompt
from torch import Tensor, nn

from cerberus_ext.engine.decode import decode
from cerberus_ext.target import experts
from cerberus_ext.target.experts import experts_forward, experts_switch
from cerberus_ext.target.stand_ins import TreeStep, running

# gpt_oss's have biases and lie transposed; the others' neither.
FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


def experts_of(family: str) -> Any:
    """With biases that are not zero."""
    module = next(one for one in make_family(family).modules() if hasattr(one, "is_transposed"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return module


def inputs(rows: int, experts_each: int = 2, count: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (rows, 64), chosen, weights (rows, experts_each); every row has experts of its own."""
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 64, generator=generator)
    chosen = torch.rand(rows, count, generator=generator).argsort(1)[:, :experts_each]
    return hidden, chosen, torch.rand(rows, experts_each, generator=generator)


def a_step() -> running:
    return running(TreeStep(torch.zeros(1, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64), (0, 0)))


def test_kinds_that_are_covered() -> None:
    kinds = {family: (module.has_bias, module.is_transposed) for family in FAMILIES for module in [experts_of(family)]}
    assert kinds == dict.fromkeys(FAMILIES[:3], (False, False)) | {"gpt_oss": (True, True)}


@pytest.mark.parametrize("own", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_a_step_it_computes_what_the_model_does(family: str, rows: int, own: str) -> None:
    module = experts_of(family)
    with torch.inference_mode():
        want = experts_forward(own, module, *inputs(rows))
        with a_step():
            got = experts_forward(own, module, *inputs(rows))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert want.abs().max() > 0.1


@pytest.mark.parametrize("own", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_outside_of_a_step_it_is_the_model_s_own(family: str, own: str) -> None:
    module = experts_of(family)
    module.config._experts_implementation = own
    with torch.inference_mode():
        assert experts_forward(own, module, *inputs(7)).equal(module(*inputs(7)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_has_the_bits_that_it_has_alone(family: str, dtype: torch.dtype) -> None:
    """Its experts are chosen by many others, or by nobody else."""
    module = experts_of(family).to(dtype)
    hidden, chosen, weights = inputs(40)
    hidden, weights = hidden.to(dtype), weights.to(dtype)
    with torch.inference_mode(), a_step():
        together = experts_forward("eager", module, hidden, chosen, weights)
        for row in range(40):
            alone = experts_forward("eager", module, *(part[row : row + 1] for part in (hidden, chosen, weights)))
            assert together[row].equal(alone[0]), row


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_are_fused(family: str) -> None:
    model, texts = tiny_family(family), []
    for fuse in (None, False):
        result = decode(model, None, prompt(), max_new_tokens=24, fuse=fuse)
        assert result.stats.fused == (fuse is None) and result.stats.not_fused_because is None
        texts.append(result.sequences)
    assert texts[0].equal(texts[1])


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_an_expert_that_nobody_chose(order: list[int]) -> None:
    module = experts_of("mixtral")
    hidden, chosen = torch.randn(3, 64), torch.tensor([order] * 3)
    weights = torch.tensor([[0.25, 0.75]]).expand(3, 2)
    with torch.inference_mode():
        want = experts_forward("eager", module, hidden, chosen, weights)
        with a_step():
            got = experts_forward("eager", module, hidden, chosen, weights)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_what_there_is_to_switch() -> None:
    assert experts_switch(tiny_family("llama")) is None
    assert experts_switch(make_family("mixtral").to("meta")) is None
    model = make_family("mixtral")
    before = model.config._experts_implementation
    switch = experts_switch(model)
    assert switch is not None
    with switch:
        assert model.config._experts_implementation == f"{experts.NAME}_{before}"
    assert model.config._experts_implementation == before


@pytest.mark.parametrize("own", IMPLEMENTATIONS)
def test_the_text_whatever_the_model_names(own: str) -> None:
    model = make_family("olmoe")
    model.config._experts_implementation = own
    assert decode(model, None, prompt(), max_new_tokens=16).sequences.equal(
        decode(tiny_family("olmoe"), None, prompt(), max_new_tokens=16).sequences
    )
    assert model.config._experts_implementation == own


def test_experts_without_gates() -> None:
    """Of models whose experts have an activation alone."""

    class Experts(nn.Module):
        num_experts, has_gate, has_bias, is_transposed, act_fn = 4, False, False, False, nn.ReLU()

        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(0)
            self.up_proj = nn.Parameter(torch.randn(4, 48, 64, generator=generator))
            self.down_proj = nn.Parameter(torch.randn(4, 64, 48, generator=generator))

    module = Experts()
    hidden, chosen, weights = inputs(5)
    with torch.inference_mode():
        with a_step():
            got = experts_forward("eager", module, hidden, chosen, weights)
        want = torch.zeros(5, 64)
        for row in range(5):
            for expert, weight in zip(chosen[row], weights[row], strict=True):
                want[row] += weight * (module.down_proj[expert] @ (module.up_proj[expert] @ hidden[row]).relu())
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)
