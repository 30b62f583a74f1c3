"""A node of a tree against its path decoded token by token: arguments of tree_attention for both."""

from __future__ import annotations

import math
from typing import Any

import torch
from op_cases import attention_inputs


def path_to(parents: list[int], node: int) -> list[int]:
    """From the root to the node, both included."""
    path = [node]
    while path[0] != 0:
        path.insert(0, parents[path[0]])
    return path


def alone(arguments: dict[str, Any], parents: list[int], node: int, spare: int = 0) -> dict[str, Any]:
    """The call for the node's token when the tokens of its path are committed, in a cache that ends with it and `spare`
    slots that nobody sees."""
    path, changed = path_to(parents, node), dict(arguments)
    length = int(arguments["length"])
    for name in ("keys", "values"):
        slots = [*range(length), *(length + each for each in path)]
        nothing = torch.full_like(arguments[name][:, :, :1], math.nan).expand(-1, -1, spare, -1)
        changed[name] = torch.cat([arguments[name][:, :, slots], nothing], 2)
    changed["q"] = arguments["q"][:, node : node + 1].contiguous()
    changed["length"] = arguments["length"] + len(path) - 1
    changed["ancestors"] = torch.ones(1, 1, dtype=torch.int64)
    return changed


def cancelling_inputs(parents: list[int], length: int, **sizes: Any) -> dict[str, Any]:
    """attention_inputs of one row whose sums cancel: large terms of both signs with small ones between them.

    One query head of a group weighs all alike, the others do not. Any other order of a sum shows in its result: two
    large values of opposite signs leave what was rounded while they were in the sum.
    """
    arguments = attention_inputs(1, parents, [length], **sizes)
    arguments["q"][:, :, ::3] = 0
    large = torch.full((arguments["values"].shape[2], 1), 3e4).to(arguments["values"].dtype)
    values = arguments["values"]
    for first, sign in ((0, 1), (3, -1)):  # the columns have them at different positions
        for column in range(4):
            places = slice((first + column) % 6, length + len(parents), 6)
            values[:, :, places, column::4] = sign * large[places]
    return arguments
