"""The ops of the library, one thin function each; beneath it its fake implementation, for torch.compile.

Every op runs on CPU and on CUDA (`linear` and `grouped_linear`: CPU only) and takes float32, bfloat16 or
float16. The tensors of one call are contiguous, of one device and, where they are floating point, of one
dtype; another one raises a RuntimeError "<op>: <argument> must be <what>, got <what it is>". Values of tensors
are never checked, since that would make the device wait: each docstring says what they have to be. On a CPU,
what an op computes for a row or a node is bit-equal whatever else is in the call. None of the ops has a
derivative: training uses the same formulas in plain PyTorch.

Letters: B rows, N tree nodes, K heads, L layers, P guesses per head, D hidden size, V vocabulary (Vd draft
vocabulary), S cache capacity, Hq / Hkv attention heads, E head size, W = ceil(N / 64) words, C cache planes
(2 x model layers).
"""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.cerberus_ext


def _check_devices(op: str, **tensors: Tensor | None) -> None:
    """For the fake implementations: a call with a "meta" tensor among real ones never reaches prepare.cpp."""
    present = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    first = next(iter(present))
    for name, device in present.items():
        if device != present[first]:
            raise RuntimeError(f"{op}: {name} must be on {present[first]} like {first}, got {device}")


def hidden_entropy(hidden: Tensor) -> Tensor:
    """Entropy of softmax(hidden) over the last axis, in nats: logsumexp(x) - sum p x.

    hidden: (B, D) float32 | bfloat16 | float16, contiguous, D >= 1.
    Returns (B,) float32.
    Raises RuntimeError on another rank or dtype, on D == 0, on a non-contiguous tensor.
    Source: arXiv 2410.13344, gating mechanism. Specification: reference.hidden_entropy.
    """
    return _ops.hidden_entropy(hidden)


@torch.library.register_fake("cerberus_ext::hidden_entropy")
def _(hidden: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[:1], dtype=torch.float32)


def head_stack(hidden: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """All decoding heads, all layers: the states from which the tokens after the root are guessed.

        x[k,0] = hidden
        x[k,l] = x[k,l-1] + silu(weight[l,k] @ concat(x[k,l-1], n[k,l]) + bias[l,k])
        n[k,l] = anchor for the first head or the first layer, else x[k-1,l-1]

    hidden: (B, D) float32 | bfloat16 | float16, contiguous, D >= 1: what the LM head of the base model reads.
    anchor: (B, D): what starts the chain of heads.
    weight: (L, K, D, 2D), of which columns [0, D) multiply x and [D, 2D) the neighbour n;
        or (L, K, D, D): heads without neighbours (Medusa's), anchor is then not read. L, K >= 1.
    bias: (L, K, D).
    Returns (B, K, D) of hidden's dtype: x[k,L]. Sums are float32, the states are rounded after every layer.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor.
    Source: arXiv 2410.13344, Cerberus heads. Specification: reference.head_stack.
    """
    return _ops.head_stack(hidden, anchor, weight, bias)


@torch.library.register_fake("cerberus_ext::head_stack")
def _(hidden: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check_devices("head_stack", hidden=hidden, anchor=anchor, weight=weight, bias=bias)
    return hidden.new_empty(hidden.shape[0], weight.shape[1], hidden.shape[1])


def draft_topk(states: Tensor, projection: Tensor, guesses: int) -> tuple[Tensor, Tensor]:
    """The most likely tokens of every head: the P largest of log_softmax(projection @ state).

    states: (B, K, D) float32 | bfloat16 | float16, contiguous, D >= 1: from `head_stack`.
    projection: (Vd, D): the LM head, or the rows of it that a draft vocabulary selects.
    guesses: P, 1 <= P <= min(32, Vd).
    Returns ids (B, K, P) int64, rows of projection, best first, equal ones in order of id;
        logprobs (B, K, P) float32, natural logarithms.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor, on guesses out of range.
    Specification: reference.draft_topk.
    """
    return _ops.draft_topk(states, projection, guesses)


@torch.library.register_fake("cerberus_ext::draft_topk")
def _(states: Tensor, projection: Tensor, guesses: int) -> tuple[Tensor, Tensor]:
    _check_devices("draft_topk", states=states, projection=projection)
    shape = (states.shape[0], states.shape[1], guesses)
    return states.new_empty(shape, dtype=torch.int64), states.new_empty(shape, dtype=torch.float32)


def choose_tokens(logits: Tensor, positions: Tensor, seed: int, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The token that follows each row of logits: the best one, or one drawn with reproducible noise.

    logits: (M, V) float32 | bfloat16 | float16, contiguous, V >= 1. A NaN is never chosen, unless there is
        nothing else.
    positions: (M,) int64: the absolute position the token will have; with the seed it determines the noise.
    seed: any 64-bit integer.
    temperature: >= 0. 0: the largest logit, whatever the other arguments are. Else the softmax of logits /
        temperature is sampled (Gumbel-max: argmax of logits / temperature - log(-log(u)), u from Philox).
    top_k: >= 0: only the top_k largest logits can be drawn; 0: all of them.
    top_p: 0 < top_p <= 1: of these, only the fewest best whose probabilities sum to at least top_p.
    Returns (M,) int64. Ties go to the lowest id.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor, on numbers out of range.
    Source: Gumbel-max; Salmon et al. 2011 (Philox4x32-10). Specification: reference.choose_tokens.
    """
    return _ops.choose_tokens(logits, positions, seed, temperature, top_k, top_p)


@torch.library.register_fake("cerberus_ext::choose_tokens")
def _(logits: Tensor, positions: Tensor, seed: int, temperature: float, top_k: int, top_p: float) -> Tensor:
    _check_devices("choose_tokens", logits=logits, positions=positions)
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


def tree_attention(
    q: Tensor, keys: Tensor, values: Tensor, length: Tensor, ancestors: Tensor, scale: float, window: int
) -> Tensor:
    """Attention of tree nodes to the committed tokens and to their own ancestors, themselves included.

    q: (B, N, Hq, E) float32 | bfloat16 | float16, contiguous, with the positional encoding applied.
    keys, values: (B, Hkv, S, E), Hkv divides Hq: slots 0 .. length hold the committed tokens, length ..
        length + N the nodes (`write_cache` put them there); what the other slots hold is never read into the
        result.
    length: (B,) int64, 0 <= length <= S - N.
    ancestors: (N, W) int64 bit mask: bit j of row i says that node j is on the path from the root to i, i
        included.
    scale: multiplies q k.
    window: a node at position p sees the positions > p - window; <= 0: all. Node i is at length + its depth.
    Returns (B, N, Hq, E) of q's dtype.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor.
    Specification: reference.tree_attention.
    """
    return _ops.tree_attention(q, keys, values, length, ancestors, scale, window)


@torch.library.register_fake("cerberus_ext::tree_attention")
def _(q: Tensor, keys: Tensor, values: Tensor, length: Tensor, ancestors: Tensor, scale: float, window: int) -> Tensor:
    _check_devices("tree_attention", q=q, keys=keys, values=values, length=length, ancestors=ancestors)
    return torch.empty_like(q)


def write_cache(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, length: Tensor) -> None:
    """Puts the keys and values of a step's nodes behind the committed ones: node i into slot length + i.

    keys, values: (B, Hkv, S, E) float32 | bfloat16 | float16, contiguous; changed in place.
    new_keys, new_values: (B, N, Hkv, E).
    length: (B,) int64, >= 0. Nodes whose slot would be outside of the cache are left out.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor.
    Specification: reference.write_cache.
    """
    _ops.write_cache(keys, values, new_keys, new_values, length)


@torch.library.register_fake("cerberus_ext::write_cache")
def _(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, length: Tensor) -> None:
    _check_devices("write_cache", keys=keys, values=values, new_keys=new_keys, new_values=new_values, length=length)


def verify_tree(draft: Tensor, target: Tensor, parents: Tensor, ancestors: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The longest path of guesses that the base model agrees with.

    Tree 0 -> 1 -> 3, 0 -> 2, draft [5, 7, 8, 9], target [7, 9, 1, 4]: node 1 is accepted (7 is what the base
    model chose after the root), node 2 is not, node 3 is (9 follows node 1): path [0, 1, 3], accepted 2.

    draft: (B, N) int64, contiguous, N >= 1: the token of each node; the root's is not read.
    target: (B, N) int64: the token that the base model chooses after each node.
    parents: (N,) int64: parents[0] = -1, parents[i] < i.
    ancestors: (N, W) int64 bit mask, as in `tree_attention`.
    depth: >= 0, of the tree: how many guesses its longest path has. Nodes deeper than that are not accepted.
    Returns path (B, depth + 1) int32: node 0, the accepted nodes in order, then -1;
        accepted (B,) int32: how many nodes are accepted after the root. Ties go to the lowest node.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor, on a negative depth.
    Specification: reference.verify_tree.
    """
    return _ops.verify_tree(draft, target, parents, ancestors, depth)


@torch.library.register_fake("cerberus_ext::verify_tree")
def _(draft: Tensor, target: Tensor, parents: Tensor, ancestors: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    _check_devices("verify_tree", draft=draft, target=target, parents=parents, ancestors=ancestors)
    rows = draft.shape[0]
    return draft.new_empty(rows, depth + 1, dtype=torch.int32), draft.new_empty(rows, dtype=torch.int32)


def commit_cache(cache: Tensor, length: Tensor, path: Tensor, accepted: Tensor) -> None:
    """Moves the accepted path's keys and values next to the committed ones and advances length over them.

    cache: (C, B, Hkv, S, E) float32 | bfloat16 | float16, contiguous; slot length + path[j] of each row moves
        to slot length + j, in every plane, in place.
    length: (B,) int64; becomes length + accepted + 1.
    path: (B, depth + 1) int32 and accepted: (B,) int32, as `verify_tree` returns them.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor.
    Specification: reference.commit_cache.
    """
    _ops.commit_cache(cache, length, path, accepted)


@torch.library.register_fake("cerberus_ext::commit_cache")
def _(cache: Tensor, length: Tensor, path: Tensor, accepted: Tensor) -> None:
    _check_devices("commit_cache", cache=cache, length=length, path=path, accepted=accepted)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
    """input @ weight^T + bias, every output summed in one fixed order: a row never depends on the others.

    CPU only.

    input: (M, I) float32 | bfloat16 | float16, contiguous.
    weight: (O, I); transposed: (I, O), GPT-2's Conv1D.
    bias: (O,) or None.
    Returns (M, O) of input's dtype, rounded from a float32 sum. At the levels avx512_bf16 and amx_bf16 bfloat16
        numbers below 2^-126 count as zeros.
    Raises RuntimeError on other shapes or dtypes, on a non-contiguous tensor.
    Specification: reference.linear.
    """
    return _ops.linear(input, weight, bias, transposed)


@torch.library.register_fake("cerberus_ext::linear")
def _(input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
    _check_devices("linear", input=input, weight=weight, bias=bias)
    return input.new_empty(input.shape[0], weight.shape[1 if transposed else 0])


def grouped_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor, transposed: bool = False
) -> Tensor:
    """`linear` of rows that are sorted by group, with a weight per group: the experts of a mixture model.

    Each row has the bits that `linear` gives it with its group's weight. CPU only.

    input: (S, I) float32 | bfloat16 | float16, contiguous.
    weight: (G, O, I); transposed: (G, I, O).
    bias: (G, O) or None.
    ends: (G,) int64, non-decreasing, 0 .. S: rows ends[g - 1] to ends[g] (the first group: 0 to ends[0]) are
        group g's. Rows behind the last end become 0.
    Returns (S, O) of input's dtype.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor.
    Specification: reference.grouped_linear.
    """
    return _ops.grouped_linear(input, weight, bias, ends, transposed)


@torch.library.register_fake("cerberus_ext::grouped_linear")
def _(input: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor, transposed: bool = False) -> Tensor:
    _check_devices("grouped_linear", input=input, weight=weight, bias=bias, ends=ends)
    return input.new_empty(input.shape[0], weight.shape[2 if transposed else 1])
