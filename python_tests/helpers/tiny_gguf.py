"""A GGUF file as small as one can be that transformers converts to a model and a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, ReaderTensor, TokenType
from gguf.quants import quantize
from tokenizers.pre_tokenizers import ByteLevel

# Of the weights with these names, four bits, but the embeddings in eight.
MIXED = {name: GGMLQuantizationType.Q4_1 for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down")}
MIXED |= {name: GGMLQuantizationType.Q4_0 for name in ("ffn_gate", "ffn_up")}
MIXED |= {"token_embd": GGMLQuantizationType.Q8_0}
# In five bits, but the values in eight: no product of one format with queries and keys.
FIVES = {name: GGMLQuantizationType.Q5_0 for name in ("attn_q", "attn_k", "attn_output", "token_embd")}
FIVES |= {name: GGMLQuantizationType.Q5_1 for name in ("ffn_gate", "ffn_up", "ffn_down")}
FIVES |= {"attn_v": GGMLQuantizationType.Q8_0}


def tiny_gguf(path: Path, width: int = 8, kinds: dict[str, GGMLQuantizationType] | None = None) -> None:
    """A llama of one layer with a tokenizer like the default model's: bytes, some merges, control tokens.

    kinds: what the weights of these names (the last part but one) are in, which are random then; others are ones.
    """
    special, merges = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ["\u0120 w", "\u0120w o", "l d", "l o"]
    tokens = special + sorted(ByteLevel.alphabet()) + [merge.replace(" ", "") for merge in merges]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_block_count(1)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(2 * width)
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
    half, twice = width // 2, 2 * width
    shapes: dict[str, tuple[int, ...]] = {"attn_q": (width, width), "attn_k": (half, width), "attn_v": (half, width)}
    shapes |= {"attn_output": (width, width), "ffn_gate": (twice, width), "ffn_up": (twice, width)}
    shapes |= {"ffn_down": (width, twice), "attn_norm": (width,), "ffn_norm": (width,)}
    shapes = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    random = np.random.default_rng(0)
    for name, shape in (shapes | {"token_embd.weight": (len(tokens), width), "output_norm.weight": (width,)}).items():
        kind = (kinds or {}).get(name.split(".")[-2])
        if kind is None:
            writer.add_tensor(name, np.ones(shape, dtype=np.float32))
        else:
            values = random.normal(0, 0.3, shape).astype(np.float32)
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


Weights = tuple[np.ndarray, GGMLQuantizationType]


def copy_gguf(source: Path, target: Path, weights: Callable[[ReaderTensor, Weights], Weights | None]) -> None:
    """Writes the file again. weights: of a tensor and what it has, what it is to have; None: it is left out."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        if field.types[0].name == "ARRAY":
            writer.add_array(name, field.contents())
        else:
            writer.add_key_value(name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        if (found := weights(tensor, (np.array(tensor.data), tensor.tensor_type))) is not None:
            writer.add_tensor(tensor.name, found[0], raw_dtype=found[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
