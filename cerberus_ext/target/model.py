"""The target model during one decode: forwards over a prompt and over trees, with everything put back at the end."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..io.transformers_names import cache_argument
from .attention import Topology, UnsupportedAttention, attention_switch, layer_windows, names_attention
from .cache import TreeCache
from .experts import experts_switch
from .row_invariant import RowInvariant, prompt_forward, step_forward
from .stand_ins import TreeStep, running
from .step_audit import MAX_PADDING, padded_nodes
from .step_row import StepForward, StepRow, chain_ancestors
from .uncompiled import uncompiled

_CAPACITY_STEP = 64
_MIN_LASTING = 512
_PROMPT_NODES = 256  # of a prompt's tokens, in one forward: more would need more memory, and take as long


@dataclass(frozen=True)
class StepWay:
    """How the steps of a model run so that a node's bits do not depend on the others; runtime/capability.py tells it.

    names_attention: the model calls the attention that its config names; False: torch's scaled_dot_product_attention.
    sees_all: every call of the model has to be seen, not only those with weights, see row_invariant.py.
    widths: elements per node of functions that are left to torch, see `padded_nodes`.
    """

    names_attention: bool
    sees_all: bool
    widths: frozenset[int] = frozenset()

    @staticmethod
    def plain(model: PreTrainedModel) -> StepWay:
        """As far as it can be told without running the model."""
        names = names_attention(model)
        return StepWay(names, sees_all=not names)


class TargetModel:
    """Use as a context manager; inside, first `prefill` once, then `step` as often as needed.

    A cache that holds the beginning of the text already is extended by it before `prefill`, which gets the rest.

    Nothing of the model is changed but, while inside, a hook on the input of its LM head, from where the hidden states
    are read; and, while a step runs, what its configs name for its attention and its experts (stand_ins.py).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        way: StepWay,
        capacity: int,
        *,
        cache: TreeCache | None = None,
        context: bool = False,
        mode: Callable[[], TorchFunctionMode] = RowInvariant,
    ) -> None:
        """capacity: tokens that the cache has to hold, nodes of the last step included. cache: one to use again.

        context: whether the cache needs room for a context layer.
        mode: what sees every call of a step, where the way says so.
        """
        self.model = model
        self.way = way
        self.windows = layer_windows(model.config)
        embeddings: Any = model.get_input_embeddings()
        self.vocabulary = len(embeddings.weight)
        self.cache = self._cache_for(capacity, context) if cache is None else cache
        self.cache.reset()
        self.max_positions = position_limit(model)
        self._step_forward = step_forward(model, mode if way.sees_all else None)
        self._prompt_forward = prompt_forward(model, self._step_forward)
        self.fused: StepForward | None = None  # does the steps, once it is there
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._switches = [attention_switch(model)] if way.names_attention else []
        if (experts := experts_switch(model)) is not None:
            self._switches.append(experts)
        self._mask = None if way.names_attention else torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=model.device)
        self._thread: int | None = None  # that runs the model for us at this moment
        self._hidden: Tensor | None = None

    def beside(self, capacity: int, cache: TreeCache | None) -> TargetModel:
        """Another one, for another text of the same model as it is now: to look through its modules takes a while."""
        other = copy(self)
        other.cache = self._cache_for(capacity, self.cache.context) if cache is None else cache
        other.cache.reset()
        other.fused = other._thread = other._hidden = None
        return other

    def _cache_for(self, capacity: int, context: bool) -> TreeCache:
        capacity = round_capacity(capacity + MAX_PADDING * bool(self.way.widths))
        return TreeCache(len(self.windows), capacity, 1, self.model.device, context)

    def __enter__(self) -> TargetModel:
        self._hook = self.model.get_output_embeddings().register_forward_pre_hook(self._keep_hidden)
        return self

    def __exit__(self, *exception: object) -> None:
        self._hook.remove()
        self._hidden = None
        for switch in self._switches:  # an interrupt may have kept a step from it
            switch.put_back()

    def prefill(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, T) -> hidden (B, D) and logits (B, V) of the last position; the cache then holds the prompt."""
        hidden, logits = self._run_prompt(ids)
        return hidden[:, -1], logits

    def prefill_all(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As `prefill`, with the hidden states of all positions, (B, T, D).

        Raises ValueError where the model does not show them.
        """
        if self.fused is not None and self.goes_as_steps(ids):
            return self._run_steps(ids, every=True)
        found: list[Any] = []
        body: Any = self.model.base_model
        with body.register_forward_hook(lambda module, inputs, output: found.append(output)):
            last, logits = self._run_prompt(ids)
        states: list[Any] = [getattr(output, "last_hidden_state", None) for output in found]
        if not states or any(part is None for part in states):
            hidden = None
        else:  # of each forward, without what steps are filled up with
            nodes = ids.shape[1] if len(states) == 1 else _PROMPT_NODES
            hidden = torch.cat([part[:, :nodes] for part in states], 1)[:, : ids.shape[1]]
        # What the LM head gets has to be what the heads were trained on: some models change it on the way.
        if hidden is None or hidden.shape[:2] != ids.shape or not torch.equal(hidden[:, -1], last[:, -1]):
            raise ValueError(
                "decode: heads must have no context layer with this model, whose LM head does not read what"
                f" {type(body).__name__} returns"
            )
        return hidden, logits

    def _run_prompt(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """-> hidden (B, at least 1, D), the last position's at the end, and its logits (B, V)."""
        if self.goes_as_steps(ids):
            return self._run_steps(ids)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        only_last = {"logits_to_keep": 1} if self._keeps_logits else {}
        hidden, logits = self.run(self._prompt_forward, ids, positions, only_last)
        self.cache.extend(ids.shape[1])
        self.cache.whole = True
        return hidden, logits[:, -1]

    def goes_as_steps(self, ids: Tensor) -> bool:
        """Whether a prompt is computed as steps are, so that it does not depend on whether they are fused.

        On a CPU our products are faster than torch's. Not beyond the positions that the model was made for: some
        change all of them then. Else the model runs with its own attention, as in `generate`.
        """
        seen = self.fused is not None or self.way.names_attention
        return seen and ids.device.type == "cpu" and ids.shape[1] <= self.max_positions

    def _run_steps(self, ids: Tensor, every: bool = False) -> tuple[Tensor, Tensor]:
        """As `_run_prompt`, as chains of nodes; every: with hidden of all positions, where there is a fused step."""
        self.cache.whole = True
        states: list[Tensor] = []
        for tokens in ids.split(_PROMPT_NODES, 1):
            nodes = tokens.shape[1]
            positions = self.cache.length[:, None] + torch.arange(nodes)
            hidden, logits = self._run_nodes(tokens, positions, chain_ancestors(nodes), 1)
            states = [*(states if every else []), hidden.clone()]
            self.cache.extend(nodes)
        return torch.cat(states, 1), logits[:, -1]

    def step(self, tokens: Tensor, tree: Topology) -> tuple[Tensor, Tensor]:
        """tokens (B, N) of the tree's nodes -> hidden (B, N, D), logits (B, N, V). Nothing is committed."""
        return self._run_nodes(tokens, self.cache.length[:, None] + tree.depths, tree.ancestors)

    def row(self, tokens: Tensor, tree: Topology) -> StepRow:
        """tokens (1, N) -> what a StepForward is to compute of them."""
        return StepRow(self.cache, tokens[0], self.cache.length + tree.depths, tree.ancestors)

    def _run_nodes(
        self, tokens: Tensor, positions: Tensor, ancestors: Tensor, logits_of: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """See StepForward; with logits_of, hidden may be that of the nodes with logits alone."""
        if self.fused is not None:
            hidden, logits = self.fused.step([StepRow(self.cache, tokens[0], positions[0], ancestors)], logits_of)
            return hidden[None], logits[None]
        nodes = tokens.shape[1]
        size = nodes
        if self.way.widths:
            size = padded_nodes(nodes, self.way.widths, torch.get_num_threads()) or nodes
        inputs = filled(size, tokens, positions, ancestors)
        added = inputs[0].shape[1] - nodes
        wanted = None if logits_of is None else logits_of + added
        hidden, logits = self.attend(self._step_forward, *inputs, self.cache, wanted)
        return hidden[:, : hidden.shape[1] - added], logits[:, : logits.shape[1] - added]

    def max_depth(self) -> int:
        """How deep a tree may be at the next step, for no node to have a position that the model does not know."""
        return max(0, self.max_positions - 1 - self.cache.committed)

    def attend(
        self, forward: Any, tokens: Tensor, positions: Tensor, ancestors: Tensor, cache: TreeCache,
        logits_of: int | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """A step by `forward`, the model or what stands in for it: tokens, positions (B, N), ancestors (N, W).

        -> hidden (B, N, D), logits (B, N, V); with logits_of, where the model can, of so many of the last nodes.
        """
        step = TreeStep(cache.length, ancestors, self.windows, self._mask)
        if not self.way.names_attention:
            step.planes = {keys.data_ptr(): layer for layer, keys in enumerate(cache.planes()[::2])}
        arguments: dict[str, Any] = {} if self._mask is None else {"attention_mask": self._mask}
        if logits_of is not None and self._keeps_logits:
            arguments["logits_to_keep"] = logits_of
        with ExitStack() as inside:
            for switch in self._switches:
                inside.enter_context(switch)
            inside.enter_context(running(step))
            output = self.run(forward, tokens, positions, arguments, cache)
        if step.attended != len(self.windows):
            raise UnsupportedAttention(
                f"{step.attended} of its {len(self.windows)} layers call transformers' attention interface, or torch's"
                " scaled_dot_product_attention with the keys of their cache"
            )
        return output

    def run(
        self, forward: Any, tokens: Tensor, positions: Tensor, arguments: dict[str, Any], cache: TreeCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """forward: the model, or what stands in for it -> hidden (B, N, D), logits (B, N, V)."""
        self._thread = threading.get_ident()
        with uncompiled(tokens.device):
            output = forward(
                input_ids=tokens,
                position_ids=positions,
                use_cache=True,
                return_dict=True,
                **{cache_argument(self.model): self.cache if cache is None else cache},
                **arguments,
            )
        self._thread = None
        hidden, self._hidden = self._hidden, None
        assert hidden is not None  # the hook has run
        return hidden, output.logits

    def _keep_hidden(self, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if threading.get_ident() == self._thread:  # not for another thread's call of the model
            self._hidden = inputs[0]


def filled(nodes: int, tokens: Tensor, positions: Tensor, ancestors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, positions (B, N), ancestors (N, W) of a step, filled up to so many nodes with copies of node 0."""
    missing = nodes - tokens.shape[1]
    if missing <= 0:
        return tokens, positions, ancestors
    tokens = torch.cat([tokens, tokens[:, :1].expand(-1, missing)], 1)
    positions = torch.cat([positions, positions[:, :1].expand(-1, missing)], 1)
    ancestors = torch.cat([ancestors, ancestors[:1].expand(missing, -1)])
    return tokens, positions, F.pad(ancestors, (0, -(-nodes // 64) - ancestors.shape[1]))


def round_capacity(tokens: int) -> int:
    """A cache's capacity for so many tokens."""
    return -(-tokens // _CAPACITY_STEP) * _CAPACITY_STEP


def lasting_capacity(model: PreTrainedModel, tokens: int) -> int:
    """The same of a cache that is used again: a power of two, so that it rarely has to grow, up to the model's end."""
    bucket = max(_MIN_LASTING, 1 << (tokens - 1).bit_length())
    return min(bucket, round_capacity(max(tokens, min(position_limit(model), 1 << 40))))


def position_limit(model: PreTrainedModel) -> int:
    """Positions that trees may use: those the model was made for.

    Beyond, decoding goes on without drafts, like `generate`. Rotary encodings that change with the longest position of
    the call (dynamic, longrope) do so from their original length on, where a draft would change its neighbours.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or torch.iinfo(torch.int64).max
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in [rope] if "rope_type" in rope else rope.values():  # one for all layers, or one per layer type
        if kind.get("rope_type") in ("dynamic", "longrope"):
            limit = min(limit, kind.get("original_max_position_embeddings") or limit)
    return limit
