"""Reads one step of a model call by call, to say by construction whether a token's bits depend on the other tokens.

A call is covered where it is one of our row-invariant ops (row_invariant.py), or one of torch's functions that treat
every row by itself (`_ROW_BY_ROW`, `_ALONG_ROWS`). Anything else is named: nothing is concluded from bits that agree.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .row_invariant import ELEMENTWISE, PRODUCTS, SMALL_SUMS, RowInvariant
from .stand_ins import current_step

# Moves, selects, compares or makes elements, or computes each one by exact or correctly rounded arithmetic.
_ROW_BY_ROW = frozenset(
    """
    __get__ __set__ __getitem__ __setitem__ __len__ __bool__ __format__ __repr__ __index__ dim size stride numel
    shape type to type_as float half bfloat16 double int long bool clone detach contiguous is_contiguous
    is_floating_point is_complex data_ptr element_size get_device is_inference requires_grad_ item tolist
    view view_as reshape flatten unflatten squeeze unsqueeze transpose permute t movedim swapaxes expand expand_as
    broadcast_to narrow split chunk unbind select index_select gather take_along_dim cat concat stack hstack repeat
    repeat_interleave pad flip roll tensor_split split_with_sizes new_empty new_zeros new_ones new_full new_tensor
    empty zeros ones full empty_like zeros_like ones_like full_like arange tensor as_tensor one_hot scatter scatter_
    masked_fill masked_fill_ where tril triu fill_ zero_ copy_ embedding dropout dropout_ isnan isinf isfinite
    logical_and logical_or logical_not nonzero argsort sort unique greater add add_ multiply
    subtract divide true_divide __add__ __radd__ __iadd__ sub sub_ __sub__ __rsub__ __isub__ mul mul_ __mul__
    __rmul__ __imul__ div div_ __truediv__ __rtruediv__ __rdiv__ __itruediv__ __floordiv__ __mod__ remainder neg
    __neg__ abs sign square sqrt reciprocal clamp clamp_ clip relu relu_ maximum minimum eq ne lt le gt ge
    __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__ __xor__ __invert__ bitwise_and bitwise_or floor ceil
    round hardtanh relu6 is_autocast_enabled get_autocast_dtype
    """.split()  # noqa: SIM905
)
# A function of each row along the last axis.
_ALONG_ROWS = frozenset(
    """
    mean sum var std softmax log_softmax logsumexp layer_norm rms_norm norm vector_norm normalize topk argmax argmin
    max min amax amin
    """.split()  # noqa: SIM905
)
_PLACE_OF_DIM = {"topk": 2, "norm": 2, "normalize": 2}  # among the arguments; of all others 1
_WHOLE_ROWS = {"layer_norm", "rms_norm"}  # along the last axis without saying so
_LANES = 64  # elements that torch's vector code takes at a time, at most: two AVX-512 registers of bfloat16
MAX_PADDING = 16  # nodes; as many as a step is ever filled up by
_SHARE = 32768  # elements from which on torch gives another thread a share


class Audit(RowInvariant):
    """While active, notes what a step over a tree of `nodes` nodes calls; another step may follow, of another number.

    uncovered: the first call that is not known to treat rows one by one, None: there is none.
    widths: elements per node of the functions that torch computes by vector code.
    sees_all: every call has to be seen: some of these are laid out otherwise, or nothing else finds what is replaced.
    """

    def __init__(self, nodes: int) -> None:
        super().__init__()
        self.nodes = nodes
        self.uncovered: str | None = None
        self.widths: set[int] = set()
        self.sees_all = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        step = current_step()
        attended = 0 if step is None else step.attended
        output = self.replaced(func, args, kwargs or {})
        if output is NotImplemented:
            self._note(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))
        if func in ELEMENTWISE:
            self._note_width(args[0])
        elif func in PRODUCTS:
            self.sees_all = self.sees_all or not any(map(_is_weight, args))
        elif func in SMALL_SUMS or step is not None and step.attended > attended:
            self.sees_all = True  # nothing else puts these in the place of torch's
        return output

    def _note(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        name = getattr(func, "__name__", str(func))
        if not self._is_covered(func, name, args, kwargs) and self.uncovered is None:
            self.uncovered = f"{type(_caller() or self).__name__} calls {name}"

    def _is_covered(
        self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> bool:
        if getattr(func, "_qualified_op_name", "").startswith("cerberus_ext::"):
            return True
        if func in PRODUCTS or name in ("bmm", "matmul"):
            # A sum of one product, of positions and frequencies say, has one order.
            return len(args) > 1 and isinstance(args[0], Tensor) and args[0].dim() > 1 and args[0].shape[-1] == 1
        if name in ("pow", "__pow__", "pow_"):  # computed by products, divisions and roots
            power = args[1] if len(args) > 1 else None
            if isinstance(power, Tensor) or power not in (2, 3, 0.5, -0.5, -1, -2):
                return False
            return power != -0.5 or not _is_16_bit(args[0])
        if name == "rsqrt":
            return not _is_16_bit(args[0])
        if name in ("any", "all"):  # of all tokens: models ask so whether something has overflown
            return False
        if name in _WHOLE_ROWS:
            return len(kwargs.get("normalized_shape", args[1] if len(args) > 1 else ())) == 1
        if name in ("sort", "argsort") and _is_floating(args):
            return kwargs.get("dim", args[1] if len(args) > 1 else -1) in (-1, args[0].dim() - 1)
        if name in _ROW_BY_ROW:
            return kwargs.get("alpha", 1) == 1  # or vector code rounds once, and the rest twice
        if name in _ALONG_ROWS:
            tensors = [argument for argument in args if isinstance(argument, Tensor)]
            place = _PLACE_OF_DIM.get(name, 1)
            along = kwargs.get("dim", args[place] if len(args) > place else None)
            if name == "topk" or func is F.softmax and along is None:
                along = -1 if along is None else along
            if tensors and tensors[0].dim() and tensors[0].shape[-1] >= _SHARE:  # one such row is split over threads
                return not _is_floating(args)
            whole = tensors[0].dim() if tensors else 0
            return along in (-1, whole - 1) or along in ([-1], (-1,)) or not _is_floating(args)
        return not _is_floating((*args, *kwargs.values()))

    def _note_width(self, input: Tensor) -> None:
        """input: of a function of single elements, which torch computes by vector code and the rest by other code."""
        if input.numel() % self.nodes or not input.is_contiguous():
            self.sees_all = True
        else:
            self.widths.add(input.numel() // self.nodes)


def unreadable(model: nn.Module) -> str | None:
    """A module whose calls an Audit does not see, as it is compiled; None: there is none."""
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            return f"{module.original_name} is compiled by TorchScript"
        own = vars(module)
        compiled = own.get("_compiled_call_impl") is not None or "_orig_mod" in module._modules
        if compiled or hasattr(own.get("forward"), "_torchdynamo_orig_callable"):
            return f"{type(module).__name__} is compiled by torch.compile"
    return None


def _is_floating(values: Iterable[Any]) -> bool:
    return any(isinstance(value, Tensor) and value.is_floating_point() for value in values)


def _is_16_bit(tensor: Tensor) -> bool:
    """Of such, torch rounds 1 / root(x) twice where it does not use vector code, and once where it does."""
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _caller() -> nn.Module | None:
    """The innermost module that is running."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if isinstance(module := frame.f_locals.get("self"), nn.Module):
            return module
        frame = frame.f_back
    return None


def _is_weight(argument: Any) -> bool:
    """Whether it is, or is a part of, a weight of the running module that InvariantWeight takes the place of."""
    module = _caller()
    if module is None or isinstance(module, nn.Embedding) or not isinstance(argument, Tensor):
        return False
    storage = argument.untyped_storage().data_ptr()
    own = (weight for weight in module.parameters(recurse=False) if weight.dim() >= 2)
    return any(weight.untyped_storage().data_ptr() == storage for weight in own)


def padded_nodes(nodes: int, widths: Iterable[int], threads: int) -> int | None:
    """The next number of nodes for which vector code computes all elements of functions that are `widths` wide.

    None: there is none nearby. So many nodes get the same bits, whatever their number.
    """
    widths = tuple(widths)
    for size in range(nodes, nodes + MAX_PADDING + 1 if nodes > 1 else 2):
        if all(_all_vectors(size * width, threads) for width in widths):
            return size
    return None


def _all_vectors(elements: int, threads: int) -> bool:
    """Whether the shares of all threads are multiples of what vector code takes at a time."""
    shares = 1 if elements < _SHARE else min(threads, math.ceil(elements / _SHARE))
    return elements % _LANES == 0 and math.ceil(elements / shares) % _LANES == 0
