"""Hidden states in a folder, one safetensors file per chunk of lines, so that they are computed only once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..drafting.heads import fingerprint, output_matrix
from ..io.files import write_json, write_tensors
from .answers import Answers
from .hidden import hidden_states
from .positions import CHUNK_LINES, Piece, pieces, stored_rows

RECORD = "cache.json"
STORED_BYTES = 2  # bfloat16


class HiddenCache:
    """The folder of one model's states of one set of answers.

    size: D of the model. prompts: whether the tokens of the prompts have states, too. limit: most bytes of the folder,
    None: no bound. The first chunks that fit are kept, so nothing is ever removed to make room for something else.
    Files that an earlier run with a higher limit left are read all the same.
    """

    def __init__(self, folder: Path, limit: float | None, size: int, answers: Answers, prompts: bool = False) -> None:
        self.folder, self.answers, self.size, self.prompts = folder, answers, size, prompts
        self.chunks = pieces(answers.lines, 0, len(answers.lines), prompts)
        self.allowed = len(self.chunks)
        if limit is not None:
            ends = [sum(chunk.rows for chunk in self.chunks[: n + 1]) for n in range(len(self.chunks))]
            self.allowed = sum(rows * self.size * STORED_BYTES <= limit for rows in ends)

    def file(self, number: int) -> Path:
        return self.folder / f"hidden-{number:05d}.safetensors"

    def load(self, number: int) -> Tensor | None:
        """The states (rows, D) bfloat16 of a chunk, or None where they are not there."""
        file = self.file(number)
        if not file.exists():
            return None
        states = self.read(file)
        expected = (self.chunks[number].rows, self.size)
        if tuple(states.shape) != expected:
            raise ValueError(f"train: hidden in {file.name} must be {expected}, got {tuple(states.shape)}")
        return states

    def read(self, file: Path) -> Tensor:
        try:
            return load_file(file)["hidden"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"train: cache: {file} is damaged ({error}); remove it, and it is made again") from None

    def store(self, number: int, states: Tensor) -> None:
        """Keeps the states of a chunk, unless they are there already or beyond the limit."""
        if number < self.allowed and not self.file(number).exists():
            write_tensors(self.file(number), {"hidden": states})

    def check(self, model: nn.Module) -> None:
        """Makes the folder, or checks that it is one of this model's states of these answers. To be called first.

        Files without a record are believed only after the shortest line of each was computed again and came out
        the same. Raises ValueError where the folder holds something else.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        identity: dict[str, Any] = {
            "data_sha256": self.answers.sha256,
            "model_fingerprint": fingerprint(model.parameters(), rows=16),
            "model_dtype": str(output_matrix(model).dtype).removeprefix("torch."),
            "stored_dtype": "bfloat16",
            "shard_lines": CHUNK_LINES,
        }
        if self.prompts:
            identity["prompts"] = True
        record = self.folder / RECORD
        if record.exists():
            try:
                found: Any = json.loads(record.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"train: cache: {record} must be JSON ({error}); choose another folder") from None
            if not isinstance(found, dict) or "shard_lines" not in found:
                raise ValueError(f"train: cache: {record} is not of cached hidden states; choose another folder")
            for key, expected in {"prompts": None, **identity}.items():
                got = found.get(key)
                if got != expected:
                    raise ValueError(
                        f"train: {key} of the cached hidden states must be {expected}, got {got};"
                        f" empty {self.folder} or name another folder"
                    )
            return
        for chunk in self.chunks:
            file = self.file(chunk.chunk)
            if file.exists() and not self.spot_check(model, chunk):
                raise ValueError(
                    f"train: {file.name} has no {RECORD} and does not hold this model's states of this data"
                )
        write_json(record, identity)

    def spot_check(self, model: nn.Module, chunk: Piece) -> bool:
        lines = self.answers.lines[chunk.first : chunk.end]
        shortest = min(range(len(lines)), key=lambda index: len(lines[index]))
        start, count = (stored_rows(part, self.prompts) for part in (lines[:shortest], [lines[shortest]]))
        with safe_open(self.file(chunk.chunk), "pt") as tensors:
            stored = tensors.get_slice("hidden")
            if tuple(stored.get_shape()) != (chunk.rows, self.size):
                return False
            rows = stored[start : start + count].float()
        fresh = next(hidden_states(model, [lines[shortest]], self.prompts)).float()
        # Both were rounded to bfloat16, by up to 2^-8, from float32 sums taken in different orders.
        return bool((rows - fresh).norm() <= 0.02 * fresh.norm())
