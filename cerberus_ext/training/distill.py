"""What one training step computes: context layer and heads with a gradient, and the loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..drafting.context_layer import ContextLayer, rotate
from .batch import Reach

Offer = tuple[
    Tensor, Tensor
]  # (N, P) each: a head's best drafts, as rows of the projection, and their log-probabilities


def offer_of(logits: Tensor, log_sum: Tensor, drafts: int) -> Offer:
    """logits (N, Vd), log_sum (N,): of their exponentials."""
    best = logits.topk(min(drafts, logits.shape[-1]))
    return best.indices, best.values - log_sum[:, None]


def head_states(hidden: Tensor, anchor: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """`ops.head_stack` with a gradient, and heads first: hidden, anchor (N, D) -> (K, N, D), all float32.

    weight (L, K, D, 2D or D), bias (L, K, D) float32. dtype: of the products. Layer 1 reads the same two vectors for
    every head, so it is one product; each layer above is one batched product.
    """
    layers, heads, size, width = weight.shape
    weight = weight.to(dtype)
    first = torch.cat([hidden, anchor], dim=-1) if width > size else hidden
    update = (first.to(dtype) @ weight[0].reshape(heads * size, width).T).float()  # (N, K * D)
    states = hidden + F.silu(update.view(-1, heads, size).transpose(0, 1) + bias[0, :, None])
    for layer in range(1, layers):
        inputs = states
        if width > size:
            neighbour = torch.cat([anchor.expand(1, -1, -1), states[:-1]])
            inputs = torch.cat([states, neighbour], dim=-1)
        update = torch.bmm(inputs.to(dtype), weight[layer].transpose(1, 2)).float()
        states = states + F.silu(update + bias[layer, :, None])
    return states


def context_states(layer: ContextLayer, reach: Reach, anchor: Tensor, dtype: torch.dtype) -> Tensor:
    """What the heads read, (S * G, D) float32: `BoundContext.read` with a gradient, for any positions.

    anchor (R, D) float32, of the reach's tokens. dtype: of the products.

    No gradient flows to the anchor: its scale is one number, which the heads themselves learn.
    """
    heads, kv_heads, size = layer.sizes
    segments, width, _ = reach.sees.shape
    hidden, anchor = reach.hidden.float(), anchor.detach()
    pairs = torch.cat([hidden, anchor], -1).to(dtype)
    of_queries, of_keys = layer.qkv.to(dtype).split([heads * size, 2 * kv_heads * size])
    q = (pairs[reach.queries] @ of_queries.T).float().view(-1, heads, size)
    keys, values = (pairs @ of_keys.T).float().view(-1, 2, kv_heads, size).unbind(1)
    q = rotate(q, reach.offsets[reach.queries]).view(segments, width, heads, size)
    keys, values = (part[reach.columns].transpose(1, 2) for part in (rotate(keys, reach.offsets), values))
    attended = F.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=reach.sees[:, None], scale=size**-0.5, enable_gqa=True
    )  # (S, Hq, G, E)
    attended = attended.transpose(1, 2).reshape(segments * width, heads * size)
    state = hidden[reach.queries] + (attended.to(dtype) @ layer.output.to(dtype).T).float()
    inputs = torch.cat([state, anchor[reach.queries]], -1)
    return state + F.silu((inputs.to(dtype) @ layer.mixer.to(dtype).T).float() + layer.bias)


@torch.no_grad()
def distillation(
    states: Tensor, projection: Tensor, teacher: Tensor, left: Tensor, counts: Tensor, decay: float,
    drafts: int = 0, offers: list[Offer] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The loss and its gradient for the states, written out: the projection is frozen, so autograd would only
    store more.

    states (K, S * G, D) of S segments of G consecutive positions; projection (Vd, D), in the dtype of the products;
    teacher (S, G + K - 1, Vd): the target model's logits, of which head k of position j reads row j + k - 1;
    left (S, G): tokens that follow in the answer; counts (K,) int64: how many positions of the whole batch, of which
    this may be a share, have left >= k.
    Loss: sum over k = 1..K of decay ** (k - 1) / counts[k - 1] times the sum, over the positions where left >= k, of
    KL(softmax(teacher) || softmax(states @ projection.T)).
    offers: is given what every head offers, so many drafts.
    Returns the loss () and its gradient (K, S * G, D).
    """
    segments, width = left.shape
    log_probs = teacher.log_softmax(-1)
    probs = log_probs.exp()
    negentropy = (probs * log_probs).sum(-1)
    del log_probs
    loss = states.new_zeros(())
    gradient = torch.empty_like(states)
    for k in range(len(states)):
        rows = slice(k, k + width)
        share = (left > k).flatten() * (decay**k / counts[k].clamp(min=1))
        target = probs[:, rows]
        logits = (states[k].to(projection.dtype) @ projection.T).to(states.dtype).view(segments, width, -1)
        log_sum = logits.logsumexp(-1)
        if offers is not None:
            offers.append(offer_of(logits.flatten(0, 1), log_sum.flatten(), drafts))
        divergence = negentropy[:, rows] + log_sum - (target * logits).sum(-1)
        loss += (divergence.flatten() * share).sum()
        wrong = logits.sub_(log_sum[..., None]).exp_().sub_(target).view(segments * width, -1)
        # Scaled after the product, where a row has D numbers instead of Vd.
        gradient[k] = (wrong.to(projection.dtype) @ projection).to(states.dtype) * share[:, None]
    return loss, gradient


def counted(left: Tensor, heads: int) -> Tensor:
    """How many positions each head can be measured at, (heads,) int64, from their `left`, of any shape."""
    return (left.flatten()[:, None] > torch.arange(heads, device=left.device)).sum(0)
