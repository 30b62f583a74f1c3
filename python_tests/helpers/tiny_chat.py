"""A tiny model with a tokenizer, heads and questions, in folders, for the tests of commands."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from word_tokenizer import word_tokenizer

from cerberus_ext import CerberusConfig, CerberusHeads

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(60)), "<b>&"]
SIZE = 32


def save_model(folder: Path, seed: int = 0) -> None:
    """Weights so large that rounding never decides which token is the best."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=SIZE, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer(WORDS, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def save_heads(folder: Path, chained: bool = True) -> None:
    """Random ones, so that not all draft the same."""
    heads = CerberusHeads(CerberusConfig("tiny", SIZE, len(WORDS), num_heads=3, chained=chained))
    with torch.no_grad():
        heads.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    heads.save_pretrained(folder)


def save_questions(file: Path) -> None:
    rows = [
        {"question_id": 7, "category": "first", "turns": ["w1 w2 w3", "w4"]},
        {"question_id": 8, "category": "first", "turns": ["w5 w6", "w7 w8"]},
        {"question_id": 9, "category": "second", "turns": ["<b>& w9 w10 w11 w12", "w13"]},
        {"question_id": 10, "category": "second", "turns": ["w14"]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
