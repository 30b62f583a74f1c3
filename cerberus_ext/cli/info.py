"""`cerberus info`: what is installed, and what can be done with a model."""

from __future__ import annotations

from typing import Annotated

import typer

from .shared import Device, DTypeName, Threads, begin, dtype_of, load_target


def info(
    model: Annotated[
        str | None,
        typer.Option(help="Local folder or Hub id: whether its text is exact, and decoded with drafts, here."),
    ] = None,
    dtype: DTypeName = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Versions, libraries loaded, CPU features, CUDA; and, with --model, what can be done with it."""
    from .info_text import collect, model_section, print_sections

    sections = collect()
    if model is not None:
        begin(threads)
        base, _ = load_target(model, dtype_of(dtype), device)
        sections["Model"] = model_section(base)
    print_sections(sections)
