"""How heads were made: training.json, curves.png and README.md, the model card, in the output folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from ..drafting.heads import CerberusConfig
from ..io.files import read_object, sha256, write_json, write_text
from ..io.heads_file import CARD_FILE, HUB_ID
from ..io.machine import describe_versions, device_name
from .curves import draw_curves
from .estimate import coverage
from .held_out import BEST_SIZE
from .output import CURVES_FILE, MADE_BY, RECORD_FILE

if TYPE_CHECKING:
    from .trainer import Trainer

TEMPLATE = Path(__file__).parent / "model_card.md"


def write_record(trainer: Trainer) -> dict[str, Any]:
    """Writes training.json and the model card, in the main process, and returns the record."""
    output = trainer.options.output
    result, card = record(trainer), output / CARD_FILE
    ours = (read_object(output / RECORD_FILE) or {}).get("card_sha256")
    if not card.exists() or ours == sha256([card]):
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
    device = trainer.device
    threads = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    return {
        "made_by": MADE_BY,
        "options": trainer.options.numbers(),
        "data": {
            **trainer.made,
            **trainer.corpus.answers.describe(),
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
        "machine": device_name(device) + threads,
        "versions": describe_versions(),
    }


def model_card(record: dict[str, Any], config: CerberusConfig) -> str:
    """README.md as the Hub reads it. record: training.json's."""
    base = config.base_model if HUB_ID.fullmatch(config.base_model) else None
    data = ModelCardData(
        base_model=base,
        library_name="cerberus_ext",
        pipeline_tag="text-generation",
        tags=["speculative-decoding", "cerberus"],
    )
    kept = next((point for point in record["curve"] if point["step"] == record["kept_step"]), None)
    values = {"record": record, "data": record["data"], "config": config, "kept": kept, "best_size": BEST_SIZE}
    return str(ModelCard.from_template(data, template_str=TEMPLATE.read_text(encoding="utf-8"), **values)) + "\n"
