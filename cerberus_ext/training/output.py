"""The output folder of a training run: nothing in it is written over that no such run has made.

A run begins with its record, training.json, so a folder that has one with `made_by` is of such a run. Without it, none
of the names that a run writes may be there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..drafting.heads import CerberusConfig, CerberusHeads
from ..io.files import check_output_folder, check_writable, read_object, remove_partial, write_json
from ..io.heads_file import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE
from .export import check_export
from .options import TrainOptions

RECORD_FILE, CURVES_FILE, CHECKPOINT_FILE = "training.json", "curves.png", "checkpoint.safetensors"
DATA_FOLDER = "data"
MADE_BY = "cerberus train"  # in the record: marks the folder as a run's
NAMES = (RECORD_FILE, CONFIG_FILE, WEIGHTS_FILE, CARD_FILE, CURVES_FILE, CHECKPOINT_FILE, DATA_FOLDER)


def check_output(options: TrainOptions, model: str | None) -> None:
    """Writes nothing. model: the folder of the model that is trained for; a Hub id or None is in no danger.

    Raises ValueError, naming option and file, where something of the user's would be written over, or is to be read
    from where the run writes; OSError where the folder cannot be written to.
    """
    folder = options.output.resolve()
    for name, given in (("model", model), ("init", options.init), ("data", options.data), ("prompts", options.prompts)):
        if given is not None and Path(given).exists():
            _check_input(folder, name, Path(given), options)
    if options.export_dataset is not None:
        _check_input(folder, "export-dataset", options.export_dataset, options)
        check_export(options.export_dataset)
    if options.cache is not None and options.cache.resolve() == folder / DATA_FOLDER:
        raise ValueError(f"train: cache: {options.cache} is where the run writes its answers; choose another folder")
    ours = (read_object(folder / RECORD_FILE) or {}).get("made_by") == MADE_BY
    check_output_folder("train: output", options.output, (folder / name for name in NAMES if not ours), MADE_BY)


def begin_output(options: TrainOptions, model: nn.Module, config: CerberusConfig) -> None:
    """Checks, makes the folder and marks it as a run's. config: of the heads, whose files need room."""
    check_output(options, getattr(model, "name_or_path", None))
    with torch.device("meta"):
        numbers = sum(parameter.numel() for parameter in CerberusHeads(config).parameters())
    # The checkpoint has every number and the optimizer's two of it in float32, and is written beside the old one.
    check_writable("train: output", options.output, numbers * (2 * 12 + 2 * 2))
    options.output.mkdir(parents=True, exist_ok=True)
    remove_partial(options.output)
    if read_object(options.output / RECORD_FILE) is None:
        write_json(options.output / RECORD_FILE, {"made_by": MADE_BY})


def check_same(recorded: dict[str, Any], identity: dict[str, Any], use: str, remedy: str) -> None:
    """Raises ValueError, naming what differs, where `recorded`, of an earlier run, is not of this one's identity."""
    for key, expected in identity.items():
        if recorded.get(key) != expected:
            raise ValueError(f"train: {key} must be {recorded.get(key)} to {use}, got {expected}; {remedy}")


def _check_input(folder: Path, name: str, given: Path, options: TrainOptions) -> None:
    """What is read, or written besides, may lie in the output folder, but not be it, nor be among what is written
    there."""
    path = given.resolve()
    if name in ("model", "init") and path == folder:
        raise ValueError(
            f"train: output: {options.output} is the folder of --{name}, whose files would be written over"
        )
    for file in (folder / written for written in NAMES if written != DATA_FOLDER or options.data is None):
        if file in (path, *path.parents):
            raise ValueError(f"train: output: {file} is written there, and --{name} is {given}; choose another folder")
