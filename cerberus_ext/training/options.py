"""What `cerberus_ext.train` is asked to do."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..drafting.context_layer import check_has_anchor

SEGMENT = 8  # consecutive positions drawn together: they share teacher rows, 8 + K - 1 instead of 8 * K
DRAFT_VOCAB = 8192
PLACES = ("output", "data", "prompts", "cache", "cache_size", "init")  # where, not what
DATA_STAGE = ("tokens", "max_new_tokens", "rows")  # what the data is made with


@dataclass
class TrainOptions:
    """The options of one run. GB are 1e9 bytes.

    output       folder for the heads, and for what a killed run goes on from
    base_model   the model's name, for the record
    seed         of everything that is drawn

    What to train on: `data`, else answers that the model writes (training/self_distill.py).
    data         JSONL of {"p": prompt ids, "r": answer ids, "t": temperature (optional)}
    prompts      JSONL of questions (see `prompts.read_questions`) to answer; None: the model writes its own
    tokens       answer tokens to write; None: an answer to every question, or OWN_TOKENS without `prompts`
    max_new_tokens  longest answer
    rows         answers that are written at once

    The heads.
    heads, layers, anchor, chained, context_layer    see CerberusConfig
    draft_vocab  rows of the LM head to project to, those of the most frequent tokens; 0: all; None: DRAFT_VOCAB, or
                 all where there are no more
    init         trained heads to start from: a folder, a packaged name or a Hub id

    The training.
    steps        steps of AdamW
    batch        positions a step, of all processes together; a multiple of SEGMENT
    lr, warmup   highest learning rate, and steps until it is reached; then a cosine
    head_decay   head k counts head_decay ** (k - 1) in the loss
    clip         largest norm of the gradient
    held_out     share of the lines, the last ones, that only measure (at most held_out.MAX_LINES of them)
    eval_every   steps between measurements, each with a checkpoint
    patience     measurements without a better one after which to stop; 0: never
    memory       GB of hidden states in memory, of which batches are drawn
    cache        folder for hidden states; None: they are computed again where they do not fit into memory
    cache_size   most GB of hidden states in that folder; None: no bound
    """

    output: Path
    base_model: str = "unknown"
    seed: int = 0

    data: Path | None = None
    prompts: Path | None = None
    tokens: int | None = None
    max_new_tokens: int = 256
    rows: int = 32

    heads: int = 4
    layers: int = 2
    anchor: str = "root"
    chained: bool = True
    context_layer: bool = False
    draft_vocab: int | None = None
    init: str | None = None

    steps: int = 4000
    batch: int = 256
    lr: float = 5e-4
    warmup: int = 100
    head_decay: float = 0.8
    clip: float = 1.0
    held_out: float = 0.02
    eval_every: int = 250
    patience: int = 0
    memory: float = 4.0
    cache: Path | None = None
    cache_size: float | None = None

    def __post_init__(self) -> None:
        least = dict.fromkeys(("heads", "layers", "steps", "eval_every", "max_new_tokens", "rows"), 1)
        least |= {"tokens": 1} | dict.fromkeys(("draft_vocab", "warmup", "patience", "seed"), 0)
        for name, number in least.items():
            if getattr(self, name) is not None and getattr(self, name) < number:
                raise ValueError(f"train: {name} must be >= {number}, got {getattr(self, name)}")
        if self.batch < SEGMENT or self.batch % SEGMENT:
            raise ValueError(f"train: batch must be a positive multiple of {SEGMENT}, got {self.batch}")
        for name in ("lr", "clip", "head_decay", "memory"):
            _check_positive(name, getattr(self, name))
        if self.context_layer:
            check_has_anchor("train", self.anchor, self.chained)
        if not 0 < self.held_out < 1:
            raise ValueError(f"train: held_out must be between 0 and 1, got {self.held_out}")
        if self.cache_size is not None:
            if self.cache is None:
                raise ValueError("train: cache_size needs cache, the folder that it bounds")
            _check_positive("cache_size", self.cache_size)
        if self.data is not None:
            for name in ("prompts", "tokens"):
                if getattr(self, name) is not None:
                    raise ValueError(f"train: {name} must not be given together with data, whose answers are there")

    def numbers(self) -> dict[str, Any]:
        """The options that decide what comes out, for the record."""
        skipped = PLACES if self.data is None else PLACES + DATA_STAGE
        return {key: value for key, value in asdict(self).items() if key not in skipped}

    def training_numbers(self) -> dict[str, Any]:
        """Those that decide it once the data is there."""
        return {key: value for key, value in self.numbers().items() if key not in DATA_STAGE}


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"train: {name} must be > 0, got {value}")
    if value == math.inf:
        raise ValueError(f"train: {name} must be finite, got {value}")
