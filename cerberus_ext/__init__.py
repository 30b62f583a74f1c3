"""Faster decoding for Hugging Face causal language models, with the same output: see `decode`."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from . import ops  # noqa: F401 - first: it loads the libraries, or says what is wrong with them

# isort: split
# What needs no transformers: importing that takes seconds, which `cerberus --help` should not.
from .drafting.drafter import Drafter
from .drafting.dynamic_policy import DynamicPolicy
from .drafting.gate import AlwaysClosed, AlwaysOpen, ConfidenceGate, EntropyGate, Gate, Signals
from .drafting.proposers import Proposer
from .drafting.static_policy import StaticPolicy
from .drafting.suffix import DocumentProposer, SuffixProposer
from .engine.decode import decode
from .engine.decoder import Decoder
from .runtime.stats import DecodeOutput, DecodeStats

if TYPE_CHECKING:
    from .drafting.heads import CerberusConfig, CerberusHeads
    from .engine.custom_generate import generate
    from .io.default_model import load_default_model
    from .io.gguf_model import load_gguf
    from .target.quantize import quantize

try:
    __version__ = version("cerberus_ext")
except PackageNotFoundError:  # a source folder, built in place but not installed
    __version__ = "0+source"

__all__ = [
    "AlwaysClosed",
    "AlwaysOpen",
    "CerberusConfig",
    "CerberusHeads",
    "ConfidenceGate",
    "DecodeOutput",
    "DecodeStats",
    "Decoder",
    "Drafter",
    "DocumentProposer",
    "Proposer",
    "StaticPolicy",
    "DynamicPolicy",
    "EntropyGate",
    "Gate",
    "Signals",
    "SuffixProposer",
    "decode",
    "generate",
    "load_default_model",
    "load_gguf",
    "quantize",
]

_LATER = {
    "CerberusConfig": "drafting.heads",
    "CerberusHeads": "drafting.heads",
    "generate": "engine.custom_generate",
    "load_default_model": "io.default_model",
    "load_gguf": "io.gguf_model",
    "quantize": "target.quantize",
}


def __getattr__(name: str) -> Any:
    """Imports what is exported, but not yet needed, when it is asked for."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LATER[name]}", __name__), name)
    globals()[name] = value
    return value
