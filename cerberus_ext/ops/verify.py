"""What the target model chooses, and which drafts that accepts."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from .native import fake, native


def choose_tokens(
    logits: Tensor, positions: Tensor, seed: int, temperature: float, top_k: int, top_p: float,
    numbers: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The token that follows each row of logits: the best one, or one drawn with reproducible noise.

    logits: (M, V) float32 | bfloat16 | float16, contiguous, V >= 1. A NaN is never chosen, unless there is
        nothing else.
    positions: (M,) int64: the absolute position the token will have; with the seed it determines the noise.
    seed: any 64-bit integer.
    temperature: >= 0. 0: the largest logit, whatever the other arguments are. Else the softmax of logits /
        temperature is sampled (Gumbel-max: argmax of logits / temperature - log(-log(u)), u from Philox).
    top_k: >= 0: only the top_k largest logits can be drawn; 0: all of them.
    top_p: 0 < top_p <= 1: of these, only the fewest best whose probabilities sum to at least top_p.
    numbers: (3,) int64, of `sampling_numbers`: where these four are read from when the op runs, instead; what the
        numbers are is not checked. Only for a temperature > 0, there and as an argument.
    Returns (M,) int64. Ties go to the lowest id.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor, on numbers out of range.
    Source: Gumbel-max; Salmon et al. 2011 (Philox4x32-10).
    """
    return native.choose_tokens(logits, positions, seed, temperature, top_k, top_p, numbers)


def sampling_numbers(seed: int, temperature: float, top_k: int, top_p: float) -> Tensor:
    """(3,) int64, on the CPU: `numbers` of choose_tokens. Seed, top_k, the bits of temperature and top_p in float32."""
    bits = int.from_bytes(struct.pack("<ff", temperature, top_p), "little", signed=True)
    return torch.tensor([seed, top_k, bits])


@fake(choose_tokens, "logits MV, positions M, numbers? N")
def _(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


def verify_tree(draft: Tensor, target: Tensor, parents: Tensor, ancestors: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The longest path of drafts that the target model agrees with.

    Tree 0 -> 1 -> 3, 0 -> 2, draft [5, 7, 8, 9], target [7, 9, 1, 4]: node 1 is accepted (7 is what the target
    model chose after the root), node 2 is not, node 3 is (9 follows node 1): path [0, 1, 3], accepted 2.

    draft: (B, N) int64, contiguous, N >= 1: the token of each node; the root's is not read.
    target: (B, N) int64: the token that the target model chooses after each node.
    parents: (N,) int64: parents[0] = -1, parents[i] < i.
    ancestors: (N, W) int64 bit mask, as in `tree_attention`.
    depth: 0 to N - 1, of the tree: how many drafts its longest path has. Deeper nodes are not accepted.
    Returns path (B, depth + 1) int32: node 0, the accepted nodes in order, then -1;
        accepted (B,) int32: how many nodes are accepted after the root. Ties go to the lowest node.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor, on a depth out of range.
    """
    return native.verify_tree(draft, target, parents, ancestors, depth)


@fake(verify_tree, "draft BN, target BN, parents N, ancestors NW")
def _(draft: Tensor, target: Tensor, parents: Tensor, ancestors: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    if not 0 <= depth < max(draft.shape[1], 1):
        raise RuntimeError(f"verify_tree: depth must be 0 to N - 1 = {draft.shape[1] - 1}, got {depth}")
    rows = draft.shape[0]
    return draft.new_empty(rows, depth + 1, dtype=torch.int32), draft.new_empty(rows, dtype=torch.int32)
