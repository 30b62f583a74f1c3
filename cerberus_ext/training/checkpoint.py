"""What a killed run goes on from: parameters, the optimizer's state and the progress, in one file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..io.files import write_tensors
from .output import CHECKPOINT_FILE, check_same

OPTIMIZER_STATE = ("exp_avg", "exp_avg_sq", "step")


def save_checkpoint(
    folder: Path, heads: nn.Module, optimizer: torch.optim.Optimizer, identity: dict[str, Any], progress: dict[str, Any]
) -> None:
    """A kill leaves the old checkpoint or the new one. What is not trained is not in it."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _trained(heads):
        tensors[name] = parameter.detach()
        if parameter in optimizer.state:  # after a step
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
            recorded, progress = (json.loads(opened.metadata()[key]) for key in ("identity", "progress"))
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"train: output: {file} is no checkpoint ({error}); remove it or choose another folder"
        ) from error
    remedy = "remove the file or choose another output folder"
    check_same(recorded, identity, f"continue {CHECKPOINT_FILE} of the output", remedy)
    for name, parameter in _trained(heads):
        parameter.data.copy_(tensors[name])
        if f"{name}.step" not in tensors:
            continue
        state = {key: tensors[f"{name}.{key}"].to(parameter.device) for key in OPTIMIZER_STATE[:2]}
        optimizer.state[parameter] = {**state, "step": tensors[f"{name}.step"]}  # AdamW counts on the host
    return progress


def _trained(heads: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in heads.named_parameters() if parameter.requires_grad)
