"""The operations of a decoding step, so that a token gets the same bits alone and as a node of a tree.

BLAS libraries choose another order of summation for another number of rows, and torch computes the last elements of a
thread's share of an elementwise operation with other code than the rest. So in a step on a CPU

    products       of an input and a weight are `ops.linear`, which sums in one order whatever the number of rows
    activations    and other functions of single elements are `ops.activation`, where torch's could differ
    attention      is `ops.tree_attention`, see attention.py
    softmax        is written out, see `_softmax`

Two ways of putting them in the place of torch's: `InvariantWeight`, which costs something only where a weight is used;
and `RowInvariant`, which sees every call. capability.py decides which one a model needs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from functools import reduce, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .. import ops
from .attention import tree_attention_call
from .swap import weight_swap

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def step_forward(model: Any, mode: Callable[[], TorchFunctionMode] | None) -> Callable[..., Any]:
    """What to call in place of `model` for decoding steps.

    mode: sees every call of the model; None: only those with weights on a CPU are seen. These are swapped for the time
    of each call, for tensors that share their memory.
    """
    if mode is not None:

        def watched(**arguments: Any) -> Any:
            with mode():
                return model(**arguments)

        return watched

    weights = {name: InvariantWeight.of(plain(weight)) for name, weight in product_weights(model).items()}
    swap = weight_swap(model, weights)

    def forward(**arguments: Any) -> Any:
        before, _thread.swapped = _thread.swapped, True
        try:
            with swap:
                return model(**arguments)
        finally:
            _thread.swapped = before

    return forward if weights else model


class _Thread(threading.local):
    swapped = False


_thread = _Thread()  # whether it was this one that swapped weights: others that use the model meanwhile find them, too


def product_weights(model: nn.Module) -> dict[str, Tensor]:
    """By name, the weights on a CPU that something may be multiplied with: all matrices but the embeddings."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() >= 2 and is_ours(weight):
                found[f"{prefix}.{name}" if prefix else name] = weight
    return found


def is_ours(tensor: Any) -> bool:
    """A plain tensor on a CPU, or a traced one on any device, of a dtype that the ops take."""
    return (
        type(tensor) in (Tensor, nn.Parameter, InvariantWeight, FakeTensor)
        and (tensor.device.type == "cpu" or type(tensor) is FakeTensor)
        and tensor.dtype in _DTYPES
        and tensor.layout == torch.strided
    )


def prompt_forward(model: nn.Module, step: Callable[..., Any]) -> Callable[..., Any]:
    """What to call for the prompt: the model itself, or, where torch's products of its dtype are slow, `step`."""
    return model if all(map(_is_native, product_weights(model).values())) else step


def _is_native(weight: Tensor) -> bool:
    """Whether this CPU has instructions that multiply the weight's dtype."""
    if weight.dtype == torch.bfloat16:
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return weight.dtype == torch.float32 or torch.cpu._is_amx_fp16_supported()


# --- products -------------------------------------------------------------------------------------------------------


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by `ops.linear`."""
    weight = plain(weight)
    if not is_ours(input) or not is_ours(weight) or input.dtype != weight.dtype or weight.dim() != 2:
        return NotImplemented
    transposed = not weight.is_contiguous()
    if transposed:
        weight = weight.t()
        if not weight.is_contiguous():
            return NotImplemented
    if bias is not None:
        bias = plain(bias)
        if bias.dtype != weight.dtype or bias.dim() != 1 or not bias.is_contiguous():
            return NotImplemented
    rows = input.reshape(-1, input.shape[-1])  # (M, I)
    output = ops.linear(rows.contiguous(), weight, bias, transposed)
    return output.view(*input.shape[:-1], output.shape[-1])


def _matmul(*factors: Tensor, **named: Any) -> Tensor:
    """input (..., I) @ weight (I, O), as of a linear that is written so; or a small product for every token."""
    if named or any(factor.dim() < 2 for factor in factors):
        return NotImplemented
    input, weight = factors
    if weight.dim() == 2:
        return _linear(input, plain(weight).t())
    if not 1 < weight.shape[-2] <= _MAX_TERMS or not is_ours(input) or not is_ours(weight):
        return NotImplemented
    terms = [input[..., :, k, None].float() * weight[..., k, None, :].float() for k in range(weight.shape[-2])]
    return reduce(torch.add, terms).to(input.dtype)


def _addmm(*terms: Tensor, **named: Any) -> Tensor:
    """bias + input @ weight (I, O), as of transformers' Conv1D."""
    if named or terms[0].dim() != 1:
        return NotImplemented
    bias, input, weight = terms
    return _linear(input, plain(weight).t(), bias)


_MAX_TERMS = 8  # of a sum that is written out

PRODUCTS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.mm: _matmul,
}

# --- functions of single elements -----------------------------------------------------------------------------------


def _elementwise(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` by `ops.activation`, where nothing but the input is given."""

    @wraps(function)
    def stand_in(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Of keywords, only False is the default; an output tensor is none.
        if not is_ours(input) or args or any(value is not False for value in kwargs.values()):
            return NotImplemented
        return ops.activation(plain(input).contiguous(), kind)

    return stand_in


def _gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    if not is_ours(input) or approximate not in ("none", "tanh"):
        return NotImplemented
    return ops.activation(plain(input).contiguous(), "gelu" if approximate == "none" else "gelu_tanh")


def _softplus(input: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    if not is_ours(input) or (beta, threshold) != (1, 20):
        return NotImplemented
    return ops.activation(plain(input).contiguous(), "softplus")


ELEMENTWISE: dict[Callable[..., Any], Callable[..., Any]] = {
    function: _elementwise(kind, function)
    for kind, functions in {
        "silu": (F.silu,),
        "tanh": (torch.tanh, Tensor.tanh),
        "sigmoid": (torch.sigmoid, Tensor.sigmoid),
        "exp": (torch.exp, Tensor.exp),
        "erf": (torch.erf, Tensor.erf),
        "cos": (torch.cos, Tensor.cos),
        "sin": (torch.sin, Tensor.sin),
    }.items()
    for function in functions
} | {F.gelu: _gelu, F.softplus: _softplus}


def _sum(input: Tensor, dim: int | None = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    """A sum of few terms that do not lie along the last axis, written out."""
    if kwargs or not isinstance(dim, int) or not is_ours(input) or dim % max(1, input.dim()) >= input.dim() - 1:
        return NotImplemented
    if not 1 <= input.shape[dim] <= _MAX_TERMS:
        return NotImplemented
    total = reduce(torch.add, plain(input).float().unbind(dim)).to(input.dtype)
    return total.unsqueeze(dim) if keepdim else total


def _mean(input: Tensor, dim: int | None = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
    total = _sum(input, dim, keepdim, **kwargs)
    return total if total is NotImplemented or dim is None else total / input.shape[dim]


SMALL_SUMS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.sum: _sum, Tensor.sum: _sum, torch.mean: _mean, Tensor.mean: _mean
}  # fmt: skip


def _softmax(input: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Tensor:
    """Along the last axis, written out: torch's own would do, but what a fused step computes has to have its bits."""
    if not is_ours(input) or not input.dim() or dim not in (-1, input.dim() - 1) or dtype not in (None, *_DTYPES):
        return NotImplemented
    result = input.dtype if dtype is None else dtype
    wide = plain(input).to(result).float()
    if not 0 < wide.shape[-1] < _MAX_ROW:
        return NotImplemented
    powers = ops.activation((wide - wide.amax(-1, keepdim=True)).contiguous(), "exp")
    return (powers / powers.sum(-1, keepdim=True)).to(result)


_MAX_ROW = 32768  # elements: the sum of such a row is shared out to threads
SOFTMAX: dict[Callable[..., Any], Callable[..., Any]] = {F.softmax: _softmax} | dict.fromkeys(
    (torch.softmax, Tensor.softmax), lambda input, dim, dtype=None: _softmax(input, dim, dtype=dtype)
)
_ALL = PRODUCTS | ELEMENTWISE | SMALL_SUMS | SOFTMAX | {F.scaled_dot_product_attention: tree_attention_call}


class InvariantWeight(Tensor):
    """A weight, products with which are `ops.linear` inside of `step_forward`. Else it is as the plain tensor."""

    itself: Tensor | None = None  # the plain tensor; None for views of it

    @staticmethod
    def of(weight: Tensor) -> InvariantWeight:
        """Shares the memory of `weight`."""
        wrapped = weight.detach().as_subclass(InvariantWeight)
        wrapped.itself = weight.detach()
        return wrapped

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in PRODUCTS:
            if _thread.swapped:
                output = PRODUCTS[func](*args, **(kwargs or {}))
                if output is not NotImplemented:
                    return output
            return func(*map(plain, args), **{name: plain(value) for name, value in (kwargs or {}).items()})
        return super().__torch_function__(func, types, args, kwargs or {})


def plain(tensor: Any) -> Any:
    """The tensor without what InvariantWeight adds; anything else as it is."""
    if type(tensor) is not InvariantWeight:
        return tensor
    if tensor.itself is not None:
        return tensor.itself
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


class RowInvariant(TorchFunctionMode):
    """While active, all that this module has a stand-in for is done by it. stand_ins: only these."""

    def __init__(self, stand_ins: Mapping[Callable[..., Any], Callable[..., Any]] = _ALL) -> None:
        super().__init__()
        self._stand_ins = stand_ins

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        output = self.replaced(func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if output is NotImplemented else output

    def replaced(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the stand-in of `func` makes of the call; NotImplemented where there is none for it."""
        return self._stand_ins[func](*args, **kwargs) if func in self._stand_ins else NotImplemented
