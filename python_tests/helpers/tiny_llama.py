"""A tiny llama with random weights for the tests of heads and of their training."""

from __future__ import annotations

from functools import lru_cache

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 101
SIZE = 32  # of its hidden states


def make_llama(seed: int = 0, **changes: int) -> LlamaForCausalLM:
    values = {
        "vocab_size": VOCAB,
        "hidden_size": SIZE,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        **changes,
    }
    config = LlamaConfig(
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # logits far apart: rounding never decides which is the largest
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **values,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


@lru_cache(maxsize=1)
def tiny_llama() -> LlamaForCausalLM:
    """Shared by all tests: they leave it as it is."""
    return make_llama()
