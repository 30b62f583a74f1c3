"""Hidden states in a folder, one safetensors file per chunk of lines, so that they are computed only once."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..drafting.heads import fingerprint, output_matrix
from ..io.files import read_object, write_json, write_tensors
from .output import check_same
from .positions import Chunk, Corpus

RECORD = "cache.json"
STORED_BYTES = 2  # bfloat16


class HiddenCache:
    """The folder of one model's states of one corpus.

    size: D of the model. limit: most bytes of the folder, None: no bound. The first chunks that fit are kept (`allowed`
    is their number), so nothing is ever removed to make room for something else. Files that an earlier run with a
    higher limit left are read all the same.
    """

    def __init__(self, folder: Path, limit: float | None, size: int, corpus: Corpus) -> None:
        self.folder, self.size, self.corpus = folder, size, corpus
        ends = accumulate(chunk.rows * size * STORED_BYTES for chunk in corpus.training + corpus.held)
        self.allowed = sum(limit is None or end <= limit for end in ends)

    def file(self, chunk: Chunk) -> Path:
        return self.folder / f"hidden-{chunk.number:05d}.safetensors"

    def load(self, chunk: Chunk) -> Tensor | None:
        """Its states (rows, D) bfloat16, or None where they are not there."""
        file = self.file(chunk)
        if not file.exists():
            return None
        try:
            states = load_file(file)["hidden"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"train: cache: {file} is damaged ({error}); remove it to compute it again") from None
        expected = (chunk.rows, self.size)
        if tuple(states.shape) != expected:
            raise ValueError(f"train: hidden in {file.name} must be {expected}, got {tuple(states.shape)}")
        return states

    def store(self, chunk: Chunk, states: Tensor) -> None:
        """Keeps its states, unless they are there already or beyond the limit."""
        if chunk.number < self.allowed and not self.file(chunk).exists():
            write_tensors(self.file(chunk), {"hidden": states})

    def check(self, model: nn.Module) -> None:
        """Makes the folder, or checks that it is one of this model's states of these answers. To be called first.

        Raises ValueError where the folder holds something else.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        identity: dict[str, Any] = {
            "data_sha256": self.corpus.answers.sha256,
            "model_fingerprint": fingerprint(model.parameters(), rows=16),
            "model_dtype": str(output_matrix(model).dtype).removeprefix("torch."),
            "chunk_lines": self.corpus.chunk_lines,
            "held_out_lines": len(self.corpus.lines) - self.corpus.first_held,
            "prompts": self.corpus.prompts,
        }
        record = self.folder / RECORD
        if not record.exists() and not any(self.folder.glob("hidden-*")):
            write_json(record, identity)
            return
        recorded = read_object(record) or {}
        if "chunk_lines" not in recorded:
            raise ValueError(f"train: cache: {record} is not of cached hidden states; choose another folder")
        remedy = "empty it or name another folder"
        check_same(recorded, identity, f"use the hidden states in {self.folder}", remedy)
