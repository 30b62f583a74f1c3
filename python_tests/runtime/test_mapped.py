"""Weights that lie in a file are read from there again, whatever was given back, and computed with to the same bits."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import generate, prompt, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import cerberus_ext
from cerberus_ext.runtime.mapped import give_back, one_by_one

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is given back")

NEW = 12


@pytest.fixture(params=[torch.bfloat16, torch.float32])
def models(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same, in memory and mapped from a file."""
    tiny_model("llama", dtype=request.param).save_pretrained(tmp_path)
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=request.param).eval()
    return copy.deepcopy(mapped), mapped


def text(model: PreTrainedModel, **options: bool) -> Tensor:
    return cerberus_ext.decode(model, None, prompt(), max_new_tokens=NEW, **options).sequences


def test_a_text_is_that_of_weights_in_memory(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Packed, once more by the same steps, op by op, and by transformers."""
    model, mapped = models
    for options in ({"fuse": True, "pack": True}, {"fuse": True, "pack": True}, {"fuse": False}, {}):
        assert text(mapped, **options).equal(text(model, **options))
    assert generate(mapped, prompt(), max_new_tokens=NEW).equal(generate(model, prompt(), max_new_tokens=NEW))
    for (name, mine), theirs in zip(mapped.state_dict().items(), model.state_dict().values(), strict=True):
        assert mine.equal(theirs), name


def test_weights_that_were_written_to_are_the_ones_that_count(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """In part, before a text and after it: what the file has is not theirs any more."""
    model, mapped = models
    for turn in range(2):
        for one in models:
            with torch.no_grad():
                one.get_output_embeddings().weight[turn::7] *= -1.5
                one.model.layers[0].mlp.down_proj.weight[:, turn] = 0.25
        give_back(mapped)
        assert text(mapped, fuse=True, pack=True).equal(text(model, fuse=True, pack=True))
        assert text(mapped, fuse=False).equal(text(model, fuse=False))


def test_they_are_given_back(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """What reading them has brought into memory; of the weights in memory nothing."""
    model, mapped = models
    for one in models:
        assert all(parameter.isfinite().all() for parameter in one.parameters())
    assert give_back(model) == 0
    assert give_back(mapped) > 0


def test_while_a_model_runs_op_by_op(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """A module's own are given back behind it; its output is the same, and no hook stays."""
    model, mapped = models
    with torch.inference_mode(), one_by_one(model), one_by_one(mapped):
        assert not hooked(model) and hooked(mapped)
        assert mapped(prompt()).logits.equal(model(prompt()).logits)
    assert not hooked(mapped)


def test_a_module_may_have_a_weight_without_numbers(models: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    model, mapped = models
    for one in models:
        one.model.layers[0].mlp.register_parameter("extra", torch.nn.Parameter(torch.empty(0, 4)))
    assert text(mapped, fuse=True, pack=True).equal(text(model, fuse=True, pack=True))


def hooked(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if module._forward_hooks]
