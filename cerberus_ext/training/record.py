"""How heads were made: training.json and README.md, the model card, in the output folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from ..drafting.heads import CerberusConfig
from ..io.files import read_object, sha256, write_json, write_text
from ..io.heads_file import CARD_FILE, HUB_ID
from ..io.machine import describe_versions, device_name
from .estimate import coverage
from .held_out import BEST_SIZE, merit
from .output import MADE_BY, RECORD_FILE
from .run import Run

TEMPLATE = Path(__file__).parent / "model_card.md"


def write_record(run: Run) -> dict[str, Any]:
    """Writes training.json and the model card, in the main process, and returns the record."""
    output = run.options.output
    result, card = record(run), output / CARD_FILE
    ours = (read_object(output / RECORD_FILE) or {}).get("card_sha256")
    if not card.exists() or ours == sha256([card]):
        write_text(card, model_card(result, run.heads.config))
        ours = sha256([card])
    result["card_sha256"] = ours  # another file's stays: somebody has written or changed it
    write_json(output / RECORD_FILE, result)
    return result


def record(run: Run) -> dict[str, Any]:
    """How the heads were made so far; names no folder of the machine."""
    kept = max(run.curve, key=merit, default=None)
    name = "best_tokens_per_step" if run.options.only is None else "lowest_conditional_loss"
    device = run.device
    threads = f", threads: {torch.get_num_threads()}" if device.type == "cpu" else ""
    return {
        "made_by": MADE_BY,
        "options": run.options.numbers(),
        "data": {
            **run.made,
            **run.corpus.answers.describe(),
            "training_positions": len(run.tokens),
            "held_out_positions": len(run.held_tokens),
            "draft_vocab_coverage": coverage(run),
        },
        "lm_head_fingerprint": run.heads.config.lm_head_fingerprint,
        "dtype": str(run.dtype).removeprefix("torch."),
        "processes": run.processes.count,
        "parameters": sum(parameter.numel() for parameter in run.heads.parameters()),
        "trained_parameters": sum(parameter.numel() for parameter in run.trained),
        "steps": run.step,
        "positions_trained": run.step * run.options.batch,
        "seconds": round(run.seconds),
        "kept_step": kept["step"] if kept else None,  # the heads that were saved are those of this step
        name: None if kept is None else abs(merit(kept)),
        "curve": run.curve,
        "machine": device_name(device) + threads,
        "versions": describe_versions(),
    }


def model_card(record: dict[str, Any], config: CerberusConfig) -> str:
    """README.md as the Hub reads it. record: training.json's."""
    hub_id = config.base_model if HUB_ID.fullmatch(config.base_model) else None
    data = ModelCardData(
        base_model=hub_id,
        library_name="cerberus_ext",
        pipeline_tag="text-generation",
        tags=["speculative-decoding", "cerberus"],
    )
    kept = next((point for point in record["curve"] if point["step"] == record["kept_step"]), None)
    values = {"record": record, "data": record["data"], "config": config, "kept": kept, "best_size": BEST_SIZE}
    values["first"] = next((point for point in record["curve"] if point["step"] == 0), None)
    return str(ModelCard.from_template(data, template_str=TEMPLATE.read_text(encoding="utf-8"), **values)) + "\n"
