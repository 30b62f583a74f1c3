"""How heads were made: training.json, curves.png and README.md, the model card, in the output folder."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ..io.files import read_object, sha256, write_json, write_text
from ..io.heads_file import CARD_FILE
from ..io.machine import device_name
from .curves import draw_curves
from .estimate import coverage
from .held_out import BEST_SIZE
from .model_card import model_card

if TYPE_CHECKING:
    from .trainer import Trainer

RECORD_FILE = "training.json"
CURVES_FILE = "curves.png"
MADE_BY = "cerberus train"  # in the record: marks the folder as a run's


def write_record(trainer: Trainer) -> dict[str, Any]:
    """Writes training.json and the model card, in the main process, and returns the record."""
    output = trainer.options.output
    result, card = record(trainer), output / CARD_FILE
    before = read_object(output / RECORD_FILE) or {}
    ours = before.get("card_sha256")
    without_digest = ours is None and "options" in before  # records of earlier versions
    if not card.exists() or without_digest or ours == sha256([card]):
        write_text(card, model_card(result, trainer.heads.config))
        ours = sha256([card])
    result["card_sha256"] = ours  # another file's stays: somebody has written or changed it
    write_json(output / RECORD_FILE, result)
    return result


def finish_record(trainer: Trainer) -> dict[str, Any]:
    """As `write_record`, and the curves, which take longer to draw."""
    draw_curves(trainer.curve, trainer.options.output / CURVES_FILE)
    return write_record(trainer)


def record(trainer: Trainer) -> dict[str, Any]:
    """How the heads were made so far; names no folder of the machine."""
    kept = max(trainer.curve, key=lambda point: point["tokens_per_step"][BEST_SIZE], default=None)
    return {
        "made_by": MADE_BY,
        "options": trainer.options.numbers(),
        "data": {
            **trainer.made,
            **trainer.answers.describe(),
            "training_positions": len(trainer.tokens),
            "held_out_positions": len(trainer.held_tokens),
            "draft_vocab_coverage": coverage(trainer),
        },
        "lm_head_fingerprint": trainer.heads.config.lm_head_fingerprint,
        "dtype": str(trainer.dtype).removeprefix("torch."),
        "processes": trainer.processes.count,
        "parameters": sum(parameter.numel() for parameter in trainer.heads.parameters()),
        "steps": trainer.step,
        "positions_trained": trainer.step * trainer.options.batch,
        "seconds": round(trainer.seconds),
        "kept_step": kept["step"] if kept else None,  # the heads that were saved are those of this step
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
    """What did the work."""
    name = device_name(device)
    return f"{name}, threads: {torch.get_num_threads()}" if device.type == "cpu" else name
