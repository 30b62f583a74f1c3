"""The hidden states that produced an answer's tokens, by a forward of the target model over prompt and answer.

Row j of a line's states produced its answer token r[j]; the row j + k is therefore also the teacher of head k at
position j. With `prompts`, the tokens of the prompt have rows, too, in front of them; nothing has produced the first
one, and its row is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..drafting.heads import output_matrix
from .answers import Answer

FORWARD_TOKENS = 2048  # tokens, padding included, in one forward: enough rows for GEMMs to run at full speed


@torch.inference_mode()
def hidden_states(
    model: nn.Module, lines: Sequence[Answer], prompts: bool = False, progress: Callable[[int], object] = int
) -> Tensor:
    """The states of all lines, one after the other, (their answers' tokens, D) bfloat16, on the CPU.

    With `prompts`: (all of their tokens, D). progress: called with numbers of rows that were computed.
    """
    device = output_matrix(model).device
    results: dict[int, Tensor] = {}
    for batch in batches_by_length(lines):
        texts = [torch.tensor([*lines[index].prompt, *lines[index].answer[:-1]]) for index in batch]
        # Padding stands on the right of a causal model, so nothing sees it and no mask is needed.
        ids = pad_sequence(texts, batch_first=True).to(device)
        states = model.base_model(ids, use_cache=False).last_hidden_state  # type: ignore[operator]
        for row, index in enumerate(batch):
            first = 0 if prompts else len(lines[index].prompt) - 1
            rows = states[row, first : len(lines[index]) - 1].to("cpu", torch.bfloat16, copy=True)
            results[index] = torch.cat([torch.zeros_like(rows[:1]), rows]) if prompts else rows
            progress(len(results[index]))
    return torch.cat([results[index] for index in range(len(lines))])


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
