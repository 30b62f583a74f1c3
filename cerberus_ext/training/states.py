"""Hidden states of the answers, chunk by chunk: from a folder, or by a forward in this process or in another one.

The folder has one safetensors file per chunk, so that they are computed only once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from ..drafting.heads import fingerprint, output_matrix
from ..io.files import read_object, write_json, write_tensors
from .hidden import hidden_states
from .output import check_same
from .positions import Chunk, Corpus, Positions
from .processes import Processes

RECORD = "cache.json"
STORED_BYTES = 2  # bfloat16


class StateSource:
    """Hidden states of a corpus. computed, seconds: rows that were computed so far, and how long it took.

    folder: where they are kept, None: nowhere. limit: most bytes of it, None: no bound. The first chunks that fit are
    kept (`allowed` is their number), so nothing is ever removed to make room for something else. Files that an earlier
    run with a higher limit left are read all the same.
    Raises ValueError where the folder is not one of this model's states of this corpus.
    """

    def __init__(
        self, model: nn.Module, corpus: Corpus, processes: Processes, folder: Path | None, limit: float | None
    ) -> None:
        self.model, self.corpus, self.processes, self.folder = model, corpus, processes, folder
        self.size = output_matrix(model).shape[1]
        self.computed, self.seconds, self.allowed = 0, 0.0, 0
        if folder is not None:
            ends = accumulate(chunk.rows * self.size * STORED_BYTES for chunk in corpus.training + corpus.held)
            self.allowed = sum(limit is None or end <= limit for end in ends)
            processes.from_main(lambda: self._begin(folder))

    def together(self, chunks: list[Chunk]) -> Positions:
        """Their positions, in every process: each computes a share of the chunks for all. Collective."""
        return self.corpus.positions(chunks, self._shared(chunks))

    def missing(self, chunks: list[Chunk]) -> int:
        """Rows in those of the chunks that have to be computed."""
        return sum(chunk.rows for chunk in chunks if (file := self._file(chunk)) is None or not file.exists())

    def _shared(self, chunks: list[Chunk]) -> Iterator[Tensor]:
        count, index = self.processes.count, self.processes.index
        missing = self.missing(chunks[index::count])
        with tqdm(
            total=missing, desc="hidden states", unit="tok", unit_scale=True, leave=False,
            disable=not (missing and self.processes.main),
        ) as bar:  # fmt: skip
            for start in range(0, len(chunks), count):
                group = chunks[start : start + count]
                mine = self._own(group[index], bar) if index < len(group) else torch.empty(0)
                for source, chunk in enumerate(group):
                    states = mine if source == index else torch.empty(chunk.rows, self.size, dtype=torch.bfloat16)
                    self.processes.broadcast(states, source)
                    file = self._file(chunk)
                    if file and self.processes.main and chunk.number < self.allowed and not file.exists():
                        write_tensors(file, {"hidden": states})
                    yield states

    def _own(self, chunk: Chunk, bar: tqdm) -> Tensor:
        """The chunk's states (rows, D) bfloat16, from the folder, else computed."""
        file = self._file(chunk)
        if file is not None and file.exists():
            try:
                states = load_file(file)["hidden"]
            except (SafetensorError, KeyError) as error:
                raise ValueError(f"train: cache: {file} is damaged ({error}); remove it to compute it again") from None
            expected, got = (chunk.rows, self.size), tuple(states.shape)
            if got != expected:
                raise ValueError(f"train: hidden in {file.name} must be {expected}, got {got}")
            return states
        started, lines = time.perf_counter(), self.corpus.lines[chunk.first : chunk.end]
        states = hidden_states(self.model, lines, self.corpus.prompts, bar.update)
        self.computed += chunk.rows
        self.seconds += time.perf_counter() - started
        return states

    def _file(self, chunk: Chunk) -> Path | None:
        return self.folder and self.folder / f"hidden-{chunk.number:05d}.safetensors"

    def _begin(self, folder: Path) -> None:
        """Makes the folder, or checks what is in it."""
        folder.mkdir(parents=True, exist_ok=True)
        identity: dict[str, Any] = {
            "data_sha256": self.corpus.answers.sha256,
            "model_fingerprint": fingerprint(self.model.parameters(), rows=16),
            "model_dtype": str(output_matrix(self.model).dtype).removeprefix("torch."),
            "chunk_lines": self.corpus.chunk_lines,
            "held_out_lines": len(self.corpus.lines) - self.corpus.first_held,
            "prompts": self.corpus.prompts,
        }
        record = folder / RECORD
        if not record.exists() and not any(folder.glob("hidden-*")):
            return write_json(record, identity)
        recorded = read_object(record) or {}
        if "chunk_lines" not in recorded:
            raise ValueError(f"train: cache: {record} is not of cached hidden states; choose another folder")
        check_same(recorded, identity, f"use the hidden states in {folder}", "empty it or name another folder")
