"""`cerberus info`: what is installed."""

from __future__ import annotations


def info() -> None:
    """Versions, libraries loaded, CPU features, CUDA."""
    from ..info import print_info

    print_info()
