"""Trains heads for a frozen base model on its own answers; `cerberus train` is the same from the shell.

    stage 1  hidden states of every answer, computed once into a cache folder    training_data.py
    stage 2  AdamW on KL(base model at position i + k || head k at position i)   trainer.py, distill.py
    output   a folder for `CerberusHeads.from_pretrained`, with training.json: how the heads were made

A run that was killed goes on from its last checkpoint when it is started again with the same arguments, and
ends with the weights that it would have had.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from .heads import output_matrix
from .trainer import Trainer, TrainOptions
from .training_data import load_training_data

RECORD_FILE = "training.json"

__all__ = ["TrainOptions", "record", "train"]


def train(model: nn.Module, options: TrainOptions) -> dict[str, Any]:
    """Trains heads for `model`, a transformers causal LM, and writes the best of them to options.output.

    The model is only read; training runs in float32 on its device. Returns the record, as written to
    training.json.
    Raises ValueError on a model in training mode and on options, data, a cache or a checkpoint that do not
    fit, FloatingPointError when the loss is no number.
    """
    if model.training:
        raise ValueError("train: model must be in evaluation mode, got one in training mode")
    vocab_size = output_matrix(model).shape[0]
    if options.draft_vocab > vocab_size:
        raise ValueError(
            f"train: draft_vocab must be at most the vocabulary, {vocab_size}, got {options.draft_vocab}"
        )
    data = load_training_data(model, options.data, options.cache or options.output / "hidden")
    trainer = Trainer(model, data, options)
    trainer.run()
    result = record(trainer)
    (options.output / RECORD_FILE).write_text(json.dumps(result, indent=1) + "\n")
    return result


def record(trainer: Trainer) -> dict[str, Any]:
    """How the heads were made; names no folder of the machine."""
    data, train_rows = trainer.data, trainer.train_rows
    known = trainer.draft_index >= 0
    return {
        "options": trainer.options.numbers(),
        "data": {
            "sha256": data.sha256,
            "lines": len(data.greedy),
            "training_positions": train_rows,
            "held_out_positions": len(data.tokens) - train_rows,
            "draft_vocab_coverage": {
                "training": round(known[data.tokens[:train_rows]].double().mean().item(), 4),
                "held_out": round(known[data.tokens[train_rows:]].double().mean().item(), 4),
            },
        },
        "lm_head_fingerprint": trainer.heads.config.lm_head_fingerprint,
        "parameters": sum(parameter.numel() for parameter in trainer.heads.parameters()),
        "positions_trained": trainer.step * trainer.options.batch,
        "seconds": round(trainer.seconds),
        "best_tokens_per_step": trainer.best,
        "curve": trainer.curve,
        "machine": machine(trainer.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def machine(device: torch.device) -> str:
    """The processor that did the work, as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = named[0] if named else name
    return f"{name}, threads: {torch.get_num_threads()}"
