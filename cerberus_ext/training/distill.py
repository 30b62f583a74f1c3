"""What one training step computes: the heads with a gradient, the loss, the learning rate."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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


@torch.no_grad()
def distillation(
    states: Tensor, projection: Tensor, teacher: Tensor, left: Tensor, counts: Tensor, decay: float
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient for the states, written out: the projection is frozen, so autograd would only
    store more.

    states (K, S * G, D) of S segments of G consecutive positions; projection (Vd, D), in the dtype of the products;
    teacher (S, G + K - 1, Vd): the target model's logits, of which head k of position j reads row j + k - 1;
    left (S, G): tokens that follow in the answer; counts (K,) int64: how many positions of the whole batch, of which
    this may be a share, have left >= k.
    Loss: sum over k = 1..K of decay ** (k - 1) / counts[k - 1] times the sum, over the positions where left >= k, of
    KL(softmax(teacher) || softmax(states @ projection.T)).
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
        divergence = negentropy[:, rows] + log_sum - (target * logits).sum(-1)
        loss += (divergence.flatten() * share).sum()
        wrong = logits.sub_(log_sum[..., None]).exp_().sub_(target).view(segments * width, -1)
        # Scaled after the product, where a row has D numbers instead of Vd.
        gradient[k] = (wrong.to(projection.dtype) @ projection).to(states.dtype) * share[:, None]
    return loss, gradient


def counted(left: Tensor, heads: int) -> Tensor:
    """How many positions each head can be measured at, (heads,) int64, from their `left`, of any shape."""
    return (left.flatten()[:, None] > torch.arange(heads, device=left.device)).sum(0)


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warmup to `peak`, then a cosine that ends at zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def frequent_tokens(tokens: Tensor, count: int, vocab_size: int) -> Tensor:
    """The `count` most frequent ids of `tokens`, ascending; ties and the never seen go to the lowest ids."""
    order = torch.bincount(tokens, minlength=vocab_size).sort(descending=True, stable=True).indices
    return order[:count].sort().values
