"""Trains heads for a frozen base model on its own answers; `cerberus train` is the same from the shell.

    stage 1  hidden states of every answer, computed once into a cache folder    training/data.py
    stage 2  AdamW on KL(base model at position i + k || head k at position i)   training/trainer.py, distill.py
    output   a folder for `CerberusHeads.from_pretrained`, with training.json: how the heads were made

The folder is complete after every measurement, with the best heads so far. A run that was killed goes on from
its last checkpoint when it is started again with the same arguments, and ends with the weights that it would
have had.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from .heads import output_matrix
from .training.data import load_training_data
from .training.record import record
from .training.trainer import Trainer, TrainOptions

__all__ = ["TrainOptions", "train"]


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
    return record(trainer)
