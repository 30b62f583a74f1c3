"""Linears whose rows do not depend on each other, so that a token gets the same bits alone and as a node of a tree.

BLAS libraries choose another order of summation for another number of rows. On most CPUs that makes the logits of a
token differ in their last bits between an autoregressive step and a step with a tree, and a near tie can then go the
other way. `ops.linear` sums in one order whatever the number of rows. It is used where this machine's own linears are
found to depend on it, and for 16-bit types that the CPU does not multiply natively, where torch's are far
slower; a CPU with AMX multiplies bfloat16 rows independently and keeps its own, faster ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from . import ops

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Row counts that a library's choice of kernel may depend on, up to the size of the usual trees.
_PROBED_ROWS = (1, 2, 3, 4, 5, 8, 16, 17, 31, 32)


def step_forward(model: nn.Module) -> Callable[..., Any]:
    """What to call in place of `model` for decoding steps: the model itself, or it with `ops.linear` for its linears.

    `torch.func.functional_call` swaps the weights for the time of each call, for tensors that share their memory.
    """
    own = replaced_weights(model)
    if not own:
        return model
    weights: dict[str, Tensor] = {name: InvariantWeight.of(weight) for name, weight in own.items()}

    def forward(**arguments: Any) -> Any:
        return torch.func.functional_call(model, weights, (), arguments, tie_weights=False)

    return forward


def replaced_weights(model: nn.Module) -> dict[str, Tensor]:
    """By name, the weights that are to be multiplied by `ops.linear`: those of all plain linears, or none."""
    own: dict[str, Any] = {
        f"{name}.weight": module.weight for name, module in model.named_modules() if _is_plain_linear(module)
    }
    return {} if all(map(_is_native, own.values())) and linears_row_invariant(own.values()) else own


def prompt_forward(model: nn.Module, step: Callable[..., Any]) -> Callable[..., Any]:
    """What to call for the prompt: the model itself, or, where torch's products of its dtype are slow, `step`."""
    weights: list[Any] = [module.weight for module in model.modules() if _is_plain_linear(module)]
    return model if all(map(_is_native, weights)) else step


class InvariantWeight(Tensor):
    """A linear's weight (O, I) for which `F.linear` is `ops.linear`. Anything else treats it as the plain tensor."""

    plain: Tensor

    @staticmethod
    def of(weight: Tensor) -> InvariantWeight:
        """Shares the memory of `weight`."""
        wrapped = weight.detach().as_subclass(InvariantWeight)
        wrapped.plain = weight.detach()
        return wrapped

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and type(args[0]) is Tensor:
            input, weight, *bias = args
            if input.dtype == weight.plain.dtype:
                return _linear(input, weight.plain, *bias)
        return super().__torch_function__(func, types, args, kwargs or {})


class InvariantLinears(TorchFunctionMode):
    """While active, `F.linear` is `ops.linear`, for tracing a step: tensors that are traced cannot be InvariantWeights.

    plain_weights: the traced tensors of the linears that `step_forward` would change.
    """

    def __init__(self, plain_weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._plain = {id(weight) for weight in plain_weights}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear and not kwargs and id(args[1]) in self._plain and args[0].dtype == args[1].dtype:
            return _linear(*args)
        return func(*args, **(kwargs or {}))


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by `ops.linear`."""
    rows = input.reshape(-1, input.shape[-1])  # (M, I)
    output = ops.linear(rows.contiguous(), weight, bias)
    return output.view(*input.shape[:-1], output.shape[-1])


def linears_row_invariant(weights: Iterable[Tensor]) -> bool:
    """Whether `F.linear` with each of these weights gives every row the same bits for 1 to 32 rows, on this machine."""
    return all(_probe(weight) for weight in sorted({_kind(w): w for w in weights}.values(), key=Tensor.numel))


_probed: dict[tuple[Any, ...], bool] = {}


def _probe(weight: Tensor) -> bool:
    """One probe per shape, dtype and number of threads: what decides which kernel a library takes."""
    kind = _kind(weight)
    if kind not in _probed:
        # Not inference mode's tensors, and no use of the global random state.
        generator = torch.Generator(weight.device).manual_seed(0)
        most = max(_PROBED_ROWS)
        with torch.no_grad():
            x = torch.randn(most, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)
            full = F.linear(x, weight)
            _probed[kind] = all(torch.equal(F.linear(x[:rows], weight), full[:rows]) for rows in _PROBED_ROWS)
    return _probed[kind]


def _is_native(weight: Tensor) -> bool:
    """Whether this CPU has instructions that multiply the weight's dtype."""
    if weight.dtype == torch.bfloat16:
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return weight.dtype == torch.float32 or torch.cpu._is_amx_fp16_supported()


def _kind(weight: Tensor) -> tuple[Any, ...]:
    return (tuple(weight.shape), weight.dtype, weight.device.type, torch.get_num_threads())


def _is_plain_linear(module: nn.Module) -> bool:
    """A linear on a CPU that `ops.linear` can stand in for."""
    if type(module).forward is not nn.Linear.forward:
        return False
    weight = module.weight
    return (
        isinstance(weight, Tensor)
        and weight.device.type == "cpu"
        and weight.dtype in _DTYPES
        and weight.is_contiguous()
    )
