"""A decoding step as a program of few different pieces, for a compiler that takes seconds for each of them.

The target model's forward over N nodes is traced into one graph of ATen ops, which is cut at the ops that use the
cache:

    piece, write_cache, tree_attention, piece, write_cache, tree_attention, ... piece

What lies between the attentions of two layers is the same for all layers but for the weights, which are arguments of
the piece; so a model of 30 layers has 3 different pieces. The cache stays outside of them: nothing that is compiled
depends on its capacity, or on how much of it is in use.

Letters: B rows (1 so far), N nodes, W words, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from ..target.cache import TreeCache
from ..target.row_invariant import PRODUCTS, RowInvariant

if TYPE_CHECKING:
    from ..target.model import TargetModel

# Not compiled, and run at the end of the piece that they are found in, in this order.
_OPAQUE = (torch.ops.cerberus_ext.write_cache.default, torch.ops.cerberus_ext.tree_attention.default)
_ATTENTION = _OPAQUE[1]


class Untraceable(Exception):
    """The model's step cannot be cut into pieces; the message says why."""


class Call(NamedTuple):
    """values[outputs] = run(*values[inputs])"""

    run: Callable[..., Any]
    inputs: list[int]
    outputs: list[int]


class StepProgram:
    """A step over N nodes."""

    def __init__(self, calls: Sequence[Call], values: Sequence[Tensor | None], results: Sequence[int]) -> None:
        """values: the constant ones; the arguments come first. results: where hidden states and logits are."""
        self._calls = list(calls)
        self._values = list(values)
        self._results = list(results)

    def __call__(
        self, tokens: Tensor, positions: Tensor, length: Tensor, ancestors: Tensor, planes: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """tokens, positions (B, N), length (B,), ancestors (N, W), planes: keys and values (B, Hkv, S, E) of every
        layer in turn -> hidden (B, N, D), logits (B, N, V). The planes hold the nodes then, from slot length on."""
        values = self._values.copy()
        arguments = (tokens.contiguous(), positions.contiguous(), length, ancestors, *planes)
        values[: len(arguments)] = arguments
        for run, inputs, outputs in self._calls:
            found = run(*[values[index] for index in inputs])
            for index, value in zip(outputs, found if type(found) in (tuple, list) else (found,), strict=True):
                values[index] = value
        hidden, logits = (values[index] for index in self._results)
        assert hidden is not None and logits is not None
        return hidden, logits


def build_program(
    target: TargetModel, nodes: int, compiled: Callable[[fx.GraphModule, list[Tensor]], Callable[..., Any]]
) -> StepProgram:
    """target: after its prompt. compiled: a piece and examples of its arguments, without data -> what to call for it.

    Raises Untraceable, and whatever the model raises.
    """
    # Those that are shared are there once.
    tensors = dict(chain(target.model.named_parameters(), target.model.named_buffers()))
    graph = _trace(target, nodes, tensors)
    index = {node: place for place, node in enumerate(graph.graph.nodes)}
    values: list[Tensor | None] = [None] * len(index)
    arguments = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, tensor in zip(arguments[len(arguments) - len(tensors) :], tensors.values(), strict=True):
        values[index[node]] = tensor.detach()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            values[index[node]] = getattr(graph, node.target)
    planes = set(arguments[4 : len(arguments) - len(tensors)])
    calls: list[Call] = []
    for inside, opaque in _cut(graph.graph):
        if inside:
            piece, inputs, outputs = _extract(inside)
            if planes.intersection(inputs):
                raise Untraceable("the model computes with the cache in other ways than by attention")
            run = compiled(piece, [node.meta["val"] for node in inputs])
            calls.append(Call(run, [index[node] for node in inputs], [index[node] for node in outputs]))
        for node in opaque:
            calls.append(Call(_with_numbers(node), [index[used] for used in node.all_input_nodes], [index[node]]))
    results: Any = graph.graph.output_node().args[0]
    return StepProgram(calls, values, [index[node] for node in results])


def _trace(target: TargetModel, nodes: int, tensors: dict[str, Tensor]) -> fx.GraphModule:
    """The graph of a step; its placeholders: tokens, positions, length, ancestors, planes, the model's tensors."""
    model, cache = target.model, target.cache
    planes = cache.planes()

    def step(
        tokens: Tensor,
        positions: Tensor,
        length: Tensor,
        ancestors: Tensor,
        planes: list[Tensor],
        weights: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        def forward(**arguments: Any) -> Any:
            with RowInvariant(PRODUCTS):
                return torch.func.functional_call(model, dict(zip(tensors, weights, strict=True)), (), arguments)

        traced = TreeCache(len(cache.layers), cache.capacity, len(length), model.device)
        traced.length, traced.whole = length, True
        layers: Any = traced.layers
        for layer, keys, values in zip(layers, planes[::2], planes[1::2], strict=True):
            layer.keys, layer.values, layer.is_initialized = keys, values, True
        return target.attend(forward, tokens, positions, ancestors, traced)

    rows, words = len(cache.length), -(-nodes // 64)
    # Not inference mode's tensors, of which there can be no traced copies.
    with torch.inference_mode(False), torch.no_grad():
        integers = [
            torch.zeros(shape, dtype=torch.int64) for shape in ((rows, nodes), (rows, nodes), rows, (nodes, words))
        ]
        empty = [torch.empty_like(plane) for plane in planes]
        return make_fx(step, tracing_mode="fake")(*integers, empty, list(tensors.values()))


def _cut(graph: fx.Graph) -> Iterator[tuple[list[fx.Node], list[fx.Node]]]:
    """-> what is to be compiled, and the opaque ops that follow it, in turn.

    An op that stands between the write to the cache and the attention is moved in front of both.
    """
    inside: list[fx.Node] = []
    opaque: list[fx.Node] = []
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        (opaque if node.target in _OPAQUE else inside).append(node)
        if node.target is _ATTENTION:
            yield inside, opaque
            inside, opaque = [], []
    yield inside, opaque


def _extract(nodes: list[fx.Node]) -> tuple[fx.GraphModule, list[fx.Node], list[fx.Node]]:
    """-> these nodes as a graph of their own, the nodes whose values it takes, and those whose values it returns.

    Equal ops make equal code, whatever the nodes' names are.
    """
    graph = fx.Graph()
    within = set(nodes)
    inputs = list(dict.fromkeys(used for node in nodes for used in node.all_input_nodes if used not in within))
    copies = {node: graph.placeholder(f"input_{place}") for place, node in enumerate(inputs)}
    for node in nodes:
        arguments: Any = map_arg(node.args, copies.__getitem__)
        keywords: Any = map_arg(node.kwargs, copies.__getitem__)
        copies[node] = graph.create_node("call_function", node.target, arguments, keywords)
    outputs = [node for node in nodes if any(user not in within for user in node.users)]
    graph.output(tuple(copies[node] for node in outputs))
    return fx.GraphModule({}, graph), inputs, outputs


def _with_numbers(node: fx.Node) -> Callable[..., Any]:
    """The opaque op as a function of its tensors alone, in the order of `all_input_nodes`."""
    op: Any = node.target
    inputs = node.all_input_nodes

    def run(*tensors: Tensor) -> Any:
        values = dict(zip(inputs, tensors, strict=True))
        return op(*[values[given] if isinstance(given, fx.Node) else given for given in node.args])

    return run
