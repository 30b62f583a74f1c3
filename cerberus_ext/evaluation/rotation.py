"""Who begins, where several take turns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def rotated(items: Sequence[Item], number: int) -> list[Item]:
    """All of them in their order, another one first for each number: item `number`, counted round and round."""
    first = number % len(items)
    return [*items[first:], *items[:first]]
