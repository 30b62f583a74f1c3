"""The proposer in vLLM, where there is one: in the Python that $CERBERUS_VLLM names, or in the one that runs this."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_chat import WORDS, save_model
from transformers import LlamaConfig, LlamaForCausalLM

import cerberus_ext

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("CERBERUS_VLLM", sys.executable)


def has_vllm() -> bool:
    command = [PYTHON, "-c", "from importlib.util import find_spec as f; import sys; sys.exit(f('vllm') is None)"]
    return subprocess.run(command, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not has_vllm(), reason="no vLLM in $CERBERUS_VLLM")
@pytest.mark.parametrize("context", [256, 64], ids=["room", "texts that reach the longest length"])
def test_vllm_gives_the_same_texts(tmp_path: Path, context: int) -> None:
    """Greedily, in float32, several at once."""
    package = tmp_path / "package"  # without what is installed beside it
    package.mkdir()
    (package / "cerberus_ext").symlink_to(Path(cerberus_ext.__file__).parent)
    environment = {**os.environ, "PYTHONPATH": str(package)}
    save_model(tmp_path / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=len(WORDS), num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.3, **sizes
    )  # vLLM's attention wants heads of 32
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    questions = tmp_path / "questions.jsonl"
    words = [" ".join(f"w{(number * step) % 60}" for step in range(1, 20)) for number in range(1, 12)]
    questions.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in words))
    out = tmp_path / "out.jsonl"
    for way in ("none", "cerberus"):
        command = [PYTHON, ROOT / "bench" / "in_vllm.py", "--way", way, "--model", tmp_path / "model"]
        command += ["--questions", questions, "--out", out, "--dtype", "float32", "--concurrency", "4", "11"]
        command += ["--tokens", "200", "--context", str(context)]
        done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    texts = {way: [row["texts"] for row in rows if row["way"] == way] for way in ("none", "cerberus")}
    assert texts["cerberus"] == texts["none"] and sum(map(len, texts["none"])) == 22
    ours = [row for row in rows if row["way"] == "cerberus"]
    # A random model hardly repeats itself, and a step of so small a one costs the same with drafts: many are tried.
    assert sum(row["drafted"] for row in ours) > 100 and sum(row["accepted"] for row in ours) > 10
