"""The prompts of a decode: what `ids` and `attention_mask` may be, and the tensor in which all of them are returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel


class Prompts(NamedTuple):
    """rows: the prompts, (1, S) int64 each, without padding. given (B, S): as they came; None: as a list of several
    lengths."""

    rows: list[Tensor]
    given: Tensor | None

    def sequences(self, new: list[list[int]], pad: int) -> Tensor:
        """new: the rows' new tokens -> prompts and new tokens (B, S + most), as from `generate`: shorter texts end with
        `pad`, and so do the beginnings of prompts that came as a list of several lengths."""
        given = self.given
        if given is None:
            longest = max(row.shape[1] for row in self.rows)
            given = torch.cat([_filled(row, longest - row.shape[1], pad) for row in self.rows])
        most = max(map(len, new))
        added = given.new_tensor([tokens + [pad] * (most - len(tokens)) for tokens in new])
        return torch.cat([given, added.view(len(new), most)], dim=1)


def _filled(row: Tensor, missing: int, pad: int) -> Tensor:
    return torch.cat([row.new_full((1, missing), pad), row], 1)


def read_prompts(ids: Any, attention_mask: Any, model: PreTrainedModel) -> Prompts:
    """decode's `ids` and `attention_mask`, checked -> the prompts, on the model's device."""
    if isinstance(ids, Mapping):
        ids, attention_mask = _from_mapping(ids, attention_mask)
    if (several := _of_several_lengths(ids)) is not None:
        masks = [None] * len(several) if attention_mask is None else attention_mask
        if not isinstance(masks, Sequence) or len(masks) != len(several):
            raise ValueError("decode: attention_mask must be None or a list like ids, which has several lengths")
        parts = [read_prompts(row, mask, model).rows for row, mask in zip(several, masks, strict=True)]
        if wrong := [len(rows) for rows in parts if len(rows) != 1]:
            raise ValueError(f"decode: ids must be a list of prompts of one row each, got one of {wrong[0]} rows")
        return Prompts([rows[0] for rows in parts], None)
    tensor = integer_tensor(ids, model.device)
    if tensor is None:
        got = str(ids.dtype) if isinstance(ids, Tensor | np.ndarray) else type(ids).__name__
        raise TypeError(f"decode: ids must be a tensor or a list of integers, or have them as input_ids, got {got}")
    if tensor.dim() not in (1, 2) or 0 in tensor.shape:
        raise ValueError(f"decode: ids must be (B, S) or (S,) with B, S >= 1, got shape {tuple(tensor.shape)}")
    tensor = tensor if tensor.dim() == 2 else tensor[None]
    if tensor.device != model.device:
        raise ValueError(f"decode: ids must be on the model's device, {model.device}, got {tensor.device}")
    tensor = tensor.to(torch.int64)
    rows = _without_padding(tensor, attention_mask)
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    vocab = embeddings.shape[0]
    for row in rows:
        lowest, highest = int(row.min()), int(row.max())
        if lowest < 0 or highest >= vocab:
            raise ValueError(f"decode: ids must be in 0..{vocab - 1}, got {lowest if lowest < 0 else highest}")
    return Prompts(rows, tensor)


def pad_token(generation_config: Any, eos_token_id: Any) -> int:
    """What `generate` puts behind texts that have ended; 0 where it would have none."""
    for value in (getattr(generation_config, "pad_token_id", None), eos_token_id, generation_config.eos_token_id):
        if (
            value is not None
            and (tokens := torch.as_tensor(list(value) if isinstance(value, set | frozenset) else value)).numel()
        ):
            return int(tokens.flatten()[0])
    return 0


def integer_tensor(values: Any, device: torch.device) -> Tensor | None:
    """A tensor, an array or (nested) lists of integers -> a tensor; None: they are something else."""
    if not isinstance(values, Tensor):
        if isinstance(values, str | bytes) or not isinstance(values, Sequence | np.ndarray):
            return None
        try:
            array = np.asarray(values)
        except (TypeError, ValueError, RuntimeError):  # lists of several lengths; tensors of a GPU
            return None
        if array.size and array.dtype.kind not in "iu":
            return None
        values = torch.from_numpy(array.astype(np.int64)).to(device)
    return None if values.dtype == torch.bool or values.is_floating_point() or values.is_complex() else values


def _of_several_lengths(ids: Any) -> Sequence[Any] | None:
    """The prompts of a list of them that is no table."""
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
        return None
    if not ids or not all(isinstance(row, Tensor | np.ndarray | Sequence) and getattr(row, "ndim", 1) for row in ids):
        return None
    tensors = any(isinstance(row, Tensor) for row in ids)
    return ids if tensors or len({len(row) for row in ids}) > 1 else None


def _from_mapping(inputs: Mapping[str, Any], attention_mask: Any) -> tuple[Any, Any]:
    """What a tokenizer returns -> ids and mask; a mask that `decode` was given itself counts."""
    others = set(inputs) - {"input_ids", "attention_mask"}
    types = inputs.get("token_type_ids")
    if types is not None and not any(torch.as_tensor(row).any() for row in types):
        others.discard("token_type_ids")  # of many tokenizers: all tokens are of the same kind
    if others or "input_ids" not in inputs:
        raise ValueError(f"decode: ids must have input_ids, and attention_mask at most, got {sorted(map(str, inputs))}")
    return inputs["input_ids"], inputs.get("attention_mask") if attention_mask is None else attention_mask


def _without_padding(ids: Tensor, attention_mask: Any) -> list[Tensor]:
    """ids (B, S) -> its rows, (1, S) each, where the mask has ones: with zeros only left or right of them."""
    if attention_mask is None:
        return list(ids.split(1))
    mask = attention_mask if isinstance(attention_mask, Tensor) else integer_tensor(attention_mask, ids.device)
    if mask is None or mask.shape != ids.shape and (len(ids) > 1 or mask.shape != ids.shape[1:]):
        got = type(attention_mask).__name__ if mask is None else tuple(mask.shape)
        raise ValueError(f"decode: attention_mask must be a tensor of ids' shape, {tuple(ids.shape)}, got {got}")
    rows = []
    for number, (row, ones) in enumerate(zip(ids.split(1), mask.view(ids.shape).to(torch.bool), strict=True)):
        places = ones.nonzero()[:, 0].tolist()
        if not places:
            raise ValueError(f"decode: attention_mask must have a one in every row, got none in row {number}")
        if len(places) != places[-1] - places[0] + 1:
            raise ValueError(
                f"decode: attention_mask must have zeros only left or right of a row's ones, got others in row {number}"
            )
        rows.append(row[:, places[0] : places[-1] + 1])
    return rows
