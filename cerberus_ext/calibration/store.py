"""Where calibrations are kept: one JSON file for each set of heads, one entry for each machine.

    beside the heads    calibration.json in their folder, where it can be written
    cache folder        calibration/<fingerprint of the heads>.json, for heads of this package and of the Hub, and for
                        folders that cannot be written

An entry belongs to a device, a dtype, on a CPU a number of threads, and to steps that are compiled or not. Heads that
were trained on have another fingerprint: what was measured with the old ones is not used for them.
"""

from __future__ import annotations

import json
import os
import warnings
import weakref
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..default_model import cache_dir
from ..dynamic_tree import DynamicTree
from ..gate import AlwaysOpen, ConfidenceGate, EntropyGate, Gate
from ..heads import PRETRAINED, CerberusHeads, fingerprint
from ..info import device_name
from ..tree import DraftTree

FILE = "calibration.json"
FORMAT_VERSION = 1

Key = tuple[str, str, int, bool]  # device, dtype, threads, compiled: what an entry belongs to


@dataclass(frozen=True)
class Expected:
    """What decoding is expected to do, on texts that nothing was fitted on.

    tokens_per_second, plain_tokens_per_second: of the steps, without the prompt; with the setting, and without guesses;
        at a pace that validation has corrected, see calibration/validate.py
    """

    tokens_per_second: float
    plain_tokens_per_second: float
    tokens_per_step: float
    gate_open_rate: float
    wasted_step_rate: float

    @property
    def speed_up(self) -> float:
        return self.tokens_per_second / self.plain_tokens_per_second


@dataclass(frozen=True)
class Calibration:
    """What is fastest for heads on a device.

    device: its name; dtype: the model's; threads: of torch on a CPU, 0 on other devices
    heads, model: fingerprints, see `heads.fingerprint`; the model's is that of its LM head
    details: everything that was measured, as plain numbers
    compiled: whether it is of compiled steps, see `decode`'s `compile`
    """

    device: str
    dtype: str
    threads: int
    heads: str
    model: str
    tree: DraftTree | DynamicTree
    gate: Gate
    expected: Expected
    details: dict[str, Any] = field(default_factory=dict)
    compiled: bool = False

    @property
    def key(self) -> Key:
        return self.device, self.dtype, self.threads, self.compiled

    def to_json(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "dtype": self.dtype,
            "threads": self.threads,
            "compiled": self.compiled,
            "heads": self.heads,
            "model": self.model,
            "tree": tree_to_json(self.tree),
            "gate": gate_to_json(self.gate),
            "expected": asdict(self.expected),
            "details": self.details,
        }

    @staticmethod
    def from_json(entry: dict[str, Any]) -> Calibration:
        """Raises ValueError on anything that `to_json` does not write."""
        try:
            return Calibration(
                **{name: entry[name] for name in ("device", "dtype", "threads", "heads", "model")},
                tree=tree_from_json(entry["tree"]),
                gate=gate_from_json(entry["gate"]),
                expected=Expected(**{name: float(value) for name, value in entry["expected"].items()}),
                details=entry["details"],
                compiled=is_compiled(entry),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"an entry is not complete: {type(error).__name__}: {error}") from error


def is_compiled(entry: dict[str, Any]) -> bool:
    """Entries from before there were compiled steps do not say it."""
    return bool(entry.get("compiled", False))


def tree_to_json(tree: DraftTree | DynamicTree) -> str | dict[str, Any]:
    return asdict(tree) if isinstance(tree, DynamicTree) else tree_to_text(tree)


def tree_from_json(tree: str | dict[str, Any]) -> DraftTree | DynamicTree:
    return DynamicTree(**tree) if isinstance(tree, dict) else tree_from_text(tree)


def tree_to_text(tree: DraftTree) -> str:
    """The ranks along every path: "0 1 0.0" is the root's two best continuations, and the best one of the first."""
    return " ".join(".".join(map(str, path)) for path in tree.paths())


def tree_from_text(text: str) -> DraftTree:
    return DraftTree.from_paths([int(rank) for rank in path.split(".")] for path in text.split())


def gate_to_json(gate: Gate) -> dict[str, Any]:
    """Of the gates that calibration picks from."""
    if isinstance(gate, EntropyGate):
        return {"kind": "entropy", "threshold": gate.threshold}
    if isinstance(gate, ConfidenceGate):
        return {
            "kind": "confidence",
            "costs": {str(size): cost for size, cost in gate.costs.items()},
            "trees": None if gate.own_trees is None else [tree_to_text(tree) for tree in gate.own_trees],
            "margin": gate.margin,
            "rate": gate.rate,
            "corrections": None if gate.corrections is None else [list(line) for line in gate.corrections],
        }
    return {"kind": "open"}


def gate_from_json(values: dict[str, Any]) -> Gate:
    kind = values["kind"]
    if kind == "open":
        return AlwaysOpen()
    if kind == "entropy":
        return EntropyGate(values["threshold"])
    if kind == "confidence":
        return ConfidenceGate(
            costs={int(size): float(cost) for size, cost in values["costs"].items()},
            trees=None if values["trees"] is None else [tree_from_text(text) for text in values["trees"]],
            margin=values["margin"],
            rate=values["rate"],
            corrections=values["corrections"],
        )
    raise ValueError(f"gate must be open, entropy or confidence, got {kind!r}")


def heads_fingerprint(heads: CerberusHeads) -> str:
    return fingerprint([parameter.flatten() for _, parameter in sorted(heads.named_parameters())], rows=1 << 20)


def key_of(device: torch.device, dtype: torch.dtype, threads: int, compiled: bool = False) -> Key:
    """What an entry belongs to. Threads count on a CPU only."""
    return _device_name(device), str(dtype).removeprefix("torch."), threads if device.type == "cpu" else 0, compiled


def _key_of_entry(entry: dict[str, Any]) -> Key:
    return entry["device"], entry["dtype"], entry["threads"], is_compiled(entry)


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
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"format_version must be {FORMAT_VERSION}, got {version!r}")
        for entry in content["entries"]:
            _key_of_entry(entry), entry["heads"]
        return list(content["entries"])
    except FileNotFoundError:
        return []
    except (KeyError, TypeError, ValueError) as error:
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
    content = {"format_version": FORMAT_VERSION, "entries": [*kept, calibration.to_json()]}
    write_json(file, content)
    _found.pop(heads, None)
    return file


def write_json(file: Path, content: Any) -> None:
    """Whole or not at all, also where two processes write at once."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


_found: weakref.WeakKeyDictionary[CerberusHeads, dict[Key, Calibration | None]]
_found = weakref.WeakKeyDictionary()
_said: set[str] = set()


def find(
    heads: Any, device: torch.device, dtype: torch.dtype, threads: int, compiled: bool = False
) -> Calibration | None:
    """What was calibrated for the heads, or None. Looked for once for each object.

    compiled: preferably of compiled steps; where there is no such calibration, that of the others serves, too.

    Other heads than CerberusHeads have none. What is damaged, or was made with other heads, is warned of, once, and
    not used.
    """
    if not isinstance(heads, CerberusHeads):
        return None
    known = _found.setdefault(heads, {})
    key = key_of(device, dtype, threads, compiled)
    if key not in known:
        known[key] = _read(heads, key)
    if known[key] is None and compiled:
        return find(heads, device, dtype, threads)
    return known[key]


def _read(heads: CerberusHeads, key: Key) -> Calibration | None:
    own = heads_fingerprint(heads)
    for file in places(heads, own):
        try:
            entries = read_entries(file)
            for entry in entries:
                if _key_of_entry(entry) != key:
                    continue
                if entry["heads"] != own:
                    _warn(f"{file} was made with other heads, such as these before more training; calibrate again")
                    continue
                return _checked(Calibration.from_json(entry), heads)
        except (OSError, ValueError) as error:
            _warn(str(error))
    return None


def _checked(calibration: Calibration, heads: CerberusHeads) -> Calibration:
    if isinstance(calibration.tree, DynamicTree):
        calibration.gate.check_size(calibration.tree.size)
        if len(calibration.tree.corrections or range(heads.config.num_heads)) != heads.config.num_heads:
            raise ValueError("a calibrated tree has corrections for another number of heads")
        return calibration
    for tree in {calibration.tree, *calibration.gate.trees(calibration.tree)}:
        most = heads.config.draft_vocab or heads.config.vocab_size
        if tree.depth > heads.config.num_heads or tree.guesses > most:
            raise ValueError("a calibrated tree is larger than what the heads can guess")
    return calibration


def _warn(message: str) -> None:
    if message not in _said:
        _said.add(message)
        warnings.warn(f"decode: no calibrated tree and gate, the defaults are used: {message}", stacklevel=2)
