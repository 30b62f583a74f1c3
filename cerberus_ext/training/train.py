"""Trains heads for a frozen target model on its own answers; `cerberus train` is the same from the shell.

    stage 1  data      the model answers questions, or writes both        training/self_distill.py
    stage 2  training  AdamW on KL(target model at position i + k || head k at position i)    training/trainer.py
             or only   conditional drafts for heads that stay as they are                     training/conditional.py
    stage 3  record    training.json, curves.png and the model card       training/record.py
    output   a folder for `CerberusHeads.from_pretrained`

The folder is complete after every measurement, with the best heads so far. A run that was killed goes on where it was
when it is started again with the same arguments, and ends with the data and the weights that it would have had.
Started by `accelerate launch` or `torchrun`, several processes share both stages' work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..drafting.heads import CerberusConfig, output_matrix
from ..engine.forked import threads_after_fork
from .conditional import ConditionalTrainer
from .curves import draw_curves
from .export import export_dataset
from .options import TrainOptions
from .output import CURVES_FILE, begin_output
from .processes import Processes
from .record import write_record
from .self_distill import Elsewhere, load_data
from .start import heads_config, of_init, trained_heads
from .trainer import Trainer

__all__ = ["Elsewhere", "TrainOptions", "train"]


def train(
    model: nn.Module,
    options: TrainOptions,
    tokenizer: PreTrainedTokenizerBase | None = None,
    elsewhere: Elsewhere | None = None,
) -> dict[str, Any] | None:
    """Trains heads for `model`, a transformers causal LM, and writes the best of them to options.output.

    The model is only read, and decides the device and the dtype of the products. tokenizer: its own; needed unless
    options.data is given. elsewhere: writes the answers instead of this process, where there is only one. Returns the
    record, as written to training.json; None in all but the main process of several.
    Raises ValueError on a model in training mode or float16, on options, data, a cache or a checkpoint that do not
    fit, and on an output folder with files of these names that no such run has made; FloatingPointError when the loss
    is no number; OSError where a file cannot be read or written, the last good ones staying as they were.
    """
    threads_after_fork()
    options = of_init(options)
    config = check(model, options)
    with Processes() as processes:
        processes.from_main(lambda: begin_output(options, model, config))
        answers, made = load_data(model, tokenizer, options, processes, elsewhere)
        if options.export_dataset is not None:
            file = options.export_dataset
            processes.from_main(lambda: export_dataset(answers, file))
            processes.say(f"data: {len(answers.lines)} rows in {file}")
        trainer = (ConditionalTrainer if options.only else Trainer)(model, answers, options, processes, made)
        trainer.run()
        if not processes.main:
            return None
        draw_curves(trainer.curve, options.output / CURVES_FILE)
        return write_record(trainer)


def check(model: nn.Module, options: TrainOptions) -> CerberusConfig:
    """Refuses what can be refused before the first stage, which may take hours. The configuration of the heads."""
    if model.training:
        raise ValueError("train: model must be in evaluation mode, got one in training mode")
    dtype = output_matrix(model).dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"train: model must be float32 or bfloat16, got {str(dtype).removeprefix('torch.')}")
    config = heads_config(model, options)
    if options.init is not None:
        trained_heads(options.init, config)
    return config
