"""training.json: how heads were made."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from .held_out import BEST_SIZE

if TYPE_CHECKING:
    from .trainer import Trainer

RECORD_FILE = "training.json"


def record(trainer: Trainer) -> dict[str, Any]:
    """How the heads were made so far; names no folder of the machine."""
    data, train_rows = trainer.data, trainer.train_rows
    known = trainer.draft_index >= 0
    kept = max(trainer.curve, key=lambda point: point["tokens_per_step"][BEST_SIZE], default=None)
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
