"""What every op means, in plain PyTorch: the specification that the kernels are tested against.

Each function has the name and the arguments of its op, runs on any device and is written to be read, not to be fast.
Sums are taken in float64, so that a kernel's float32 sum is compared with something better than itself; results are
rounded to the op's output dtype once, where the op says it rounds. Arguments are taken as correct: the op checks them.
The letters of the shapes are those of `cerberus_ext.ops`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference_drafts import draft_topk as draft_topk
from .reference_drafts import rerank as rerank

# ---------------------------------------------------------------- heads


def hidden_entropy(hidden: Tensor) -> Tensor:
    """hidden (B, D) -> (B,) float32: entropy of softmax(hidden) in nats, logsumexp(x) - sum p x."""
    x = hidden.double()
    return (x.logsumexp(-1) - (x.softmax(-1) * x).sum(-1)).float()


def head_stack(hidden: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """hidden, anchor (B, D), weight (L, K, D, 2D or D), bias (L, K, D) -> states (B, K, D).

    Two heads, two layers, chained (x_kl: head k after layer l; f_lk(x | n) = x + silu(W_lk concat(x, n) + b_lk)):

        layer 1:  x11 = f_11(h   | anchor)      x21 = f_12(h   | anchor)
        layer 2:  x12 = f_21(x11 | anchor)      x22 = f_22(x21 | x11)

    Columns [0, D) of a chained weight multiply x, columns [D, 2D) the neighbour. Unchained, there is no
    neighbour.
    """
    layers, heads, size, columns = weight.shape
    chained = columns == 2 * size
    states = [hidden] * heads
    for layer in range(layers):
        below = states
        states = []
        for head in range(heads):
            x = below[head].double()
            if chained:
                neighbour = anchor if head == 0 or layer == 0 else below[head - 1]
                x = torch.cat([x, neighbour.double()], -1)
            update = F.silu(F.linear(x, weight[layer, head].double(), bias[layer, head].double()))
            states.append((below[head].double() + update).to(hidden.dtype))
    return torch.stack(states, 1)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
    """input (M, I), weight (O, I) or transposed (I, O), bias (O,) or None -> (M, O): input @ weight^T + bias."""
    weight = weight.double().T if transposed else weight.double()
    return F.linear(input.double(), weight, None if bias is None else bias.double()).to(input.dtype)


def grouped_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, chosen: Tensor, transposed: bool = False
) -> Tensor:
    """input (M, J, I) or (M, 1, I), weight (G, O, I) or transposed (G, I, O), bias (G, O) or None, chosen (M, J) ->
    (M, J, O): `linear` of every row with the weight that it names, 0 where there is no such weight."""
    out = input.new_zeros(*chosen.shape, weight.shape[2 if transposed else 1])
    input = input.expand(*chosen.shape, -1)
    for group in range(len(weight)):
        rows = chosen == group
        out[rows] = linear(input[rows], weight[group], None if bias is None else bias[group], transposed)
    return out


# In float64, and where the usual formula cancels by one that does not.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: 0.5 * x * torch.special.erfc(x * -(0.5**0.5)),
    "gelu_tanh": lambda x: x / (1 + (-2 * (2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)).exp()),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "erf": torch.erf,
    "softplus": lambda x: x.clamp(min=0) + (-x.abs()).exp().log1p(),
    "cos": torch.cos,
    "sin": torch.sin,
}


def activation(input: Tensor, kind: str) -> Tensor:
    """input of any shape -> the same shape and dtype: kind(x) of each element, in float64 and rounded once."""
    return _ACTIVATIONS[kind](input.double()).to(input.dtype)


# ---------------------------------------------------------------- the choice of a token

_LOW_WORD = 0xFFFFFFFF


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al., 2011): counter (4) and key (2) -> 4 int64 tensors of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The products wrap around int64, which leaves their bits right; the masks make the words unsigned.
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((second >> 32) & _LOW_WORD) ^ c1 ^ k0,
            second & _LOW_WORD,
            ((first >> 32) & _LOW_WORD) ^ c3 ^ k1,
            first & _LOW_WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _LOW_WORD, (k1 + 0xBB67AE85) & _LOW_WORD
    return [c0, c1, c2, c3]


def gumbel_noise(positions: Tensor, seed: int, vocab: int) -> Tensor:
    """positions (M,) int64 -> (M, V) float64: the noise that `choose_tokens` adds to the logits.

    Token v at position p takes word v % 4 of Philox(counter = (v // 4, low p, high p, 0), key = (low seed,
    high seed)), u = (word + 0.5) 2^-32, which is never 0 or 1, and g = -log(-log u).
    """
    p = positions[:, None]
    block = torch.arange((vocab + 3) // 4, device=positions.device).expand(len(positions), -1)
    counter = [block, (p & _LOW_WORD).expand_as(block), ((p >> 32) & _LOW_WORD).expand_as(block), block * 0]
    key = [torch.full_like(block, seed & _LOW_WORD), torch.full_like(block, (seed >> 32) & _LOW_WORD)]
    words = torch.stack(philox(counter, key), -1).flatten(1)[:, :vocab]
    return -(-((words.double() + 0.5) * 2.0**-32).log()).log()


def choose_tokens(
    logits: Tensor, positions: Tensor, seed: int, temperature: float, top_k: int, top_p: float,
    numbers: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """logits (M, V), positions (M,) -> tokens (M,) int64.

    temperature 0: the largest logit. Otherwise the largest logit / temperature + noise among the tokens kept:
    the top_k best (0: all), and of these the fewest best whose probabilities sum to at least top_p. Ties go
    to the lowest id. A NaN is worse than everything else; a row of nothing but NaN gives token 0.
    numbers (3,) int64: seed, top_k, and the bits of temperature and top_p in float32; they count instead.
    """
    if numbers is not None and temperature != 0:
        (seed, top_k), (temperature, top_p) = numbers[:2].tolist(), numbers[2:].view(torch.float32).tolist()
    missing = logits.isnan()
    x = logits.double().masked_fill(missing, -math.inf)
    # Best first, equal ones in order of id, NaN after everything else.
    order = x.sort(dim=-1, descending=True, stable=True).indices
    order = order.gather(-1, missing.gather(-1, order).int().sort(dim=-1, stable=True).indices)
    if temperature == 0:
        return order[:, 0]

    ranked = x.gather(-1, order) / torch.tensor(temperature).double()  # ops hold the temperature in float32
    # exp(x - max), of equal infinities too
    weight = torch.where(ranked == ranked[:, :1], 1.0, (ranked - ranked[:, :1]).exp())
    kept = ~missing.gather(-1, order)
    if top_k > 0:
        kept[:, top_k:] = False
    weight = weight * kept
    if top_p < 1:
        mass_before = weight.cumsum(-1) - weight
        kept &= mass_before < torch.tensor(top_p).double() * weight.sum(-1, keepdim=True)
    kept[:, 0] = True  # whatever the limits are, the best one stays

    noisy = ranked + gumbel_noise(positions, seed, logits.shape[-1]).gather(-1, order)
    noisy = noisy.masked_fill(~kept, -math.inf)
    best = kept & (noisy == noisy.max(-1, keepdim=True).values)
    return order.masked_fill(~best, logits.shape[-1]).min(-1).values


# ---------------------------------------------------------------- tree and cache


def is_ancestor(ancestors: Tensor, nodes: int) -> Tensor:
    """ancestors (N, W) int64 -> (N, N) bool: [i, j]: node j is on the path from the root to i, i included."""
    bits = (ancestors[:, :, None] >> torch.arange(64, device=ancestors.device)) & 1
    return bits.flatten(1)[:, :nodes].bool()


def visible_slots(length: Tensor, ancestors: Tensor, capacity: int, window: int) -> Tensor:
    """length (B,), ancestors (N, W) -> (B, N, S) bool: the cache slots that node i of row b attends to.

    Row with length 3, the tree 0 -> 1, 0 -> 2, capacity 7, no window:

        slot    0 1 2 | 3 4 5 | 6
        node 0  x x x | x . . | .
        node 1  x x x | x x . | .
        node 2  x x x | x . x | .

    Slot s < length holds position s; node i is at position length + its depth. With a window > 0 a node at
    position p sees positions > p - window only.
    """
    nodes = len(ancestors)
    if nodes == 0:
        return torch.zeros(len(length), 0, capacity, dtype=torch.bool, device=length.device)
    path = is_ancestor(ancestors, nodes)
    depth = path.sum(-1) - 1
    slots = torch.arange(capacity, device=length.device)
    node = slots - length[:, None]  # (B, S): which node sits in the slot; negative: committed
    holds_node = (node >= 0) & (node < nodes)
    node = node.clamp(0, nodes - 1)
    committed = slots < length[:, None]
    visible = committed[:, None] | (holds_node[:, None] & path[:, node].transpose(0, 1))
    if window > 0:
        slot_position = torch.where(committed, slots, length[:, None] + depth[node])  # (B, S)
        node_position = length[:, None] + depth  # (B, N)
        visible &= slot_position[:, None] > node_position[:, :, None] - window
    return visible


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
    """q (B, N, Hq, E), keys/values (B, Hkv, S, E), length (B,), ancestors (N, W), sinks (Hq,) -> (B, N, Hq, E).

    softmax(score) v over `visible_slots`; query head h reads key/value head h // (Hq / Hkv). The score is scale q k, or
    softcap tanh(scale q k / softcap) where softcap > 0. A sink is one more logit of its query head, without a value.
    """
    group = q.shape[2] // keys.shape[1]
    k = keys.double().repeat_interleave(group, 1)  # (B, Hq, S, E)
    v = values.double().repeat_interleave(group, 1)
    visible = visible_slots(length, ancestors, keys.shape[2], window)[:, None]  # (B, 1, N, S)
    scores = (q.double().transpose(1, 2) @ k.transpose(2, 3)) * scale
    if softcap > 0:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        logits = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, logits], -1)
    # A node that sees nothing gives 0: the softmax of nothing but -inf is not a number.
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    weight = scores.softmax(-1).masked_fill(nothing, 0)[..., : keys.shape[2]]
    # Slots out of sight may hold anything, NaN included.
    v = v.masked_fill(~visible.any(2).unsqueeze(-1), 0)
    return (weight @ v).transpose(1, 2).to(q.dtype)


def write_cache(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, length: Tensor) -> None:
    """keys/values (B, Hkv, S, E), new (B, N, Hkv, E): node i of row b goes to slot length[b] + i.

    What would lie outside of the cache is left out.
    """
    for b, start in enumerate(length.tolist()):
        for i in range(new_keys.shape[1]):
            if 0 <= start + i < keys.shape[2]:
                keys[b, :, start + i] = new_keys[b, i]
                values[b, :, start + i] = new_values[b, i]


def verify_tree(draft: Tensor, target: Tensor, parents: Tensor, ancestors: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """draft, target (B, N), parents (N,), ancestors (N, W) -> path (B, depth + 1) int32, accepted (B,) int32.

    Node 0 is accepted; node i is where its parent is and draft[i] == target[parent]. The longest accepted
    path wins, ties go to the lowest node. Nodes deeper than `depth` are left out. The path is padded with -1.
    """
    rows, nodes = draft.shape
    on_path = is_ancestor(ancestors, nodes)
    levels = (on_path.sum(-1) - 1).tolist()
    path = torch.full((rows, depth + 1), -1, dtype=torch.int32, device=draft.device)
    accepted = torch.zeros(rows, dtype=torch.int32, device=draft.device)
    for b in range(rows):
        fits = [True] * nodes
        best = 0
        for i in range(1, nodes):
            parent = int(parents[i])
            fits[i] = fits[parent] and bool(draft[b, i] == target[b, parent])
            if fits[i] and levels[best] < levels[i] <= depth:
                best = i
        chosen = on_path[best].nonzero().flatten()  # increasing, so in order from the root
        path[b, : len(chosen)] = chosen.int()
        accepted[b] = len(chosen) - 1
    return path, accepted


def commit_cache(cache: Tensor, length: Tensor, path: Tensor, accepted: Tensor) -> None:
    """cache (C, B, Hkv, S, E), length (B,), path (B, depth + 1), accepted (B,): keep the accepted path.

    Slot length + path[j] moves to slot length + j for j = 0 .. accepted; then length grows by accepted + 1.
    A path is increasing, so that moving in order never overwrites what is still to be moved.
    """
    for b, start in enumerate(length.tolist()):
        for j in range(int(accepted[b]) + 1):
            cache[:, b, :, start + j] = cache[:, b, :, start + int(path[b, j])]
    length += accepted + 1
