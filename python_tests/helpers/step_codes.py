"""Codes of small steps, and the tensors that they name."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from cerberus_ext.ops.step import pack_weights, packed_bytes

WIDTH, OUT, VOCAB = 37, 7, 11
NONE = [0] * 6


def row(space: int, index: int, offset: int = 0) -> list[int]:
    return [space, index, offset, 0, 0, 1]


def damaged(code: list[int], generator: random.Random) -> list[int]:
    """Some numbers of the code replaced by others, and perhaps its end left off."""
    wrong = list(code)
    for _ in range(generator.choice((1, 1, 2, 4))):
        value = generator.choice((-1, *range(9), 14, 30, 31, 32, 36, 38, 1 << 20, 1 << 40, (1 << 63) - 1, -(1 << 63)))
        wrong[generator.randrange(len(wrong))] = value
    return wrong[: generator.choice((len(wrong), generator.randrange(len(wrong) + 1)))]


def linear_step(dtype: torch.dtype, packed: bool, width: int = WIDTH) -> tuple[list[Tensor], list[int]]:
    """Embeds the tokens and multiplies them: tensors and code."""
    torch.manual_seed(0)
    embeddings, weight, bias = (torch.randn(size).to(dtype) for size in ((VOCAB, width), (OUT, width), (OUT,)))
    multiplied = weight
    if packed:
        multiplied = torch.full((packed_bytes(weight, OUT),), 255, dtype=torch.uint8)
        pack_weights([weight[:2].contiguous(), weight[2:].contiguous()], multiplied)
    kind = [torch.float32, torch.bfloat16, torch.float16].index(dtype)
    code = [1, kind, 1, 1, 4, 2, 2, 0, 1, width, 0, OUT, 0]
    code += [1, 0, 1, 0, 0, 1, 1, width, *row(2, 0), *row(5, 0), *NONE]
    code += [0, 0, 1, 1, width, OUT, 2, int(packed)]
    return [embeddings, multiplied, bias, weight], code


EXPERTS, CHOSEN, INNER = 5, 2, 6


def experts_step(
    dtype: torch.dtype, packed: bool, transposed: bool = False, width: int = WIDTH
) -> tuple[list[Tensor], list[int]]:
    """Each token's experts, the largest of its row of a table, and two products by them: one of its embedding, one of
    what came out for each of them. The second half of the logits are what of the row was chosen."""
    torch.manual_seed(0)
    sizes = (VOCAB, width), (VOCAB, EXPERTS), (EXPERTS, INNER, width), (EXPERTS, INNER), (EXPERTS, OUT, INNER)
    tensors = [torch.randn(size).to(dtype) for size in sizes]
    for index in (2, 4):
        if packed:
            bytes_each = packed_bytes(tensors[index][0], len(tensors[index][0]))
            memory = torch.empty((EXPERTS, bytes_each), dtype=torch.uint8)
            for weight, part in zip(tensors[index], memory, strict=True):
                pack_weights([weight], part)
            tensors[index] = memory.flatten()
        elif transposed:
            tensors[index] = tensors[index].transpose(1, 2).contiguous()
    kind, found = [torch.float32, torch.bfloat16, torch.float16].index(dtype), CHOSEN * OUT + CHOSEN
    code = [1, kind, 1, 1, 4, 5, 4, 0, 4]
    code += [width, 0, CHOSEN, 1, CHOSEN * INNER, 0, CHOSEN * OUT, 0, found, 0]
    code += [1, 0, 3, 0, 0, 1, 1, width, *row(2, 0), *row(5, 0), *NONE]
    code += [31, 0, 1, CHOSEN, EXPERTS, 2, 1, 0, 0, 1, 0, *row(5, 1), *NONE]
    code += [32, 1, 1, CHOSEN, EXPERTS, 2, 4, CHOSEN * OUT, 0, 1, 0, *row(5, 1), 2, 1, 0, 0, 1, 0]
    shape = [int(transposed), EXPERTS, 1, CHOSEN]
    code += [3, 0, 2, 2, width, INNER, 3, int(packed), *shape, 1]
    code += [3, 2, 3, 4, INNER, OUT, -1, int(packed), *shape, 0]
    code += [1, 0, 1, 0, 0, 1, 1, CHOSEN * OUT, *row(2, 4), *row(2, 3), *NONE]
    return tensors, code
