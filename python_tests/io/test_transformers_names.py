"""Names that transformers changes: what we call is asked for its own, and gets that one without a warning."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from renamed import Renamed
from tiny_models import prompt, tiny_model
from torch import nn
from transformers import DynamicCache, GenerationMixin

from cerberus_ext.io import transformers_names
from cerberus_ext.io.transformers_names import CACHE_ARGUMENTS, cache_argument

GENERATES = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
GENERATES_WITH = next(name for name in CACHE_ARGUMENTS if name in GENERATES)


class Old(nn.Module):
    def forward(self, input_ids: Any, past_key_values: Any = None, **kwargs: Any) -> Any: ...


class New(nn.Module):
    def forward(self, input_ids: Any, cache: Any = None) -> Any: ...


class Both(nn.Module):
    def forward(self, input_ids: Any, cache: Any = None, past_key_values: Any = None) -> Any: ...


class Hidden(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (Old, "past_key_values"),  # code that comes with the weights does not change with transformers
        (New, "cache"),
        (Renamed, "cache"),
        (Both, GENERATES_WITH),
        (Hidden, GENERATES_WITH),
    ],
)
def test_cache_argument(model: type[nn.Module], name: str) -> None:
    assert cache_argument(model()) == name


@pytest.mark.parametrize("version", CACHE_ARGUMENTS)
def test_follows_generate_where_the_model_says_nothing(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a version of transformers in which `generate` says the one or the other."""
    theirs = {"cache": New.forward, "past_key_values": Old.forward}[version]
    monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", theirs)
    transformers_names._cache_argument.cache_clear()
    try:
        assert [cache_argument(model()) for model in (Both, Hidden)] == [version] * 2
        assert [cache_argument(model()) for model in (Old, New)] == ["past_key_values", "cache"]
    finally:
        transformers_names._cache_argument.cache_clear()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_installed_models_take_it_without_a_warning(name: str) -> None:
    model, cache = tiny_model(name), DynamicCache()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error")
        model(prompt(), use_cache=True, **{cache_argument(model): cache})
    assert cache.get_seq_length() == prompt().shape[1]


def test_a_signature_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    cache_argument(model)
    monkeypatch.setattr(transformers_names.inspect, "signature", None)
    assert cache_argument(model) in CACHE_ARGUMENTS
