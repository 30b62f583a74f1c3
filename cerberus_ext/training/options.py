"""What `cerberus_ext.train` is asked to do."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..drafting.context_layer import check_has_anchor
from ..io.checks import check_integer

SEGMENT = 8  # consecutive positions drawn together: they share teacher rows, 8 + K - 1 instead of 8 * K
DRAFT_VOCAB = 8192
PLACES = ("output", "data", "prompts", "export_dataset", "cache", "cache_size", "init")  # where, not what
DATA_STAGE = ("tokens", "max_new_tokens", "rows")  # what the data is made with
CONDITIONAL = "conditional"  # what `only` may be
# Of all, and of conditional drafts alone.
USUAL = {"steps": (4000, 1600), "batch": (256, 768), "lr": (5e-4, 2e-3), "warmup": (100, 50)}


def option(default: Any, text: str, minimum: int | None = None) -> Any:
    """A field that `cerberus train` has an option for, with this help. minimum: of its value, unless that is None."""
    return field(default=default, metadata={"help": text, "minimum": minimum})


@dataclass
class TrainOptions:
    """The options of one run: those of `cerberus train --help`, and these, which it does not have. GB are 1e9 bytes.

    base_model   the model's name, for the record
    head_decay   head k counts head_decay ** (k - 1) in the loss
    clip         largest norm of the gradient

    Raises ValueError or TypeError, naming the option, on values that no run can have.
    """

    output: Path = field(metadata={"help": "Folder for the heads and their record; a killed run goes on from it."})
    prompts: Path | None = option(
        None, "JSONL of questions to answer, as MT-Bench's or {\"prompt\": ...}. Default: the model's own."
    )
    data: Path | None = option(
        None, 'JSONL of token ids, {"p": prompt, "r": the model\'s answer}, to train on instead.'
    )
    tokens: int | None = option(None, "Answer tokens to write. Default: 1000000, or an answer to every question.", 1)
    export_dataset: Path | None = option(
        None, "JSONL to write the answers to, as rows of input_ids and loss_mask, before the training; a new file."
    )
    max_new_tokens: int = option(256, "Longest answer.", 1)
    rows: int = option(32, "Answers written at once; several hundred on a GPU.", 1)

    heads: int = option(4, "K: tokens drafted after the pending one.", 1)
    layers: int = option(2, "L: layers of every head.", 1)
    anchor: str = option("root", "What starts the chain: root or hidden.")
    chained: bool = option(True, "--no-chained gives Medusa's heads.")
    context_layer: bool = option(False, "A transformer layer over the text so far, in front of the heads.")
    draft_vocab: int | None = option(
        None, f"Most frequent tokens that heads can draft; 0: all. Default: {DRAFT_VOCAB}, or all.", 0
    )
    conditional_rank: int | None = option(
        None, "Conditional drafts of this rank: heads 2 to K learn to know the token before. Usual: 64.", 1
    )
    init: str | None = option(None, "Trained heads to start from: a folder, a packaged name or a Hub id.")
    only: str | None = option(None, "conditional: trains the conditional drafts alone, for the heads of --init.")

    steps: int = option(None, "Steps of AdamW. Default: 4000; with --only 1600.", 1)
    batch: int = option(
        None, f"Positions per step, of all processes; a multiple of {SEGMENT}. Default: 256; with --only 768.", 1
    )
    lr: float = option(None, "Highest learning rate; then a cosine. Default: 5e-4; with --only 2e-3.")
    warmup: int = option(None, "Steps until the highest learning rate is reached. Default: 100; with --only 50.", 0)
    head_decay: float = 0.8
    clip: float = 1.0
    held_out: float = option(0.02, "Share of the answers, the last ones, that only measure.")
    eval_every: int = option(250, "Steps between measurements and checkpoints.", 1)
    patience: int = option(0, "Stop after so many measurements without more tokens per step; 0: never.", 0)
    memory: float = option(4.0, "GB of hidden states in memory.")
    cache: Path | None = option(None, "Folder to keep hidden states in. Default: they are computed when needed.")
    cache_size: float | None = option(None, "Most GB of hidden states in --cache. Default: no limit.")
    seed: int = option(0, "Of everything that is drawn.", 0)
    base_model: str = "unknown"

    def __post_init__(self) -> None:
        self._check_only()
        for name, values in USUAL.items():
            if getattr(self, name) is None:
                setattr(self, name, values[self.only is not None])
        for each in fields(self):
            value, minimum = getattr(self, each.name), each.metadata.get("minimum")
            if minimum is not None and value is not None:
                check_integer(f"train: {each.name}", value, minimum)
        if self.batch % SEGMENT:
            raise ValueError(f"train: batch must be a positive multiple of {SEGMENT}, got {self.batch}")
        if self.cache_size is not None and self.cache is None:
            raise ValueError("train: cache_size needs cache, the folder that it bounds")
        for name in ("lr", "clip", "head_decay", "memory", "cache_size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"train: {name} must be {'finite' if value == math.inf else '> 0'}, got {value}")
        if self.context_layer:
            check_has_anchor("train", self.anchor, self.chained)
        if not 0 < self.held_out < 1:
            raise ValueError(f"train: held_out must be between 0 and 1, got {self.held_out}")
        for name in ("prompts", "tokens"):
            if self.data is not None and getattr(self, name) is not None:
                raise ValueError(f"train: {name} must not be given together with data, whose answers are there")

    def _check_only(self) -> None:
        if self.only is None:
            return
        if self.only != CONDITIONAL:
            raise ValueError(f"train: only must be {CONDITIONAL} or None, got {self.only!r}")
        for name in ("init", "conditional_rank"):
            if getattr(self, name) is None:
                raise ValueError(f"train: only needs {name}")

    def numbers(self) -> dict[str, Any]:
        """The options that decide what comes out, for the record."""
        skipped = PLACES if self.data is None else PLACES + DATA_STAGE
        return {key: value for key, value in asdict(self).items() if key not in skipped}

    def training_numbers(self) -> dict[str, Any]:
        """Those that decide it once the data is there."""
        return {key: value for key, value in self.numbers().items() if key not in DATA_STAGE}
