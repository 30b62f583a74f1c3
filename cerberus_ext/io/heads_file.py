"""The files of heads: config.json and model.safetensors, checked before anything is made of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .files import read_object, write_json, write_tensors

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DRAFT_VOCAB = "draft_vocab"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_heads_folder(folder: Path) -> bool:
    """Whether its config.json is one of ours."""
    config = read_object(folder / CONFIG_FILE)
    return config is not None and {"format_version", "num_heads", "num_layers", "vocab_size"} <= config.keys()


def check_folder(folder: Path) -> None:
    """Refuses a folder with files that `write_heads` would write over, and that are not those of other heads."""
    if is_heads_folder(folder):
        return
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (folder / name).exists():
            raise ValueError(
                f"CerberusHeads.save_pretrained: {folder / name} is there already, and is not of Cerberus heads;"
                " choose another folder"
            )


def write_heads(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Each file whole or not at all. The configuration first: it tells that the folder is one of heads.

    Without what is None: earlier versions read heads that have nothing that came later.
    """
    write_json(folder / CONFIG_FILE, {name: value for name, value in config.items() if value is not None})
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    if DRAFT_VOCAB in tensors:
        tensors[DRAFT_VOCAB] = tensors[DRAFT_VOCAB].to(torch.int32)
    write_tensors(folder / WEIGHTS_FILE, tensors)


def read_config(file: Path) -> dict[str, Any]:
    """Raises OSError where the file cannot be read, ValueError where it is no JSON object."""
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"it must be a JSON object, got {type(value).__name__}")
    return value


def read_tensors(file: Path, expected: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """The tensors of a weights file: those of `expected` by name and shape, of one dtype, and of finite numbers.

    draft_vocab is int32 or int64, ascending and below vocab_size.
    Raises ValueError, naming the file, on anything else, OSError where it cannot be read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing" if not file.exists() else f"{file} is no file")
    file.open("rb").close()  # safetensors would not name the file that it may not read
    try:
        tensors = load_file(file)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({error})") from None
    for name, parameter in expected.items():
        if name not in tensors:
            raise ValueError(f"{file} has no tensor {name!r}")
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"{name} must be {tuple(parameter.shape)} by {CONFIG_FILE}, got {tuple(tensors[name].shape)} in {file}"
            )
    dtype = tensors["weight"].dtype
    for name in ["weight", *tensors]:  # the others follow its dtype
        if name not in expected:
            raise ValueError(f"{file} has a tensor {name!r} that {CONFIG_FILE} does not provide for")
        if name == DRAFT_VOCAB:
            _check_ids(tensors[name], vocab_size, file)
        elif dtype not in DTYPES or tensors[name].dtype != dtype:
            kinds = ", ".join(str(kind).removeprefix("torch.") for kind in DTYPES)
            raise ValueError(f"{name} in {file} must be one of {kinds}, the same for all, got {tensors[name].dtype}")
        elif not tensors[name].isfinite().all():
            raise ValueError(f"{name} in {file} must be finite numbers, got NaN or infinity")
    return tensors


def _check_ids(ids: Tensor, vocab_size: int, file: Path) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{DRAFT_VOCAB} in {file} must be int32 or int64, got {ids.dtype}")
    wide = ids.to(torch.int64)
    outside = wide[(wide < 0) | (wide >= vocab_size)]
    if len(outside):
        raise ValueError(f"{DRAFT_VOCAB} in {file} must be token ids in 0..{vocab_size - 1}, got {outside[0].item()}")
    if not (wide.diff() > 0).all():
        raise ValueError(f"{DRAFT_VOCAB} in {file} must be ascending token ids, got others")
