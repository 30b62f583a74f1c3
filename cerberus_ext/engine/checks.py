"""Checks of the arguments of `decode`: every message names the argument, what it must be and what it is."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel, StoppingCriteriaList

from ..drafting.dynamic_policy import DynamicPolicy
from ..drafting.gate import SIGNALS
from ..drafting.tree import MAX_NODES, TreePolicy
from ..io.checks import as_number, check_integer, check_number
from ..runtime.sampling import Sampling, Typical

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ACCEPTANCES = {"exact": Sampling, "typical": Typical}
# What wraps a model, by what it has: of peft (the adapters are in the model), of torch.compile.
_INSIDE = {"get_base_model": "its get_base_model()", "_orig_mod": "the model as it was before torch.compile"}


def check_model(model: Any) -> None:
    """A decoder-only model with an LM head, in evaluation mode, on one CPU or GPU, of a dtype of the ops."""
    if not isinstance(model, PreTrainedModel):
        instead = next((f": give {what}" for name, what in _INSIDE.items() if hasattr(model, name)), "")
        raise TypeError(f"decode: model must be a transformers PreTrainedModel, got {type(model).__name__}{instead}")
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"decode: model must be decoder-only, {name} is an encoder-decoder")
    if model.get_output_embeddings() is None:
        raise ValueError(f"decode: model must have an LM head, {name} has none")
    if isinstance(model.get_output_embeddings(), torch.nn.Embedding):
        raise ValueError(
            f"decode: model must call its LM head, of {name} it is the embedding itself: add a Linear with its weight"
        )
    if model.training:
        raise ValueError("decode: model must be in evaluation mode, got one in training mode: call model.eval()")
    devices = {parameter.device for parameter in model.parameters()}
    if "meta" in {device.type for device in devices}:
        raise ValueError(
            f"decode: model must have its weights in memory, some of {name} are on meta: offloaded, or not loaded"
        )
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        raise ValueError(f"decode: model must be on one device, cpu or cuda, got {sorted(map(str, devices))}")
    if model.dtype not in _DTYPES:
        raise ValueError(f"decode: model must be float32, bfloat16 or float16, got {model.dtype}")


def check_autocast(model: PreTrainedModel) -> None:
    """No autocast to another dtype: keys would have another one than values, and weights other bits than their own."""
    kind = model.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != model.dtype:
        raise ValueError(
            f"decode: model must not run under autocast to another dtype than its own, {model.dtype}, got"
            f" {torch.get_autocast_dtype(kind)}: leave torch.autocast, and load the model in that dtype instead"
        )


def check_heads(heads: Any) -> None:
    """Something like CerberusHeads."""
    if isinstance(heads, str | os.PathLike):
        raise TypeError(
            f"decode: heads must be CerberusHeads, got the {type(heads).__name__} {str(heads)!r}:"
            f" load them with CerberusHeads.from_pretrained({str(heads)!r})"
        )
    if not callable(getattr(heads, "bind", None)) or not hasattr(getattr(heads, "config", None), "num_heads"):
        raise TypeError(f"decode: heads must be CerberusHeads, got {type(heads).__name__}")


def check_tree(tree: Any) -> TreePolicy:
    """A number of nodes is the DynamicPolicy with so many."""
    if (nodes := as_number(tree, int)) is not None:
        return DynamicPolicy(check_integer("decode: tree", nodes, 2, MAX_NODES))
    if not isinstance(tree, TreePolicy):
        raise TypeError(
            "decode: tree must be a number of nodes, a StaticPolicy, a DynamicPolicy or None, got"
            f" {type(tree).__name__}"
        )
    return tree


def check_gate(gate: Any) -> None:
    """What has `decide` and says which signals it needs."""
    needs = getattr(gate, "needs", None)
    if isinstance(gate, type) or not callable(getattr(gate, "decide", None)) or needs is None:
        raise TypeError(f"decode: gate must be a Gate or None, got {type(gate).__name__}")
    if not isinstance(needs, frozenset | set | tuple):
        raise TypeError(f"decode: gate must have a set of names as its needs, got {needs!r} of {type(gate).__name__}")
    if unknown := [name for name in needs if name not in sorted(SIGNALS)]:
        raise ValueError(f"decode: gate must need no other signals than {sorted(SIGNALS)}, got {unknown}")


def check_proposers(proposers: Any) -> None:
    """None, or a sequence of what makes proposers."""
    if proposers is not None and (not isinstance(proposers, Sequence) or not all(map(callable, proposers))):
        raise TypeError(
            "decode: proposers must be None or a sequence of callables that make a Proposer of a prompt,"
            f" got {type(proposers).__name__}"
        )


def check_sampling(temperature: Any, top_k: Any, top_p: Any, min_p: Any, seed: Any, acceptance: Any) -> Sampling:
    temperature = check_number(
        "decode: temperature", temperature, ">= 0 and finite", lambda number: 0 <= number < math.inf
    )
    top_p = check_number("decode: top_p", top_p, "> 0 and <= 1", lambda number: 0 < number <= 1)
    min_p = check_number("decode: min_p", min_p, ">= 0 and <= 1", lambda number: 0 <= number <= 1)
    top_k = check_integer("decode: top_k", top_k, 0, 2**63 - 1)
    seed = check_integer("decode: seed", seed, -(2**63), 2**63 - 1)
    if not isinstance(acceptance, str) or acceptance not in _ACCEPTANCES:
        raise ValueError(f"decode: acceptance must be one of {sorted(_ACCEPTANCES)}, got {acceptance!r}")
    if temperature:
        return _ACCEPTANCES[acceptance](seed, temperature, top_k, top_p, min_p)
    if acceptance != "exact":
        raise ValueError(f"decode: acceptance must be 'exact' where temperature is 0, got {acceptance!r}")
    return Sampling()  # greedily all seeds are alike, and so are recordings of a step


def eos_token_ids(eos_token_id: Any, generation_config: GenerationConfig | None) -> frozenset[int]:
    """The tokens that end a text; None takes those of the generation_config."""
    if eos_token_id is None:
        eos_token_id = getattr(generation_config, "eos_token_id", None)
    if eos_token_id is None:
        return frozenset()
    several = isinstance(eos_token_id, Sequence | set | frozenset) or getattr(eos_token_id, "ndim", 0) == 1
    tokens = [as_number(token, int) for token in (eos_token_id if several else [eos_token_id])]
    if None in tokens:
        raise TypeError(f"decode: eos_token_id must be None, an integer or a list of integers, got {eos_token_id!r}")
    return frozenset(tokens)


def max_new_tokens(model: PreTrainedModel, ids: Tensor, max_new_tokens: int) -> int:
    """max_new_tokens, or as many as the model has positions for. The last token of a text needs none."""
    table = position_table(model)
    if table is None:
        turn = rotary_turn(model)
        if turn is None or ids.shape[1] > turn:
            return max_new_tokens
        return min(max_new_tokens, turn - ids.shape[1] + 1)
    if ids.shape[1] > table:
        raise ValueError(
            f"decode: ids must have at most {table} tokens, the positions of {type(model).__name__}, got {ids.shape[1]}"
        )
    return min(max_new_tokens, table - ids.shape[1] + 1)


def rotary_turn(model: PreTrainedModel) -> int | None:
    """Tokens from which on `generate` reads the whole text again, with other rotary frequencies; None: it never does.

    Phi-3's models of long texts say so in a prepare_inputs_for_generation of their own.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    prepare = getattr(type(model), "prepare_inputs_for_generation", None)
    own = prepare is not GenerationMixin.prepare_inputs_for_generation
    if not own or rope.get("rope_type") != "longrope":
        return None
    return getattr(config, "original_max_position_embeddings", None) or rope.get("original_max_position_embeddings")


def position_table(model: PreTrainedModel) -> int | None:
    """Positions of a model that looks them up in a table; None: it computes them, and goes on beyond those that it was
    made for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return None
    known = model.get_input_embeddings()
    for module in model.modules():
        # Some tables have one or two rows more, for padding.
        if isinstance(module, torch.nn.Embedding) and module is not known and 0 <= module.num_embeddings - limit <= 2:
            return limit
    for _, buffer in model.named_buffers():  # gptj's and codegen's sines
        if buffer.dim() == 2 and buffer.shape[0] == limit:
            return limit
    return None


def stopping_criteria_list(stopping_criteria: Any) -> StoppingCriteriaList | None:
    """None or a list of transformers' stopping criteria -> one callable."""
    criteria = callables("stopping_criteria", stopping_criteria, "StoppingCriteriaList")
    return StoppingCriteriaList(criteria) if criteria else None


def callables(name: str, values: Any, kind: str) -> list[Any]:
    """None or a list of them, transformers' own or another one -> a list."""
    if values is not None and (not isinstance(values, list) or not all(map(callable, values))):
        raise TypeError(f"decode: {name} must be None or a {kind}, got {type(values).__name__}")
    return values or []


def check_generation_config(config: Any) -> None:
    if config is not None and not isinstance(config, GenerationConfig):
        raise TypeError(f"decode: generation_config must be None or a GenerationConfig, got {type(config).__name__}")


def check_streamer(streamer: Any) -> None:
    if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise TypeError(f"decode: streamer must have put and end, as transformers' have, got {type(streamer).__name__}")


def check_choice(name: str, value: Any) -> None:
    """Of graphs, fuse and pack."""
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"decode: {name} must be None, True or False, got {value!r}")
