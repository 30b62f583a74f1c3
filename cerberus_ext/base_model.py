"""The base model during one decode: forwards over a prompt and over trees, with everything put back at the end."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention import MaskAttention, Topology, UnsupportedAttention, find_attention, layer_windows
from .cache import TreeCache
from .row_invariant import prompt_forward, step_forward
from .transformers_names import cache_argument

if TYPE_CHECKING:
    from .compiled_step import CompiledSteps

_CAPACITY_STEP = 64


class BaseModel:
    """Use as a context manager; inside, first `prefill` once, then `step` as often as needed.

    Nothing of the model is changed but, while inside, the name of its attention implementation and a hook on the input
    of its LM head, from where the hidden states are read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        capacity: int,
        batch: int,
        cache: TreeCache | None = None,
        compiled: CompiledSteps | None = None,
        context: bool = False,
    ) -> None:
        """capacity: tokens that the cache has to hold, nodes of the last step included. cache: one to use again.

        compiled: does the steps in the model's place. context: whether the cache needs room for a context layer.
        """
        self.model = model
        self.windows = layer_windows(model.config)
        if cache is None:
            cache = TreeCache(len(self.windows), round_capacity(capacity), batch, model.device, context)
        self.cache = cache
        self.cache.reset()
        self.max_positions = position_limit(model)
        self._attention = find_attention(model, self.windows)
        self._step_forward = step_forward(model)
        self._prompt_forward = prompt_forward(model, self._step_forward)
        self._compiled = compiled
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._switch = ExitStack()
        self._hidden: Tensor | None = None

    def __enter__(self) -> BaseModel:
        self._hook = self.model.get_output_embeddings().register_forward_pre_hook(self._keep_hidden)
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._switch.close()
        finally:
            self._hook.remove()
            self._hidden = None

    def prefill(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, T) -> hidden (B, D) and logits (B, V) of the last position; the cache then holds the prompt.

        The model runs with its own attention, as in `generate`.
        """
        hidden, logits = self._run_prompt(ids)
        return hidden[:, -1], logits

    def prefill_all(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As `prefill`, with the hidden states of all positions, (B, T, D).

        Raises ValueError where the model does not show them.
        """
        found: list[Any] = []
        body: Any = self.model.base_model
        with body.register_forward_hook(lambda module, inputs, output: found.append(output)):
            last, logits = self._run_prompt(ids)
        hidden = getattr(found[-1], "last_hidden_state", None) if found else None
        # What the LM head gets has to be what the heads were trained on: some models change it on the way.
        if hidden is None or hidden.shape[:2] != ids.shape or not torch.equal(hidden[:, -1], last[:, -1]):
            raise ValueError(
                "decode: heads must have no context layer with this model, whose LM head does not read what"
                f" {type(body).__name__} returns"
            )
        return hidden, logits

    def _run_prompt(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """-> hidden (B, at least 1, D), the last position's at the end, and its logits (B, V)."""
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        only_last = {"logits_to_keep": 1} if self._keeps_logits else {}
        hidden, logits = self.run(self._prompt_forward, ids, positions, only_last)
        self.cache.extend(ids.shape[1])
        self._use(self._attention)
        return hidden, logits[:, -1]

    @property
    def static(self) -> bool:
        """Whether a step over as many nodes does the same with the same memory, whatever the cache's length is."""
        return self._attention.whole_cache

    def prepare(self, nodes: int) -> None:
        """Before a step over so many nodes: what it needs is compiled, where that has not been done."""
        if self._compiled is not None:
            self._compiled.prepare(self, nodes)

    def step(self, tokens: Tensor, tree: Topology) -> tuple[Tensor, Tensor]:
        """tokens (B, N) of the tree's nodes -> hidden (B, N, D), logits (B, N, V). Nothing is committed."""
        positions = self.cache.length[:, None] + tree.depths  # (B, N)
        if self._compiled is not None:
            return self._compiled.step(self, tokens, positions, tree.ancestors)
        try:
            return self._attend(tokens, positions, tree)
        except UnsupportedAttention:  # found out at the first step; nothing of it is committed
            self._fall_back()
            return self._attend(tokens, positions, tree)

    def deepest(self) -> int:
        """How deep a tree may be at the next step, for no node to have a position that the model does not know."""
        return max(0, self.max_positions - 1 - self.cache.committed)

    def _use(self, attention: Any) -> None:
        """From here on, forwards attend this way."""
        self._switch.close()
        self._attention = attention
        self.cache.whole = attention.whole_cache
        try:
            self._switch.enter_context(attention.switched_on(self.model))
        except UnsupportedAttention:
            self._fall_back()

    def _fall_back(self) -> None:
        self._switch.close()  # so that the model shows its own attention again
        self._use(MaskAttention(self.model, self.windows))

    def _attend(self, tokens: Tensor, positions: Tensor, tree: Topology) -> tuple[Tensor, Tensor]:
        return self.run(self._step_forward, tokens, positions, self._attention.arguments(tree, self.cache))

    def run(
        self, forward: Any, tokens: Tensor, positions: Tensor, arguments: dict[str, Any], cache: TreeCache | None = None
    ) -> tuple[Tensor, Tensor]:
        """forward: the model, or what stands in for it -> hidden (B, N, D), logits (B, N, V)."""
        output = forward(
            input_ids=tokens,
            position_ids=positions,
            use_cache=True,
            return_dict=True,
            **{cache_argument(self.model): self.cache if cache is None else cache},
            **arguments,
        )
        hidden, self._hidden = self._hidden, None
        assert hidden is not None  # the hook has run
        return hidden, output.logits

    def _keep_hidden(self, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._hidden = inputs[0]


def round_capacity(tokens: int) -> int:
    """A cache's capacity for so many tokens."""
    return -(-tokens // _CAPACITY_STEP) * _CAPACITY_STEP


_busy: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()
_busy_lock = threading.Lock()


@contextmanager
def sole_decode(model: PreTrainedModel) -> Iterator[None]:
    """While inside, another decode of the same model is refused: both would switch its attention and use its graphs."""
    with _busy_lock:
        if model in _busy:
            raise RuntimeError(
                "decode: model must not be decoding already, another thread, or a gate, streamer or stopping criterion"
                " that was called from a decode, uses it at this moment: take turns, or decode with a copy of it"
            )
        _busy.add(model)
    try:
        yield
    finally:
        with _busy_lock:
            _busy.discard(model)


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
