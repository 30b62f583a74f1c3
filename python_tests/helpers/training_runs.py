"""What the tests of the trainer share: options for runs of a second, tiny model folders, the command as a process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from word_tokenizer import word_tokenizer

from cerberus_ext.training.options import TrainOptions

CLI = ("-m", "cerberus_ext.cli")
WORDS = ["<unk>", "<s>", "</s>", "user", "assistant", *(f"w{i}" for i in range(59))]
TEMPLATE = (
    "{% for message in messages %}<s> {{ message['role'] }} {{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def options(answers: Path | None, output: Path, **changes: object) -> TrainOptions:
    values = {"draft_vocab": 60, "heads": 3, "steps": 40, "batch": 64, "warmup": 4, "lr": 3e-3, "held_out": 0.1}
    return TrainOptions(output, data=answers, **{**values, "eval_every": 20, **changes})  # type: ignore[arg-type]


def tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    """Of words, with a chat template or without."""
    made = word_tokenizer(WORDS, bos_token="<s>", eos_token="</s>")
    if chat:
        made.chat_template = TEMPLATE
    return made


def model(seed: int = 0, positions: int = 256) -> LlamaForCausalLM:
    """Two layers, random, for `tokenizer`'s words."""
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=positions, bos_token_id=1, eos_token_id=2, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def model_folder(folder: Path) -> Path:
    """A chat model as `cerberus train --model` takes it."""
    model().save_pretrained(folder)
    tokenizer(chat=True).save_pretrained(folder)
    return folder


def start(*arguments: str | Path, launcher: Sequence[str] = CLI) -> subprocess.Popen[str]:
    """`cerberus` in a process of its own, on one thread and with this process's modules."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, *launcher, *map(str, arguments)]
    # Away from the source folder, which `python -m` would put before the installed package.
    return subprocess.Popen(
        command,
        cwd=tempfile.gettempdir(),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
