"""What heads are trained on: answers of the base model, and the hidden states that produced their tokens.

The hidden states are computed once and kept in a folder, one safetensors file per SHARD_LINES lines of the
data, so that an interrupted run goes on where it stopped and a second training run starts at once. Row j of a
line's states produced its answer token r[j]; the row j + k is therefore also the teacher of head k at
position j.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

from ..heads import fingerprint, output_matrix

SHARD_LINES = 256
FORWARD_TOKENS = 2048  # tokens, padding included, in one forward: enough rows for GEMMs to run at full speed
CACHE_FILE = "cache.json"


@dataclass
class Answer:
    """A line of the data: token ids of prompt and answer, and the temperature it was sampled at."""

    prompt: list[int]
    answer: list[int]
    temperature: float | None


@dataclass
class TrainingData:
    """Every position of every answer, in the order of the file.

    hidden (T, D) bfloat16; tokens (T,) int64: the token that each state produced; left (T,) int64: how many
    tokens of the same answer follow it; lines (T,) int64: the line it comes from; greedy: of each line,
    whether it is known to have been sampled at temperature 0; sha256: of the file.
    """

    hidden: Tensor
    tokens: Tensor
    left: Tensor
    lines: Tensor
    greedy: list[bool]
    sha256: str


def read_answers(path: Path, vocab_size: int) -> list[Answer]:
    """Reads JSONL of {"p": [ids], "r": [ids], "t": temperature (optional)}; names the line that is wrong."""
    answers = []
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            where = f"train: {path.name} line {number}"
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: must be JSON, got {text.strip()[:40]!r} ({error})") from None
            if not isinstance(line, dict):
                raise ValueError(f"{where}: must be an object, got {type(line).__name__}")
            for key in ("p", "r"):
                ids = line.get(key)
                if not isinstance(ids, list) or not ids:
                    raise ValueError(f'{where}: "{key}" must be a list of at least one token id, got {ids!r}')
                for token in ids:
                    if type(token) is not int or not 0 <= token < vocab_size:
                        raise ValueError(
                            f'{where}: "{key}" must hold ids in 0..{vocab_size - 1}, got {token!r}'
                        )
            answers.append(Answer(line["p"], line["r"], line.get("t")))
    if not answers:
        raise ValueError(f"train: {path.name} must have at least one line, got none")
    return answers


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_training_data(model: nn.Module, path: Path, cache: Path) -> TrainingData:
    """Reads `path` and its hidden states from the folder `cache`, computing first what is missing there."""
    vocab_size, size = output_matrix(model).shape
    answers = read_answers(path, vocab_size)
    shards = [answers[start : start + SHARD_LINES] for start in range(0, len(answers), SHARD_LINES)]
    files = [cache / f"hidden-{number:05d}.safetensors" for number in range(len(shards))]
    cache.mkdir(parents=True, exist_ok=True)
    check_cache(model, path, cache, shards, files)

    missing = [(shard, file) for shard, file in zip(shards, files, strict=True) if not file.exists()]
    if missing:
        total = sum(len(line.answer) for shard, _ in missing for line in shard)
        with tqdm(total=total, desc="hidden states", unit="tok", unit_scale=True) as bar:
            for shard, file in missing:
                states = []
                for rows in hidden_states(model, shard):
                    states.append(rows)
                    bar.update(len(rows))
                write_shard(file, torch.cat(states))

    counts = torch.tensor([len(line.answer) for line in answers])
    hidden = torch.empty(int(counts.sum()), size, dtype=torch.bfloat16)
    start = 0
    for shard, file in zip(shards, files, strict=True):
        rows = load_file(file)["hidden"]
        expected = (sum(len(line.answer) for line in shard), size)
        if tuple(rows.shape) != expected:
            raise ValueError(f"train: hidden in {file.name} must be {expected}, got {tuple(rows.shape)}")
        hidden[start : start + len(rows)] = rows
        start += len(rows)
    tokens = torch.tensor([token for line in answers for token in line.answer])
    lines = torch.repeat_interleave(torch.arange(len(answers)), counts)
    left = torch.cumsum(counts, 0)[lines] - 1 - torch.arange(len(tokens))
    greedy = [line.temperature == 0 for line in answers]
    return TrainingData(hidden, tokens, left, lines, greedy, file_sha256(path))


@torch.inference_mode()
def hidden_states(model: nn.Module, shard: list[Answer]) -> Iterator[Tensor]:
    """The states (len(answer), D) of every line of a shard, in order; like lengths share a forward."""
    device = output_matrix(model).device
    results: list[Tensor | None] = [None] * len(shard)
    ready = 0
    for batch in batches_by_length(shard):
        width = max(len(shard[index].prompt) + len(shard[index].answer) for index in batch) - 1
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, index in enumerate(batch):
            text = (shard[index].prompt + shard[index].answer)[:-1]
            ids[row, : len(text)] = torch.tensor(text)
        # Padding stands on the right of a causal model, so nothing sees it and no mask is needed.
        states = model.base_model(ids.to(device), use_cache=False).last_hidden_state  # type: ignore[operator]
        for row, index in enumerate(batch):
            first = len(shard[index].prompt) - 1
            rows = states[row, first : first + len(shard[index].answer)]
            results[index] = rows.to("cpu", torch.bfloat16, copy=True)
        while ready < len(shard) and (rows := results[ready]) is not None:
            yield rows
            ready += 1


def batches_by_length(shard: list[Answer]) -> Iterator[list[int]]:
    """Indices of lines in groups which, padded to the longest line, have up to FORWARD_TOKENS tokens."""
    lengths = [len(line.prompt) + len(line.answer) - 1 for line in shard]
    batch: list[int] = []
    for index in sorted(range(len(shard)), key=lengths.__getitem__):
        if batch and lengths[index] * (len(batch) + 1) > FORWARD_TOKENS:
            yield batch
            batch = []
        batch.append(index)
    yield batch


def write_shard(file: Path, hidden: Tensor) -> None:
    partial = file.with_suffix(".partial")
    save_file({"hidden": hidden}, partial)
    partial.replace(file)  # a killed run leaves no half-written shard under the final name


def check_cache(
    model: nn.Module, path: Path, cache: Path, shards: list[list[Answer]], files: list[Path]
) -> None:
    """Refuses a cache of other data or of another model; writes cache.json into a new one.

    Shards without a cache.json are believed only after the shortest line of each was computed again and came
    out the same.
    """
    identity = {
        "data_sha256": file_sha256(path),
        "model_fingerprint": fingerprint(model.parameters(), rows=16),
        "model_dtype": str(output_matrix(model).dtype).removeprefix("torch."),
        "stored_dtype": "bfloat16",
        "shard_lines": SHARD_LINES,
    }
    record = cache / CACHE_FILE
    if record.exists():
        found = json.loads(record.read_text())
        for key, expected in identity.items():
            if found.get(key) != expected:
                raise ValueError(
                    f"train: {key} of the cached hidden states must be {expected}, got {found.get(key)};"
                    f" empty {cache} or name another folder"
                )
        return
    for shard, file in zip(shards, files, strict=True):
        if file.exists() and not spot_check(model, shard, file):
            raise ValueError(
                f"train: {file.name} has no {CACHE_FILE} and does not hold this model's states of this data"
            )
    record.write_text(json.dumps(identity, indent=1) + "\n")


def spot_check(model: nn.Module, shard: list[Answer], file: Path) -> bool:
    shortest = min(range(len(shard)), key=lambda index: len(shard[index].prompt) + len(shard[index].answer))
    start = sum(len(line.answer) for line in shard[:shortest])
    count = len(shard[shortest].answer)
    with safe_open(file, "pt") as tensors:
        stored = tensors.get_slice("hidden")
        if stored.get_shape()[0] != sum(len(line.answer) for line in shard):
            return False
        rows = stored[start : start + count].float()
    fresh = next(hidden_states(model, [shard[shortest]])).float()
    # Both were rounded to bfloat16, by up to 2^-8, from float32 sums taken in different orders.
    return bool((rows - fresh).norm() <= 0.02 * fresh.norm())
