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
from .positions import Corpus

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
        ends = accumulate(chunk.rows * size * STORED_BYTES for chunk in corpus.chunks)
        self.allowed = sum(limit is None or end <= limit for end in ends)

    def file(self, number: int) -> Path:
        return self.folder / f"hidden-{number:05d}.safetensors"

    def load(self, number: int) -> Tensor | None:
        """The states (rows, D) bfloat16 of a chunk, or None where they are not there."""
        file = self.file(number)
        if not file.exists():
            return None
        try:
            states = load_file(file)["hidden"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"train: cache: {file} is damaged ({error}); remove it to compute it again") from None
        expected = (self.corpus.chunks[number].rows, self.size)
        if tuple(states.shape) != expected:
            raise ValueError(f"train: hidden in {file.name} must be {expected}, got {tuple(states.shape)}")
        return states

    def store(self, number: int, states: Tensor) -> None:
        """Keeps the states of a chunk, unless they are there already or beyond the limit."""
        if number < self.allowed and not self.file(number).exists():
            write_tensors(self.file(number), {"hidden": states})

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
            "prompts": self.corpus.prompts,
        }
        record = self.folder / RECORD
        if not record.exists() and not self.file(0).exists():
            write_json(record, identity)
            return
        found = read_object(record) or {}
        if "chunk_lines" not in found:
            raise ValueError(f"train: cache: {record} is not of cached hidden states; choose another folder")
        for key, expected in identity.items():
            if found.get(key) != expected:
                raise ValueError(
                    f"train: {key} of the cached hidden states must be {expected}, got {found.get(key)};"
                    f" empty {self.folder} or name another folder"
                )
