"""Joined products taken apart: for devices that read several weights in one launch."""

from __future__ import annotations

from collections.abc import Iterator

from .program import Product, Stage


def parts(stage: Stage) -> Iterator[Stage]:
    """A product of several weights as one for each, in order; any other stage as it is."""
    if not isinstance(stage, Product) or len(stage.weights) == 1:
        yield stage
        return
    first = 0
    for weight, bias, name in zip(stage.weights, stage.biases, stage.names, strict=True):
        yield Product(stage.input, stage.output, [weight], [bias], [name], first)
        first += len(weight)
