"""The hidden states that produced an answer's tokens, by a forward of the target model over prompt and answer.

Row j of a line's states produced its answer token r[j]; the row j + k is therefore also the teacher of head k at
position j. With `prompts`, the tokens of the prompt have rows, too, in front of them; nothing has produced the first
one, and its row is zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..drafting.heads import output_matrix
from .answers import Answer

FORWARD_TOKENS = 2048  # tokens, padding included, in one forward: enough rows for GEMMs to run at full speed


@torch.inference_mode()
def hidden_states(model: nn.Module, lines: Sequence[Answer], prompts: bool = False) -> Iterator[Tensor]:
    """The states (len(answer), D) bfloat16, on the CPU, of every line, in order; like lengths share a forward.

    With `prompts`: (len(prompt) + len(answer), D).
    """
    device = output_matrix(model).device
    results: list[Tensor | None] = [None] * len(lines)
    ready = 0
    for batch in batches_by_length(lines):
        width = max(len(lines[index]) for index in batch) - 1
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, index in enumerate(batch):
            text = [*lines[index].prompt, *lines[index].answer[:-1]]
            ids[row, : len(text)] = torch.tensor(text)
        # Padding stands on the right of a causal model, so nothing sees it and no mask is needed.
        states = model.base_model(ids.to(device), use_cache=False).last_hidden_state  # type: ignore[operator]
        for row, index in enumerate(batch):
            first = 0 if prompts else len(lines[index].prompt) - 1
            rows = states[row, first : len(lines[index]) - 1]
            if prompts:
                rows = torch.cat([torch.zeros_like(rows[:1]), rows])
            results[index] = rows.to("cpu", torch.bfloat16, copy=True)
        while ready < len(lines) and (found := results[ready]) is not None:
            yield found
            results[ready] = None
            ready += 1


def batches_by_length(lines: Sequence[Answer]) -> Iterator[list[int]]:
    """Indices of lines in groups which, padded to the longest line, have up to FORWARD_TOKENS tokens."""
    lengths = [len(line) - 1 for line in lines]
    batch: list[int] = []
    for index in sorted(range(len(lines)), key=lengths.__getitem__):
        if batch and lengths[index] * (len(batch) + 1) > FORWARD_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    yield batch
