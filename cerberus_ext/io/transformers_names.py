"""Names that are not the same in every version of transformers that setup.py admits: found here, and nowhere else.

They are read from the installed code, never derived from its version number, which says nothing about a model whose
code came with its weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import transformers
from torch import nn
from transformers import GenerationMixin

CACHE_ARGUMENTS = ("cache", "past_key_values")  # the first since 5.24, which takes the other up to 5.40, with a warning


def cache_argument(model: nn.Module) -> str:
    """The keyword by which the forward of `model`, a causal LM, takes its key/value cache: one of CACHE_ARGUMENTS."""
    return _cache_argument(type(model).forward)


@lru_cache(maxsize=64)
def _cache_argument(forward: Callable[..., Any]) -> str:
    # A decorator that takes the old name too, for a while, is looked through: signature() follows __wrapped__.
    taken = inspect.signature(forward).parameters
    # One that takes both, or hides what it takes behind **kwargs, gets what transformers' own `generate` gives it.
    generates_with = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    preferred = next(name for name in CACHE_ARGUMENTS if name in generates_with)
    return next((name for name in (preferred, *CACHE_ARGUMENTS) if name in taken), preferred)


def dequantized_gguf(file: str) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for the plain weights of a GGUF file, which older versions always make."""
    config = getattr(transformers, "GgufConfig", None)
    return (
        {"gguf_file": file} if config is None else {"gguf_file": file, "quantization_config": config(dequantize=True)}
    )
