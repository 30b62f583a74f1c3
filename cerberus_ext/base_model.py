"""The base model during one decode: forwards over a prompt and over trees, with everything put back at the end."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention import MaskAttention, UnsupportedAttention, find_attention, layer_windows
from .cache import TreeCache
from .row_invariant import prompt_forward, step_forward
from .tree import DraftTree, TreeTensors

_CAPACITY_STEP = 64


class BaseModel:
    """Use as a context manager; inside, first `prefill` once, then `step` as often as needed.

    Nothing of the model is changed but, while inside, the name of its attention implementation and a hook on the input
    of its LM head, from where the hidden states are read.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, batch: int) -> None:
        self.model = model
        self.windows = layer_windows(model.config)
        capacity = -(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP
        self.cache = TreeCache(len(self.windows), capacity, batch, model.device)
        self.max_positions = position_limit(model)
        self._attention = find_attention(model, self.windows)
        self._step_forward = step_forward(model)
        self._prompt_forward = prompt_forward(model, self._step_forward)
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
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        only_last = {"logits_to_keep": 1} if self._keeps_logits else {}
        hidden, logits = self._run(self._prompt_forward, ids, positions, only_last)
        self.cache.extend(ids.shape[1])
        self._use(self._attention)
        return hidden[:, -1], logits[:, -1]

    def step(self, tokens: Tensor, tree: DraftTree) -> tuple[Tensor, Tensor]:
        """tokens (B, N) of the tree's nodes -> hidden (B, N, D), logits (B, N, V). Nothing is committed."""
        tensors = tree.on(tokens.device)
        positions = self.cache.length[:, None] + tensors.depths  # (B, N)
        try:
            return self._attend(tokens, positions, tensors)
        except UnsupportedAttention:  # found out at the first step; nothing of it is committed
            self._fall_back()
            return self._attend(tokens, positions, tensors)

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

    def _attend(self, tokens: Tensor, positions: Tensor, tree: TreeTensors) -> tuple[Tensor, Tensor]:
        return self._run(self._step_forward, tokens, positions, self._attention.arguments(tree, self.cache))

    def _run(self, forward: Any, tokens: Tensor, positions: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        output = forward(
            input_ids=tokens,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
            **arguments,
        )
        assert self._hidden is not None  # the hook has run
        return self._hidden, output.logits

    def _keep_hidden(self, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._hidden = inputs[0]


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
