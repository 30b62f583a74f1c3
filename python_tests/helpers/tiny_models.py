"""Tiny models with random weights, of every kind of attention that `decode` meets, and what they generate."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 101
# Weights large enough for the logits to be far apart, so that rounding never decides which one is the largest.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "initializer_range": 0.3,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}
_DECODER: dict[str, Any] = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_WINDOWED = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}  # layer 0 full, 1 and 2 windowed

_MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_DECODER)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_DECODER)),
    "qwen2-window": lambda: Qwen2ForCausalLM(Qwen2Config(**_DECODER, **_WINDOWED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_DECODER, sliding_window=6)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=4, n_positions=96)),
    # Soft caps on attention scores, which only the model's own attention computes, and windows in every second layer.
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **_DECODER,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=6,
            attn_logit_softcapping=2.0,
            attn_implementation="eager",  # sdpa, which older versions of transformers take, leaves out the soft caps
        )
    ),
}


@cache
def tiny_model(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with fixed random weights. Shared by all tests: they leave it as it is."""
    torch.manual_seed(0)
    return _MODELS[name]().eval().to(device=device, dtype=dtype)


def prompt(device: str = "cpu", length: int = 9) -> Tensor:
    """(1, length) random tokens, always the same."""
    return torch.randint(VOCAB, (1, length), generator=torch.Generator().manual_seed(1)).to(device)


def generate(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    """Greedily, with transformers."""
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **options)


@cache
def generated(name: str, device: str, new: int) -> Tensor:
    """What the model makes of `prompt`, (1, 9 + new)."""
    return generate(tiny_model(name, device), prompt(device), max_new_tokens=new)
