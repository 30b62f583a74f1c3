"""A GGUF file as small as one can be that transformers converts to a model and a tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType
from tokenizers.pre_tokenizers import ByteLevel


def tiny_gguf(path: Path) -> None:
    """A llama of one layer with a tokenizer like the default model's: bytes, some merges, control tokens."""
    special, merges = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["\u0120 w", "\u0120w o", "l d", "l o"]
    tokens = special + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in merges]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * len(special) + [TokenType.NORMAL] * (len(tokens) - len(special)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    shapes = {"attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8), "ffn_gate": (16, 8)}
    shapes |= {"ffn_up": (16, 8), "ffn_down": (8, 16), "attn_norm": (8,), "ffn_norm": (8,)}
    shapes = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    for name, shape in (shapes | {"token_embd.weight": (len(tokens), 8), "output_norm.weight": (8,)}).items():
        writer.add_tensor(name, np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
