"""The gate's signal and the heads: what drafts tokens from a hidden state."""

from __future__ import annotations

import torch
from torch import Tensor

from .native import fake, native


def hidden_entropy(hidden: Tensor) -> Tensor:
    """Entropy of softmax(hidden) over the last axis, in nats: logsumexp(x) - sum p x.

    hidden: (B, D) float32 | bfloat16 | float16, contiguous, D >= 1.
    Returns (B,) float32.
    Raises RuntimeError on another rank or dtype, on D == 0, on a non-contiguous tensor.
    Source: arXiv 2410.13344, gating mechanism.
    """
    return native.hidden_entropy(hidden)


@fake(hidden_entropy, "hidden BD")
def _(hidden: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[:1], dtype=torch.float32)


def head_stack(hidden: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """All decoding heads, all layers: the states from which the tokens after the root are drafted.

        x[k,0] = hidden
        x[k,l] = x[k,l-1] + silu(weight[l,k] @ concat(x[k,l-1], n[k,l]) + bias[l,k])
        n[k,l] = anchor for the first head or the first layer, else x[k-1,l-1]

    hidden: (B, D) float32 | bfloat16 | float16, contiguous, D >= 1: what the LM head of the target model reads.
    anchor: (B, D): what starts the chain of heads.
    weight: (L, K, D, 2D), of which columns [0, D) multiply x and [D, 2D) the neighbour n;
        or (L, K, D, D): heads without neighbours (Medusa's), anchor is then not read. L, K >= 1.
    bias: (L, K, D).
    Returns (B, K, D) of hidden's dtype: x[k,L]. Sums are float32, the states are rounded after every layer.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor.
    Source: arXiv 2410.13344, Cerberus heads.
    """
    return native.head_stack(hidden, anchor, weight, bias)


@fake(head_stack, "hidden BD, anchor BD, weight LKDI, bias LKD")
def _(hidden: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[0], weight.shape[1], hidden.shape[1])


def draft_topk(states: Tensor, projection: Tensor, drafts: int) -> tuple[Tensor, Tensor]:
    """The most likely tokens of every head: the P largest of log_softmax(projection @ state).

    states: (B, K, D) float32 | bfloat16 | float16, contiguous, D >= 1: from `head_stack`.
    projection: (Vd, D): the LM head, or the rows of it that a draft vocabulary selects.
    drafts: P, 1 <= P <= min(32, Vd).
    Returns ids (B, K, P) int64, rows of projection, best first, equal ones in order of id;
        logprobs (B, K, P) float32, natural logarithms.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor, on drafts out of range.
    """
    return native.draft_topk(states, projection, drafts)


@fake(draft_topk, "states BKD, projection VD")
def _(states: Tensor, projection: Tensor, drafts: int) -> tuple[Tensor, Tensor]:
    if drafts < 1:
        raise RuntimeError(f"draft_topk: drafts must be 1 to 32, got {drafts}")
    shape = (states.shape[0], states.shape[1], drafts)
    return states.new_empty(shape, dtype=torch.int64), states.new_empty(shape, dtype=torch.float32)


def rerank(ids: Tensor, logprobs: Tensor, parents: Tensor, children: Tensor, slopes: Tensor, rest: Tensor) -> Tensor:
    """Every head's drafts but the first's, weighed anew after each draft t of the head before it.

        l(c)    = slope log P(c) + parents[t] . children[c]
        l(rest) = slope log(max(1 - sum P, 1e-4)) + rest       all that the head does not draft

    and of these P + 1 the log-softmax. Sums are float32.

    ids: (B, K, P) int64, contiguous, K >= 1, P from 1 to 32: rows of the tables. Another one is no draft, and after
        it as a parent the drafts keep their log-probabilities.
    logprobs: (B, K, P) float32: log P. What is not finite is no draft.
    parents: (K - 1, Vd, r) float32 | bfloat16 | float16, r >= 1: of heads 2 to K.
    children: (Vd, r).
    slopes, rest: (K - 1,) float32.
    Returns (B, K - 1, P, P) float32: [b, k, p, c] of draft c of head k + 2 after draft p of head k + 1; -inf: c is no
        draft there, as where l is not finite.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor.
    """
    return native.rerank(ids, logprobs, parents, children, slopes, rest)


@fake(rerank, "ids BKP, logprobs BKP, parents JVR, children VR, slopes J, rest J")
def _(ids: Tensor, *_: Tensor) -> Tensor:
    rows, heads, drafts = ids.shape
    if heads < 1:
        raise RuntimeError(f"rerank: ids must be (B, K, P) with K >= 1, got {tuple(ids.shape)}")
    return ids.new_empty((rows, heads - 1, drafts, drafts), dtype=torch.float32)
