"""Checks of the arguments of `decode`: every message names the argument, what it must be and what it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteriaList

from .dynamic_tree import DynamicTree
from .gate import Gate, wants_draft_trees
from .stepper import Drafter, guesses_along_paths
from .tree import DraftTree

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_model(model: Any) -> None:
    """A decoder-only model with an LM head, in evaluation mode, on one CPU or GPU, of a dtype of the ops."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"decode: model must be a transformers PreTrainedModel, got {type(model).__name__}")
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"decode: model must be decoder-only, {name} is an encoder-decoder")
    if model.get_output_embeddings() is None:
        raise ValueError(f"decode: model must have an LM head, {name} has none")
    if model.training:
        raise ValueError("decode: model must be in evaluation mode, got one in training mode: call model.eval()")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        raise ValueError(f"decode: model must be on one device, cpu or cuda, got {sorted(map(str, devices))}")
    if model.dtype not in _DTYPES:
        raise ValueError(f"decode: model must be float32, bfloat16 or float16, got {model.dtype}")


def check_heads(heads: Any) -> None:
    """Something like CerberusHeads."""
    if not callable(getattr(heads, "bind", None)) or not hasattr(getattr(heads, "config", None), "num_heads"):
        raise TypeError(f"decode: heads must be CerberusHeads, got {type(heads).__name__}")


def check_looking_ahead(drafter: Drafter, tree: DraftTree | DynamicTree) -> None:
    """Heads that guess without a tree, where the tree or the gate wants to see what they guess before it decides."""
    if guesses_along_paths(drafter):
        dynamic = isinstance(tree, DynamicTree)
        must = "tree must be a DraftTree" if dynamic else "gate must not choose by the guesses' probabilities"
        raise ValueError(f"decode: {must} with these heads, which guess along the paths of a tree that has been chosen")


def check_ids(ids: Any, model: PreTrainedModel) -> None:
    """(1, S) int64 on the model's device."""
    if not isinstance(ids, Tensor):
        raise TypeError(f"decode: ids must be a tensor, got {type(ids).__name__}")
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(f"decode: ids must be (1, S) with S >= 1, got shape {tuple(ids.shape)}")
    if ids.shape[0] != 1:
        raise ValueError(f"decode: ids must have 1 row, more are not supported yet, got {ids.shape[0]}")
    if ids.dtype != torch.int64:
        raise TypeError(f"decode: ids must be int64, got {ids.dtype}")
    if ids.device != model.device:
        raise ValueError(f"decode: ids must be on the model's device, {model.device}, got {ids.device}")
    embeddings = model.get_input_embeddings().weight
    assert isinstance(embeddings, Tensor)
    least, most, vocab = int(ids.min()), int(ids.max()), embeddings.shape[0]
    if least < 0 or most >= vocab:
        raise ValueError(f"decode: ids must be in 0..{vocab - 1}, got {least if least < 0 else most}")


def check_attention_mask(attention_mask: Any, ids: Tensor) -> None:
    """None, or all ones: with one row there is no padding."""
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != ids.shape:
        got = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"decode: attention_mask must be a tensor of ids' shape, {tuple(ids.shape)}, got {got}")
    if not bool(attention_mask.to(torch.bool).all()):
        raise ValueError("decode: attention_mask must be all ones, since ids has one row without padding, got zeros")


def check_tree(tree: Any, num_heads: int) -> DraftTree | DynamicTree:
    if not isinstance(tree, DraftTree | DynamicTree):
        raise TypeError(f"decode: tree must be a DraftTree, a DynamicTree or None, got {type(tree).__name__}")
    if isinstance(tree, DynamicTree):
        if tree.corrections is not None and len(tree.corrections) != num_heads:
            raise ValueError(
                f"decode: tree must have a correction for each of the {num_heads} heads, or None,"
                f" got {len(tree.corrections)}"
            )
    elif tree.depth > num_heads:
        raise ValueError(f"decode: tree must not be deeper than the heads, {num_heads}, got a depth of {tree.depth}")
    return tree


def check_gate(gate: Any, tree: DraftTree | DynamicTree) -> Gate:
    if not isinstance(gate, Gate):
        raise TypeError(f"decode: gate must be a Gate or None, got {type(gate).__name__}")
    if isinstance(tree, DynamicTree) and wants_draft_trees(gate):
        raise ValueError(
            "decode: gate must have choose_size, and no trees of its own, for a DynamicTree,"
            f" this {type(gate).__name__} chooses among DraftTrees"
        )
    return gate


def check_sources(sources: Any, tree: Any) -> None:
    """A sequence of what makes sources, for a tree that has a place for their guesses."""
    if not isinstance(sources, Sequence) or not all(map(callable, sources)):
        raise TypeError(
            "decode: sources must be None or a sequence of callables that make a DraftSource of a prompt,"
            f" got {type(sources).__name__}"
        )
    if sources and isinstance(tree, DraftTree):
        raise ValueError("decode: sources must be None or empty with a DraftTree, whose guesses are the heads'")


def check_integer(name: str, value: Any, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"decode: {name} must be an integer, got {value!r}")
    if value < least or most is not None and value > most:
        bounds = f">= {least}" if most is None else f"in {least}..{most}"
        raise ValueError(f"decode: {name} must be {bounds}, got {value}")


def check_sampling(temperature: Any, top_k: Any, top_p: Any, seed: Any) -> None:
    for name, value in (("temperature", temperature), ("top_p", top_p)):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"decode: {name} must be a number, got {value!r}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"decode: temperature must be >= 0 and finite, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"decode: top_p must be > 0 and <= 1, got {top_p}")
    check_integer("top_k", top_k, 0)
    check_integer("seed", seed, -(2**63), 2**63 - 1)


def eos_token_ids(eos_token_id: Any, model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a text; None takes those of the model's generation_config."""
    if eos_token_id is None:
        eos_token_id = getattr(model.generation_config, "eos_token_id", None)
    if eos_token_id is None:
        return frozenset()
    several = eos_token_id if isinstance(eos_token_id, Sequence) else [eos_token_id]
    for token in several:
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(
                f"decode: eos_token_id must be None, an integer or a list of integers, got {eos_token_id!r}"
            )
    return frozenset(several)


def stopping_criteria_list(stopping_criteria: Any) -> StoppingCriteriaList | None:
    """None or a list of transformers' stopping criteria -> one callable."""
    if stopping_criteria is None:
        return None
    if not isinstance(stopping_criteria, list) or not all(map(callable, stopping_criteria)):
        raise TypeError(
            f"decode: stopping_criteria must be None or a StoppingCriteriaList, got {type(stopping_criteria).__name__}"
        )
    return StoppingCriteriaList(stopping_criteria) if stopping_criteria else None


def check_streamer(streamer: Any) -> None:
    if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise TypeError(f"decode: streamer must have put and end, as transformers' have, got {type(streamer).__name__}")


def check_graphs(graphs: Any) -> None:
    if graphs is not None and not isinstance(graphs, bool):
        raise TypeError(f"decode: graphs must be None, True or False, got {graphs!r}")


def check_compile(compile: Any, graphs: Any) -> None:
    if not isinstance(compile, bool):
        raise TypeError(f"decode: compile must be True or False, got {compile!r}")
    if compile and graphs:
        raise ValueError("decode: graphs must be None or False where compile is True, got True")
