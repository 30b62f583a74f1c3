"""What `evaluate` is asked to do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any


def option(default: Any, text: str, minimum: int | None = None) -> Any:
    """A field that `cerberus bench` has an option for, with this help. minimum: of its value, unless that is None."""
    return field(default=default, metadata={"help": text, "minimum": minimum})


@dataclass(frozen=True)
class BenchOptions:
    """The options of a run: those that have a help text, and these, which `cerberus bench` reads from text.

    turns      which turns of the questions, counted from 1; a later one follows the model's own answers
    ways       names of those to run; None: all that there is everything for. The autoregressive way always runs
    way_files  files with more ways, FILE.py or FILE.py:ARGUMENT, see evaluation/ways.py; they are run here

    Raises ValueError, naming the option, on values that no run can have.
    """

    turns: tuple[int, ...] = (1, 2)
    new_tokens: int = option(256, "Longest answer, in tokens.", 1)
    rounds: int = option(1, "How often everything is run; of each text the round with the median time counts.", 1)
    ways: tuple[str, ...] | None = None
    way_files: tuple[str, ...] = ()
    tree_size: int | None = option(None, "Nodes of all trees but the calibrated way's. Default: the calibrated.", 2)
    entropy_threshold: float | None = option(
        None, "Of the entropy gate, in nats. Default: the calibrated, or the median over the first answers."
    )
    seed: int = option(0, "Of the bootstrap intervals.", 0)
    more_ways: tuple[Any, ...] = field(init=False, repr=False, compare=False)  # of way_files: Context -> list[Way]

    def __post_init__(self) -> None:
        for each in fields(self):
            least = each.metadata.get("minimum")
            if least is not None and (value := getattr(self, each.name)) is not None and value < least:
                raise ValueError(f"bench: {each.name} must be >= {least}, got {value}")
        threshold = self.entropy_threshold
        if threshold is not None and math.isnan(threshold):
            raise ValueError("bench: entropy_threshold must be a number, got nan")
        if not self.turns or min(self.turns) < 1 or sorted(set(self.turns)) != list(self.turns):
            raise ValueError(f"bench: turns must be ascending numbers >= 1, got {self.turns}")
        from .ways import ways_of_file  # it imports transformers, which takes seconds

        object.__setattr__(self, "more_ways", tuple(map(ways_of_file, self.way_files)))
