"""What a killed run goes on from: parameters, the optimizer's state and the progress, in one file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..io.files import write_tensors

CHECKPOINT_FILE = "checkpoint.safetensors"
OPTIMIZER_STATE = ("exp_avg", "exp_avg_sq", "step")


def save_checkpoint(
    folder: Path, heads: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any], progress: dict[str, Any]
) -> None:
    """A kill leaves the old checkpoint or the new one."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in heads.named_parameters():
        tensors[name] = parameter.detach()
        tensors.update({f"{name}.{key}": optimizer.state[parameter][key] for key in OPTIMIZER_STATE})
    metadata = {"identity": json.dumps(identity), "progress": json.dumps(progress)}
    write_tensors(folder / CHECKPOINT_FILE, tensors, metadata)


def load_checkpoint(
    folder: Path, heads: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any]
) -> dict[str, Any] | None:
    """Puts the checkpoint of `folder` into heads and optimizer and returns its progress; None where there is none.

    Raises ValueError, naming what differs, for a checkpoint of another run.
    """
    file = folder / CHECKPOINT_FILE
    if not file.exists():
        return None
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        found, progress = json.loads(metadata["identity"]), json.loads(metadata["progress"])
        tensors = load_file(file)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"train: output: {file} is no checkpoint ({error}); remove it or choose another folder"
        ) from error
    for key, expected in identity.items():
        if found.get(key) != expected:
            raise ValueError(
                f"train: {key} must be {found.get(key)} to continue {CHECKPOINT_FILE} of the output, got {expected};"
                " remove the file or choose another output folder"
            )
    for name, parameter in heads.named_parameters():
        parameter.data.copy_(tensors[name])
        state = {key: tensors[f"{name}.{key}"].to(parameter.device) for key in OPTIMIZER_STATE[:2]}
        optimizer.state[parameter] = {**state, "step": tensors[f"{name}.step"]}  # AdamW counts on the host
    return progress


def digest(tensors: dict[str, Tensor]) -> str:
    """16 hex digits of the tensors' exact values."""
    sums = hashlib.sha256()
    for name in sorted(tensors):
        sums.update(name.encode())
        sums.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()[:16]
