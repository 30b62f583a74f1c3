"""A tiny model that can be learned, its answers, and options for runs of a second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_llama import VOCAB, make_llama
from transformers import LlamaForCausalLM

from cerberus_ext.training import train


@pytest.fixture(scope="session")
def llama() -> LlamaForCausalLM:
    """A model whose next token depends mostly on the current one, so that there is something to learn."""
    model = make_llama().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.03)
        layer.mlp.down_proj.weight.mul_(0.03)
    return model


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second each. `test_curves` and the runs of the command draw them."""
    monkeypatch.setattr(train, "draw_curves", lambda curve, file: file.write_bytes(b""))


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory, llama: LlamaForCausalLM) -> Path:
    """40 greedy answers of the tiny llama, of 6 to 45 tokens."""
    file = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    draw = torch.Generator().manual_seed(0)
    lines = []
    for number in range(40):
        prompt = torch.randint(VOCAB, (1, 3 + number % 4), generator=draw)
        ids = llama.generate(prompt, do_sample=False, max_new_tokens=6 + number)[0].tolist()
        lines.append({"p": ids[: prompt.shape[1]], "r": ids[prompt.shape[1] :], "t": 0})
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return file
