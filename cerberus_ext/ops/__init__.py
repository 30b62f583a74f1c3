"""The ops of the library, one thin function each; beneath it its fake implementation, for torch.compile.

Every op runs on CPU and on CUDA (`linear`, `grouped_linear` and `activation`: CPU only) and takes float32,
bfloat16 or float16. The tensors of one call are contiguous, of one device and, where they are floating point, of one
dtype; another one raises a RuntimeError "<op>: <argument> must be <what>, got <what it is>". Values of tensors
are never checked, since that would make the device wait: each docstring says what they have to be. On a CPU,
what an op computes for a row or a node is bit-equal whatever else is in the call. None of the ops has a
derivative: training uses the same formulas in plain PyTorch.

Letters: B rows, N tree nodes, K heads, L layers, P drafts per head, D hidden size, V vocabulary (Vd draft
vocabulary), S cache capacity, Hq / Hkv attention heads, E head size, W = ceil(N / 64) words, C cache planes
(2 x model layers).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .libraries import load_libraries

load_libraries()

_ops = torch.ops.cerberus_ext
_LONGEST_AXIS = 2**48  # of a tensor without memory: torch does not count what is larger


def _check(op: str, axes: str, *tensors: Tensor | None) -> None:
    """For the fake implementations, which a call with a "meta" tensor reaches: devices and ranks, as prepare.cpp does.

    axes: "input MI, weight OI, bias? O": the arguments' names, a ? where None is one, and a letter for each axis.
    """
    first = tensors[0]
    for text, tensor in zip(axes.split(", "), tensors, strict=True):
        name, letters = text.split()
        if tensor is None:
            if name.endswith("?"):
                continue
            raise RuntimeError(f"{op}: {name} must be a tensor, got None")
        name = name.rstrip("?")
        if first is not None and tensor.device != first.device:
            raise RuntimeError(f"{op}: {name} must be on {first.device} like {axes.split()[0]}, got {tensor.device}")
        if tensor.dim() != len(letters):
            raise RuntimeError(f"{op}: {name} must be of {len(letters)} axes, got {tuple(tensor.shape)}")
        if max(tensor.shape, default=0) >= _LONGEST_AXIS:
            raise RuntimeError(f"{op}: {name} must be of axes below {_LONGEST_AXIS}, got {tuple(tensor.shape)}")


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
    _check("hidden_entropy", "hidden BD", hidden)
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
    Source: arXiv 2410.13344, Cerberus heads. Specification: reference.head_stack.
    """
    return _ops.head_stack(hidden, anchor, weight, bias)


@torch.library.register_fake("cerberus_ext::head_stack")
def _(hidden: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    _check("head_stack", "hidden BD, anchor BD, weight LKDI, bias LKD", hidden, anchor, weight, bias)
    return hidden.new_empty(hidden.shape[0], weight.shape[1], hidden.shape[1])


def draft_topk(states: Tensor, projection: Tensor, drafts: int) -> tuple[Tensor, Tensor]:
    """The most likely tokens of every head: the P largest of log_softmax(projection @ state).

    states: (B, K, D) float32 | bfloat16 | float16, contiguous, D >= 1: from `head_stack`.
    projection: (Vd, D): the LM head, or the rows of it that a draft vocabulary selects.
    drafts: P, 1 <= P <= min(32, Vd).
    Returns ids (B, K, P) int64, rows of projection, best first, equal ones in order of id;
        logprobs (B, K, P) float32, natural logarithms.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor, on drafts out of range.
    Specification: reference.draft_topk.
    """
    return _ops.draft_topk(states, projection, drafts)


@torch.library.register_fake("cerberus_ext::draft_topk")
def _(states: Tensor, projection: Tensor, drafts: int) -> tuple[Tensor, Tensor]:
    _check("draft_topk", "states BKD, projection VD", states, projection)
    if drafts < 1:
        raise RuntimeError(f"draft_topk: drafts must be 1 to 32, got {drafts}")
    shape = (states.shape[0], states.shape[1], drafts)
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
    _check("choose_tokens", "logits MV, positions M", logits, positions)
    return logits.new_empty(logits.shape[:1], dtype=torch.int64)


def tree_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    ancestors: Tensor,
    scale: float,
    window: int,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of tree nodes to the committed tokens and to their own ancestors, themselves included.

    q: (B, N, Hq, E) float32 | bfloat16 | float16, contiguous, with the positional encoding applied.
    keys, values: (B, Hkv, S, E), Hkv divides Hq: slots 0 .. length hold the committed tokens, length ..
        length + N the nodes (`write_cache` put them there); what the other slots hold is never read into the
        result.
    length: (B,) int64, 0 <= length <= S - N.
    ancestors: (N, W) int64 bit mask: bit j of row i says that node j is on the path from the root to i, i
        included.
    scale: multiplies q k; finite in float32.
    window: a node at position p sees the positions > p - window; <= 0: all. Node i is at length + its depth.
    softcap: > 0: the score is softcap * tanh(scale q k / softcap) (Gemma 2); 0: scale q k. Finite in float32.
    sinks: (Hq,) of q's dtype or None: one more logit of each query head, which takes its share of the softmax and
        has no value (gpt_oss).
    Returns (B, N, Hq, E) of q's dtype. A node that sees no slot gives 0.
    Raises RuntimeError on other shapes, dtypes, devices, on a non-contiguous tensor, on numbers out of range.
    Specification: reference.tree_attention.
    """
    return _ops.tree_attention(q, keys, values, length, ancestors, scale, window, softcap, sinks)


@torch.library.register_fake("cerberus_ext::tree_attention")
def _(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    ancestors: Tensor,
    scale: float,
    window: int,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    _check(
        "tree_attention",
        "q BNHE, keys BHSE, values BHSE, length B, ancestors NW, sinks? H",
        q,
        keys,
        values,
        length,
        ancestors,
        sinks,
    )
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
    _check(
        "write_cache",
        "keys BHSE, values BHSE, new_keys BNHE, new_values BNHE, length B",
        keys,
        values,
        new_keys,
        new_values,
        length,
    )


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
    Specification: reference.verify_tree.
    """
    return _ops.verify_tree(draft, target, parents, ancestors, depth)


@torch.library.register_fake("cerberus_ext::verify_tree")
def _(draft: Tensor, target: Tensor, parents: Tensor, ancestors: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    _check("verify_tree", "draft BN, target BN, parents N, ancestors NW", draft, target, parents, ancestors)
    if not 0 <= depth < max(draft.shape[1], 1):
        raise RuntimeError(f"verify_tree: depth must be 0 to N - 1 = {draft.shape[1] - 1}, got {depth}")
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
    _check("commit_cache", "cache CBHSE, length B, path BP, accepted B", cache, length, path, accepted)


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
    _check("linear", "input MI, weight OI, bias? O", input, weight, bias)
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
    _check("grouped_linear", "input SI, weight GOI, bias? GO, ends G", input, weight, bias, ends)
    return input.new_empty(input.shape[0], weight.shape[2 if transposed else 1])


def activation(input: Tensor, kind: str) -> Tensor:
    """kind(input), element by element: an element's bits depend on its value alone.

    CPU only. torch's own kernels compute the last elements of a thread's share by other code than the rest, which may
    differ in the last bit: there, what a token becomes can depend on how many tokens are in the call.

    input: float32 | bfloat16 | float16 of any shape, contiguous.
    kind: silu, gelu, gelu_tanh, tanh, sigmoid, exp, erf, softplus, cos or sin.
    Returns input's shape and dtype, within 1 ulp of float32 before it is rounded to the dtype.
    Raises RuntimeError on another dtype or kind, on a non-contiguous tensor.
    Specification: reference.activation.
    """
    return _ops.activation(input, kind)


@torch.library.register_fake("cerberus_ext::activation")
def _(input: Tensor, kind: str) -> Tensor:
    return torch.empty_like(input)
