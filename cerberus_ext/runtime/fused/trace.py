"""A step of the target model, or of a context layer, as a flat list of ATen calls.

It runs once over NODES nodes, on tensors without data. NODES is a prime that is no dimension of a model, so that
the axis of the nodes is known by its size wherever it goes.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ...target.attention import UnsupportedAttention
from ...target.cache import TreeCache
from ...target.experts import experts_switch
from ...target.row_invariant import RowInvariant

if TYPE_CHECKING:
    from ...target.model import TargetModel

NODES = 251


class NotFused(Exception):
    """The model's step cannot be a program; the message says why."""


class Ref(NamedTuple):
    """A tensor among the arguments of a call, by its number."""

    number: int


class Call(NamedTuple):
    """outputs = op(*args, **kwargs), tensors by their numbers."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]


class Trace(NamedTuple):
    """calls: in order. shapes, dtypes: of every value, by number. tokens, positions, length, ancestors, hidden, logits:
    numbers. planes: keys and values of each layer in turn. weights, names: the model's tensors, by number.

    Of a context layer, hidden is what it reads, which is `given`, and logits what it makes.
    """

    calls: list[Call]
    shapes: list[torch.Size]
    dtypes: list[torch.dtype]
    tokens: int
    positions: int
    length: int
    ancestors: int
    planes: list[int]
    weights: dict[int, Tensor]
    names: dict[int, str]
    hidden: int
    logits: int
    given: bool = False  # whether the hidden states are there before the first call
    device: torch.device = torch.device("cpu")  # noqa: RUF009


class _Recorder(TorchDispatchMode):
    """While active, notes every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.shapes: list[torch.Size] = []
        self.dtypes: list[torch.dtype] = []
        self.weights: dict[int, Tensor] = {}  # what the model computes with, by number
        self._numbers: dict[int, int] = {}
        self._kept: list[Tensor] = []  # so that no other tensor gets the identity of one
        self._views: dict[int, set[int]] = {}  # by storage: the tensors that share it

    def number(self, tensor: Tensor) -> int:
        """A new one."""
        number = len(self.shapes)
        self._numbers[id(tensor)] = number
        self._kept.append(tensor)
        self.shapes.append(tensor.shape)
        self.dtypes.append(tensor.dtype)
        self._views.setdefault(tensor.untyped_storage()._cdata, set()).add(id(tensor))
        return number

    def of(self, tensor: Tensor) -> int:
        if id(tensor) not in self._numbers:  # one that the model keeps beside its parameters and buffers
            self.weights[self.number(tensor)] = tensor
        return self._numbers[id(tensor)]

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = out if isinstance(out, (tuple, list)) else (out,)
        given = tuple(map(self._refs, args)), {name: self._refs(value) for name, value in (kwargs or {}).items()}
        changed = func._schema.is_mutable and func.namespace == "aten"
        if changed and len(self._views[args[0].untyped_storage()._cdata]) > 1:
            raise NotFused(f"the model changes a tensor in place that others are views of ({func})")
        numbers = tuple(self.number(value) for value in outputs if isinstance(value, Tensor))
        if numbers or func.namespace == "cerberus_ext":
            self.calls.append(Call(func, *given, numbers))
        return out

    def _refs(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return Ref(self.of(value))
        if isinstance(value, (tuple, list)):
            return tuple(map(self._refs, value))
        return value


@contextmanager
def uninterrupted() -> Iterator[None]:
    """While inside, Ctrl-C waits for the end: torch's stack of modes would stay as the interrupt has found it.

    In other threads there is none, and where another language handles it, it is left alone.
    """
    here = threading.current_thread() is threading.main_thread()
    if not here or (handler := signal.getsignal(signal.SIGINT)) is None:
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


class Tracing:
    """What something is traced with: tensors without data, each with a number.

    fakes: of the named tensors. planes: keys and values (1, Hkv, S, E) of layers in turn, of the cache's dtype.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], cache: TreeCache, layers: int) -> None:
        """cache: in use, so that its sizes are known. Raises NotFused."""
        with torch.inference_mode(False), torch.no_grad():  # in it, tensors of types of their own cannot be detached
            tensors = {name: tensor.detach() for name, tensor in named}
        if other := next((name for name, tensor in tensors.items() if type(tensor) is not Tensor), None):
            raise NotFused(f"{other} is not a plain tensor")
        assert cache.tensor is not None
        _, rows, heads, _, size = cache.tensor.shape
        self._device = cache.tensor.device
        self._fake, self._recorder = FakeTensorMode(allow_non_fake_inputs=True), _Recorder()
        with torch.inference_mode(False):  # inference tensors have no versions, which are asked for
            self.fakes: dict[str, Tensor] = {name: self._fake.from_tensor(tensor) for name, tensor in tensors.items()}
        self._names = {self._recorder.number(self.fakes[name]): name for name in tensors}
        self._recorder.weights = {number: tensors[name] for number, name in self._names.items()}
        shapes = ((rows, NODES), (rows, NODES), (rows,), (NODES, -(-NODES // 64)))
        self.tokens, self.positions, self.length, self.ancestors = (self.input(*of, dtype=torch.int64) for of in shapes)
        self.planes = [self.input(rows, heads, 2 * NODES, size, dtype=cache.tensor.dtype) for _ in range(2 * layers)]

    def input(self, *shape: int, dtype: torch.dtype) -> Tensor:
        with torch.inference_mode(False), self._fake:
            tensor = torch.empty(shape, dtype=dtype, device=self._device)
        self._recorder.number(tensor)
        return tensor

    @contextmanager
    def recording(self) -> Iterator[None]:
        """While inside, calls are noted. Raises NotFused in the place of whatever goes wrong."""
        try:
            with torch.inference_mode(False), torch.no_grad(), self._fake, self._recorder:
                yield
        except (NotFused, UnsupportedAttention):
            raise
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")
            raise NotFused(f"tracing a step failed: {type(error).__name__}: {reason}") from error

    def trace(self, hidden: Tensor, logits: Tensor, given: bool = False) -> Trace:
        recorder, of = self._recorder, self._recorder.of
        return Trace(
            recorder.calls, recorder.shapes, recorder.dtypes, of(self.tokens), of(self.positions), of(self.length),
            of(self.ancestors), [of(plane) for plane in self.planes], recorder.weights, self._names, of(hidden),
            of(logits), given, self._device,
        )  # fmt: skip


@uninterrupted()
def trace_step(target: TargetModel) -> Trace:
    """target: after its prompt, so that the sizes of its cache are known. Raises NotFused."""
    model, layers = target.model, len(target.cache.layers)
    tracing = Tracing(chain(model.named_parameters(), model.named_buffers()), target.cache, layers)
    traced = TreeCache(layers, 2 * NODES, len(tracing.length), model.device)
    traced.length, traced.whole = tracing.length, True
    traced_layers: Any = traced.layers
    for layer, keys, values in zip(traced_layers, tracing.planes[::2], tracing.planes[1::2], strict=True):
        layer.keys, layer.values, layer.is_initialized = keys, values, True

    def forward(**arguments: Any) -> Any:
        with RowInvariant():
            return torch.func.functional_call(model, tracing.fakes, (), arguments)

    experts = experts_switch(model, traced=True) or nullcontext()
    with tracing.recording(), _left_as_it_was(model), experts:
        hidden, logits = target.attend(forward, tracing.tokens, tracing.positions, tracing.ancestors, traced)
    return tracing.trace(hidden, logits)


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Puts back what modules keep for their next call: of a call without data, it would have none.

    Parameters, too: an interrupt may have kept torch from it.
    """
    kept = [(of, dict(of)) for module in model.modules() for of in (vars(module), module._parameters, module._buffers)]
    try:
        yield
    finally:
        for of, before in kept:
            for name in of.keys() - before.keys():
                del of[name]
            of |= {name: value for name, value in before.items() if of.get(name) is not value}


def evaluate(call: Call, values: Mapping[int, Tensor]) -> tuple[Tensor, ...]:
    """The outputs of the call on real tensors, by number in `values`.

    Ops of ours are the CPU's in a trace of every device: such a call is made there.
    """
    ours = call.op.namespace == "cerberus_ext"
    device = values[refs(call)[0]].device if ours else None

    def real(value: Any) -> Any:
        if isinstance(value, Ref):
            return values[value.number].cpu() if ours else values[value.number]
        if isinstance(value, tuple):
            return list(map(real, value))
        return value

    op: Callable[..., Any] = call.op
    out = op(*map(real, call.args), **{name: real(value) for name, value in call.kwargs.items()})
    outputs = out if isinstance(out, (tuple, list)) else (out,)
    made = (value for value in outputs if isinstance(value, Tensor))
    return tuple(value.to(device) for value in made) if ours else tuple(made)


def refs(call: Call) -> list[int]:
    """The numbers of the tensors among its arguments."""
    found: list[int] = []

    def collect(value: Any) -> None:
        if isinstance(value, Ref):
            found.append(value.number)
        elif isinstance(value, tuple):
            for part in value:
                collect(part)

    collect(call.args)
    collect(tuple(call.kwargs.values()))
    return found


def node_axis(shape: Iterable[int], what: Any = "a value") -> int:
    """Where the axis of the nodes is. Raises NotFused where there is none, or where it is merged with another."""
    axes = [axis for axis, size in enumerate(shape) if size == NODES]
    if len(axes) != 1:
        raise NotFused(f"{what} of shape {tuple(shape)} is not one row for each node (N = {NODES})")
    return axes[0]
