from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny_chat import SIZE, WORDS, save_heads, save_model, save_questions

from cerberus_ext import CerberusConfig

BENCH = Path(__file__).resolve().parent.parent.parent / "bench"
sys.path.insert(0, str(BENCH))  # benchmarks are scripts, and import each other as such

from hydra import HydraHeads  # noqa: E402


def random_hydra(size: int = SIZE, vocab: int = len(WORDS), draft_vocab: int | None = None) -> HydraHeads:
    torch.manual_seed(3)
    heads = HydraHeads(CerberusConfig("tiny", size, vocab, num_heads=3, num_layers=2, draft_vocab=draft_vocab))
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=0.1)
    return heads.requires_grad_(False)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With model, draft (a model), heads, medusa, hydra and questions.jsonl. Tests leave it as it is."""
    root = tmp_path_factory.mktemp("bench")
    save_model(root / "model")
    save_model(root / "draft", seed=5)
    save_heads(root / "heads")
    save_heads(root / "medusa", chained=False)
    random_hydra().save(root / "hydra")
    save_questions(root / "questions.jsonl")
    return root


@pytest.fixture(autouse=True)
def nothing_of_the_user(own_cache: Path) -> None: ...


@pytest.fixture
def hydra_heads() -> HydraHeads:
    return random_hydra()
