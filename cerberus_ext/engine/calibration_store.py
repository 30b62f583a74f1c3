"""Where calibrations are kept: one JSON file for each set of heads, one entry for each machine.

    beside the heads    calibration.json in their folder, where it can be written
    cache folder        calibration/<fingerprint of the heads>.json, for heads of this package and of the Hub, and for
                        folders that cannot be written

An entry belongs to a device, a dtype and, on a CPU, a number of threads. Heads that were trained on have another
fingerprint: what was measured with the old ones is not used for them.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import MutableMapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..drafting.gate import ConfidenceGate
from ..drafting.heads import PRETRAINED, CerberusHeads, fingerprint
from ..io.default_model import cache_dir
from ..io.files import write_json
from ..io.machine import device_name
from .calibration_entries import Calibration, Expected, Key

FILE = "calibration.json"
FORMAT_VERSION = 3  # 1: static trees, and gates with trees of their own; 2: steps that were not fused

__all__ = ["Calibration", "Expected", "find", "save"]


def heads_fingerprint(heads: CerberusHeads) -> str:
    return fingerprint([parameter.flatten() for _, parameter in sorted(heads.named_parameters())], rows=1 << 20)


def key_of(device: torch.device, dtype: torch.dtype, threads: int) -> Key:
    """What an entry belongs to. Threads count on a CPU only."""
    return _device_name(device), str(dtype).removeprefix("torch."), threads if device.type == "cpu" else 0


def _key_of_entry(entry: dict[str, Any]) -> Key:
    return entry["device"], entry["dtype"], entry["threads"]


_device_name = cache(device_name)  # asked at every decode, and reads a file


def places(heads: CerberusHeads, own_print: str) -> list[Path]:
    """The files in which to look for calibrations of the heads, whose fingerprint is `own_print`."""
    try:
        own = [cache_dir() / "calibration" / f"{own_print}.json"]
    except RuntimeError:  # there is no home folder
        own = []
    if heads.folder is None:
        return own
    beside = heads.folder / FILE
    mine = PRETRAINED.resolve() not in beside.parents and os.access(heads.folder, os.W_OK)
    return [beside, *own] if mine else [*own, beside]


def place(heads: CerberusHeads) -> Path:
    """The file to which calibrations of the heads are written."""
    files = places(heads, heads_fingerprint(heads))
    if not files:
        raise OSError("calibrate: there is no home folder to keep the result in: set CERBERUS_CACHE to a folder")
    return files[0]


def read_entries(file: Path) -> list[dict[str, Any]]:
    """The entries of a file, none where there is no file. Raises ValueError where it is not such a file."""
    try:
        content = json.loads(file.read_bytes())
        version, entries = content["format_version"], content["entries"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version must be {FORMAT_VERSION}, got {version!r}")
        if not isinstance(entries, list):
            raise ValueError(f"entries must be a list, got {type(entries).__name__}")
        for entry in entries:
            hash(_key_of_entry(entry)), entry["heads"]
        return entries
    except FileNotFoundError:
        return []
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{file} is no file of calibrations ({reason}); remove it and calibrate again") from error


def save(heads: CerberusHeads, calibration: Calibration) -> Path:
    """Puts an entry into its file, in the place of an older one with the same key; returns the file.

    Entries of other machines stay, those of other heads do not. Raises ValueError where the file is damaged.
    """
    file = place(heads)
    kept = [
        entry
        for entry in read_entries(file)
        if entry["heads"] == calibration.heads and _key_of_entry(entry) != calibration.key
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"format_version": FORMAT_VERSION, "entries": [*kept, calibration.to_json()]})
    return file


class Found:
    """What was looked up for heads: read again where a file has changed."""

    def __init__(self, heads: CerberusHeads) -> None:
        self.print = heads_fingerprint(heads)
        self.files = places(heads, self.print)
        self._read: dict[Key, tuple[Any, Calibration | None]] = {}
        self._said: set[str] = set()

    def get(self, heads: CerberusHeads, key: Key) -> Calibration | None:
        stamp = [_stamp(file) for file in self.files]
        if key not in self._read or self._read[key][0] != stamp:
            self._read[key] = (stamp, self._look(heads, key))
        return self._read[key][1]

    def _look(self, heads: CerberusHeads, key: Key) -> Calibration | None:
        for file in self.files:
            try:
                entries = read_entries(file)
            except (OSError, ValueError) as error:
                self._warn(str(error))
                continue
            for entry in entries:
                if _key_of_entry(entry) != key:
                    continue
                if entry["heads"] != self.print:
                    self._warn(f"{file} was made with other heads, such as these before more training; calibrate again")
                    continue
                try:
                    return _checked(Calibration.from_json(entry), heads)
                except ValueError as error:
                    self._warn(f"{file}: {error}; calibrate again")
        return None

    def _warn(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            warnings.warn(f"decode: no calibrated tree and gate, the defaults are used: {message}", stacklevel=2)


def _stamp(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def find(
    heads: Any,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
    kept: MutableMapping[Any, Any] | None = None,
) -> Calibration | None:
    """What was calibrated for the heads, or None.

    kept: what was found before, by heads.

    Other heads than CerberusHeads have none. What is damaged, or was made with other heads, is warned of and not used.
    """
    if not isinstance(heads, CerberusHeads):
        return None
    found = None if kept is None else kept.get(heads)
    if found is None:
        found = Found(heads)
        if kept is not None:
            kept[heads] = found
    return found.get(heads, key_of(device, dtype, threads))


def _checked(calibration: Calibration, heads: CerberusHeads) -> Calibration:
    policy, gate = calibration.tree, calibration.gate
    policy.check(heads.config.num_heads, None)
    if isinstance(gate, ConfidenceGate) and policy.size > max(gate.costs):
        raise ValueError("a calibrated gate has no cost for the size of its tree")
    return calibration
