"""What calibration stores, and as JSON: everything is checked when it is read back."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from ..drafting.dynamic_policy import DynamicPolicy
from ..drafting.gate import AlwaysOpen, ConfidenceGate, EntropyGate, Gate
from ..drafting.static_policy import StaticPolicy
from ..drafting.tree import MAX_NODES, TreePolicy
from ..io.checks import check_integer
from .budget import Costs

Key = tuple[str, str, int]  # device, dtype, threads: what an entry belongs to


@dataclass(frozen=True)
class Expected:
    """What decoding is expected to do, on texts that nothing was fitted on.

    tokens_per_second, plain_tokens_per_second: of the steps, without the prompt; with the setting, and without drafts;
        at a pace that validation has corrected, see calibration/validate.py
    """

    tokens_per_second: float
    plain_tokens_per_second: float
    tokens_per_step: float
    gate_open_rate: float
    zero_accept_rate: float

    @property
    def speed_up(self) -> float:
        return self.tokens_per_second / self.plain_tokens_per_second


@dataclass(frozen=True)
class Calibration:
    """What is fastest for heads on a device.

    device: its name; dtype: the model's; threads: of torch on a CPU, 0 on other devices
    heads, model: fingerprints, see `heads.fingerprint`; the model's is that of its LM head
    tree: a DynamicPolicy, or StaticPolicy.root() where nothing is faster than plain decoding
    details: everything that was measured, as plain numbers
    batches: seconds of steps of several texts; None: of an entry that was made before they were measured
    """

    device: str
    dtype: str
    threads: int
    heads: str
    model: str
    tree: TreePolicy
    gate: Gate
    expected: Expected
    details: dict[str, Any] = field(default_factory=dict)
    batches: Costs | None = None

    @property
    def key(self) -> Key:
        return self.device, self.dtype, self.threads

    def to_json(self) -> dict[str, Any]:
        inner = {"tree": self.tree.to_json(), "gate": gate_to_json(self.gate), "expected": asdict(self.expected)}
        return vars(self) | inner | {"batches": None if self.batches is None else asdict(self.batches)}

    @staticmethod
    def from_json(entry: dict[str, Any]) -> Calibration:
        """Raises ValueError on anything that `to_json` does not write."""
        try:
            for name in ("device", "dtype", "heads", "model"):
                if not isinstance(entry[name], str):
                    raise ValueError(f"{name} must be a text, got {entry[name]!r}")
            expected = Expected(**{name: _number(name, value) for name, value in entry["expected"].items()})
            inner = {"tree": tree_from_json(entry["tree"]), "gate": gate_from_json(entry["gate"]), "expected": expected}
            batches = entry.get("batches")
            inner["batches"] = None if batches is None else Costs(*(_costs(batches[of]) for of in ("texts", "nodes")))
            return Calibration(**entry | inner | {"details": dict(entry["details"])})
        except (AttributeError, KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"an entry is not complete: {type(error).__name__}: {error}") from error


def tree_from_json(tree: Any) -> TreePolicy:
    """Of what `to_json` of the policies that calibration picks from gives."""
    if tree == StaticPolicy.root().to_json():
        return StaticPolicy.root()
    check_integer("size", tree["size"], 2, MAX_NODES)
    return DynamicPolicy(**tree)


def gate_to_json(gate: Gate) -> dict[str, Any]:
    """Of the gates that calibration picks from."""
    if isinstance(gate, EntropyGate):
        return {"kind": "entropy", "threshold": gate.threshold}
    if isinstance(gate, ConfidenceGate):
        costs = {str(size): cost for size, cost in gate.costs.items()}
        return {"kind": "confidence", "costs": costs, "margin": gate.margin, "rate": gate.rate}
    return {"kind": "open"}


def gate_from_json(values: dict[str, Any]) -> Gate:
    kind = values["kind"]
    if kind == "open":
        return AlwaysOpen()
    if kind == "entropy":
        return EntropyGate(_number("threshold", values["threshold"]))
    if kind == "confidence":
        rate = None if values["rate"] is None else _number("rate", values["rate"])
        return ConfidenceGate(_costs(values["costs"]), _number("margin", values["margin"]), rate)
    raise ValueError(f"gate must be open, entropy or confidence, got {kind!r}")


def _costs(values: dict[str, Any]) -> dict[int, float]:
    """By size. Raises ValueError where there is none, or a cost is not more than 0."""
    costs = {check_integer("size", int(size), 1, MAX_NODES): _number("cost", cost) for size, cost in values.items()}
    if not costs or min(costs.values()) <= 0:
        raise ValueError(f"costs must be of at least one size, each > 0, got {costs}")
    return costs


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):  # of JSON: no texts, no true
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)
