"""A tiny model with random weights of every family of docs/exactness.md, by what differs between their configs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tiny_models import COMMON, VOCAB
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BertLMHeadModel,
    PreTrainedModel,
    T5ForConditionalGeneration,
)

_HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER = {
    **COMMON, **_HEADS, "hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
_GPT2 = {**COMMON, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}
_WINDOW = {"sliding_window": 6}
_EXPERTS = {"num_experts_per_tok": 2}
_LATENT = {
    **_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32, "kv_lora_rank": 16,
    "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}  # fmt: skip
_NEXT = {
    **_EXPERTS, "layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "head_dim": 16, "linear_num_value_heads": 2, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
_JAMBA = {
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    "num_experts": 2, "num_experts_per_tok": 1, "use_mamba_kernels": False, "mamba_d_state": 8,
}  # fmt: skip
_GEMMA3N = {
    **_WINDOW, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16, "laurel_rank": 8, "altup_num_inputs": 2,
}  # fmt: skip

# Text equal bit for bit with and without drafts.
EXACT: dict[str, dict[str, Any]] = {
    "llama": _DECODER,
    "mistral": _DECODER | _WINDOW,
    "mixtral": _DECODER | _EXPERTS | {"num_local_experts": 4},
    "qwen2": _DECODER,
    "qwen3": _DECODER | {"head_dim": 16},
    "qwen3_moe": _DECODER | _EXPERTS
    | {"head_dim": 16, "num_experts": 4, "moe_intermediate_size": 48, "decoder_sparse_step": 1},
    "gemma": _DECODER | _GEMMA,
    "gemma2": _DECODER | _GEMMA | _WINDOW | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": _DECODER | _GEMMA | _WINDOW,
    "phi": _DECODER | {"partial_rotary_factor": 0.5},
    "phi3": _DECODER,
    "gpt_neox": {key: value for key, value in _DECODER.items() if key != "num_key_value_heads"} | {"rotary_pct": 0.25},
    "gpt2": _GPT2,
    "gptj": _GPT2 | {"rotary_dim": 8},
    "opt": COMMON | _HEADS
    | {"hidden_size": 64, "ffn_dim": 96, "max_position_embeddings": 128, "word_embed_proj_dim": 64, "init_std": 0.3},
    "falcon": _DECODER,
    "olmo2": _DECODER,
    "olmoe": _DECODER | _EXPERTS | {"num_experts": 4},
    "smollm3": _DECODER,
    "granite": _DECODER,
    "starcoder2": _DECODER,
    "stablelm": _DECODER | {"partial_rotary_factor": 0.25},
    "glm4": _DECODER | {"head_dim": 16},
    "gpt_oss": _DECODER | _EXPERTS | _WINDOW | {"num_local_experts": 4, "head_dim": 16},
    "gemma3n_text": _DECODER | _GEMMA3N,
    "gemma3n-shared": _DECODER | _GEMMA3N | {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}  # fmt: skip

# Refused before anything is printed.
REFUSED: dict[str, dict[str, Any]] = {
    "bloom": COMMON | {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": COMMON | {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": 128},
    "falcon-alibi": _DECODER | {"alibi": True},
    "gpt_neo": COMMON | {
        "hidden_size": 64, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
        "window_size": 6, "max_position_embeddings": 128,
    },
    "deepseek_v2": _DECODER | _LATENT,
    "deepseek_v3": _DECODER | _LATENT,
    "rwkv": COMMON | {
        "hidden_size": 64, "attention_hidden_size": 64, "num_hidden_layers": 2, "context_length": 64
    },
    "mamba": COMMON | {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "jamba": _DECODER | _JAMBA,
    "lfm2": _DECODER | {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": _DECODER | _NEXT,
    "llama4_text": _DECODER | {
        "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 96,
        "attention_chunk_size": 8,
    },
    "t5": COMMON | {"d_model": 64, "d_ff": 96, "num_layers": 2, "num_heads": 4},
    "bert": COMMON | _HEADS | {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 128},
}  # fmt: skip
_TYPES = {"falcon-alibi": "falcon", "gemma3n-shared": "gemma3n_text"}
_CLASSES = {"t5": T5ForConditionalGeneration, "bert": BertLMHeadModel}


@cache
def tiny_family(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Fixed random weights. Shared by all tests: they leave it as it is."""
    return make_family(name, dtype)


def make_family(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """One of its own. changes: to its config."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[_TYPES.get(name, name)](**(EXACT | REFUSED)[name] | changes)
    model = _CLASSES[name](config) if name in _CLASSES else AutoModelForCausalLM.from_config(config)
    return model.eval().to(dtype)
