"""A model in fewer bits a weight: rounded to what blocks of 32 can say, which steps on a CPU then read as such."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_BLOCK = 32
_LARGEST = 60000.0  # a weight, so that its scales are float16 numbers
_AT_ONCE = 1 << 22  # weights
_BITS = {"q4": 4, "q8": 8}


@dataclass(frozen=True)
class Quantized:
    """What `quantize` has done, by the names of parameters.

    bits: of those that were rounded, 4 or 8. left: matrices of products that were not, and why.
    """

    bits: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def quantize(model: PreTrainedModel, bits: str) -> Quantized:
    """Rounds the weights of a model's products, in place: it is another model then, the same with and without drafts.

    model: of any device, in float32, bfloat16 or float16. In bfloat16 steps on a CPU with AVX-512, and fused ones
        on a GPU beside one, read the blocks, to the bits of the model as it is now; in other dtypes, and elsewhere, it
        costs quality and gains nothing.
    bits: of the weights of linear layers. "q4": 16 values of a block of 32 inputs, at equal distances from the least
        weight to the largest (as ggml's Q4_1; from -8 to 7 times a number, as Q4_0, where all have one sign and little
        lies between them), the LM head in "q8": 255 values around 0 (Q8_0), which costs next to nothing, and its
        errors are those of the tokens. "q8": all of them so.

    Embeddings are rounded where they are the LM head's weights, too. Norms, biases and embeddings of their own stay as
    they are: a step reads next to nothing of them. So do experts of MoE layers, which steps read in no blocks, layers
    of another number of inputs than a multiple of 32, and weights that are not finite, or beyond 60000.
    Heads for the model still draft for it nearly as well; those that name its LM head's fingerprint want
    `heads.config.lm_head_fingerprint = None`. Raises ValueError on other bits or another dtype.
    """
    if not isinstance(bits, str) or bits not in _BITS:
        raise ValueError(f"quantize: bits must be one of {', '.join(_BITS)}, got {bits!r}")
    if model.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"quantize: model must be float32, bfloat16 or float16, got {model.dtype}")
    done, head, seen = Quantized(), model.get_output_embeddings(), set[int]()
    for name, module in _products(model):
        weight = module.weight
        if id(weight) in seen:
            continue
        seen.add(id(weight))
        rows = weight.t() if isinstance(module, Conv1D) else weight
        if because := _obstacle(rows):
            done.left[name] = because
            continue
        done.bits[name] = 8 if module is head else _BITS[bits]
        _round(rows, _in_eight_bits if done.bits[name] == 8 else _in_four_bits)
    return done


def _products(model: nn.Module) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            yield f"{prefix}.weight", module


def _obstacle(rows: Tensor) -> str | None:
    if rows.shape[1] % _BLOCK:
        return f"{rows.shape[1]} inputs are no multiple of {_BLOCK}"
    if not bool(rows.detach().abs().amax() <= _LARGEST):  # of no number, too
        return f"a weight is not finite, or beyond {_LARGEST:.0f}"
    return None


@torch.no_grad()
def _round(rows: Tensor, rounded: Callable[[Tensor], Tensor]) -> None:
    """rows (O, I): those of the weight itself, or of its transpose, which are written to."""
    count = max(1, _AT_ONCE // rows.shape[1])
    for begin in range(0, len(rows), count):
        part = rows[begin : begin + count]
        blocks = rounded(part.float().reshape(-1, _BLOCK)) + 0.0  # a zero has no sign
        part.copy_(blocks.view(part.shape))


def _in_eight_bits(blocks: Tensor) -> Tensor:
    """(B, 32) float32 -> d q, q from -127 to 127; the one of the largest magnitude has one of these."""
    furthest = blocks.abs().argmax(1, keepdim=True)
    d = _float16(blocks.gather(1, furthest).abs() / 127)
    q = _integers(blocks, d, -127, 127)
    q.scatter_(1, furthest, blocks.gather(1, furthest).sign() * 127)
    return d * q


def _in_four_bits(blocks: Tensor) -> Tensor:
    """(B, 32) float32 -> d q + m, q from 0 to 15: the least and the largest weight have 0 and 15. Or d q, q from -8 to
    7, the one of the largest magnitude has -8: where bfloat16 numbers would not tell d and m."""
    (least, low), (largest, high) = blocks.min(1, keepdim=True), blocks.max(1, keepdim=True)
    m = _float16(least)
    d = _float16((largest - least) / 15)
    q = _integers(blocks - m, d, 0, 15).scatter_(1, high, 15).scatter_(1, low, 0)
    with_least = torch.where(least == largest, m, d * q + m)

    furthest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    d = _float16(furthest / -8)
    q = _integers(blocks, d, -8, 7).scatter_(1, blocks.abs().argmax(1, keepdim=True), -8)
    return torch.where(furthest.abs() > 1.5 * (largest - least), d * q, with_least)


def _integers(blocks: Tensor, d: Tensor, least: int, largest: int) -> Tensor:
    """The nearest multiples of d; 0 where d is."""
    return (blocks / d.where(d != 0, torch.inf)).round().clamp(least, largest)


def _float16(x: Tensor) -> Tensor:
    return x.half().float()
