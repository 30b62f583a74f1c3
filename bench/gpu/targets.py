"""What the kernels and the loop are to reach on an H100 or H200, and whether a session's numbers do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
MET, MISSED, UNKNOWN = "met", "missed", "not measured"


@dataclass(frozen=True)
class Target:
    """At least, or at most, `bound` in column `value` of each row of a stage that it applies to."""

    what: str
    asks: str
    stage: str
    applies: Callable[[Row], bool]
    rows: int  # that it applies to in a whole session
    value: str
    least: float | None = None
    most: float | None = None

    def outcome(self, row: Row) -> str:
        found = row.get(self.value)
        if found is None:
            return UNKNOWN
        enough = self.least is None or found >= self.least
        return MET if enough and (self.most is None or found <= self.most) else MISSED

    def overall(self, rows: list[Row]) -> str:
        """Over all rows of the stage: missed where one row misses it, met where all are there and meet it."""
        outcomes = [self.outcome(row) for row in rows if self.applies(row)]
        if MISSED in outcomes:
            return MISSED
        return MET if outcomes.count(MET) >= self.rows else UNKNOWN


def _kernel(op: str, model: str, **columns: Any) -> Callable[[Row], bool]:
    wanted = {"op": op, "model": model, "dtype": "bfloat16", **columns}
    return lambda row: all(row.get(name) == value for name, value in wanted.items())


def _attention(row: Row) -> bool:
    return _kernel("tree_attention", "8B", nodes=64)(row)


def _step(nodes: int) -> Callable[[Row], bool]:
    return lambda row: (row.get("model"), row.get("context"), row.get("nodes")) == ("8B", 2048, nodes)


def _way(start: str) -> Callable[[Row], bool]:
    return lambda row: row.get("has_targets", False) and row["way"].startswith(start)


BFLOAT16 = "bfloat16: "  # begins the name of a way in the stage "exactness"

TARGETS = (
    Target("head_stack at 8B", "≥ 90 % of a copy", "kernels", _kernel("head_stack", "8B", rows=1), 1,
           "share_of_copy", least=0.9),
    Target("draft_topk at 8B", "≥ 90 % of a copy", "kernels", _kernel("draft_topk", "8B", rows=1), 2,
           "share_of_copy", least=0.9),
    Target("head_stack at D = 576", "≤ 12 us", "kernels", _kernel("head_stack", "135M"), 1, "ours_us", most=12),
    Target("draft_topk at D = 576", "≤ 25 us", "kernels", _kernel("draft_topk", "135M"), 2, "ours_us", most=25),
    Target("tree_attention, 64 nodes, 32/8 heads of 128, from 8192 tokens", "≥ 80 % of a copy", "kernels",
           lambda row: _attention(row) and row["length"] >= 8192, 2, "share_of_copy", least=0.8),
    Target("tree_attention, 64 nodes, 32/8 heads of 128", "≥ 2x SDPA", "kernels", _attention, 4,
           "over_best_pytorch", least=2),
    Target("entropy, choose, verify and commit together", "≤ 25 us", "kernels", _kernel("after_forward", "8B"), 1,
           "ours_us", most=25),
    Target("8B at 2048 tokens, autoregressive step", "≥ 80 % of the weights' floor", "steps", _step(1), 1,
           "share_of_floor", least=0.8),
    Target("8B at 2048 tokens, step of 64 nodes with its heads", "≤ 1.15x the autoregressive one", "steps", _step(64),
           1, "over_autoregressive", most=1.15),
    Target("135M, our loop without drafts", "≥ 10x generate", "end_to_end", _way("loop, graphs"), 1,
           "over_generate", least=10),
    Target("135M, Cerberus, best tree", "≥ 1.8x our loop", "end_to_end", _way("best cerberus"), 1,
           "over_loop", least=1.8),
    Target("135M in float32", "the text of generate and of our loop", "exactness",
           lambda row: _way("")(row) and not _way(BFLOAT16)(row), 7, "texts_differ", most=0),
    Target("135M in bfloat16", "the text without drafts", "exactness", _way(BFLOAT16), 3,
           "texts_differ", most=0),
)  # fmt: skip


def of_row(stage: str, row: Row) -> list[tuple[Target, str]]:
    """The targets that a row is to meet, each with whether it does."""
    return [(target, target.outcome(row)) for target in TARGETS if target.stage == stage and target.applies(row)]
