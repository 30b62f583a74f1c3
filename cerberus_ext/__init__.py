"""Faster decoding for Hugging Face causal language models, with the same output: see `decode`."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ._load import load_libraries

load_libraries()

# What needs no transformers: importing that takes seconds, which `cerberus --help` should not.
from .compile_ahead import compile_ahead  # noqa: E402
from .decode import decode  # noqa: E402
from .draft_sources import DraftSource  # noqa: E402
from .dynamic_tree import DynamicTree  # noqa: E402
from .gate import AlwaysClosed, AlwaysOpen, ConfidenceGate, EntropyGate, Gate  # noqa: E402
from .stats import DecodeOutput, DecodeStats  # noqa: E402
from .suffix import DocumentSource, SuffixSource  # noqa: E402
from .tree import DraftTree  # noqa: E402

if TYPE_CHECKING:
    from .default_model import load_default_model
    from .graphs import release_graphs
    from .heads import CerberusConfig, CerberusHeads

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
    "DocumentSource",
    "DraftSource",
    "DraftTree",
    "DynamicTree",
    "EntropyGate",
    "Gate",
    "SuffixSource",
    "compile_ahead",
    "decode",
    "load_default_model",
    "release_graphs",
]

_LATER = {
    "CerberusConfig": "heads",
    "CerberusHeads": "heads",
    "load_default_model": "default_model",
    "release_graphs": "graphs",
}


def __getattr__(name: str) -> Any:
    """Imports what is exported, but not yet needed, when it is asked for."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LATER[name]}", __name__), name)
    globals()[name] = value
    return value
