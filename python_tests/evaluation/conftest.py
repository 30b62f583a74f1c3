from __future__ import annotations

from pathlib import Path

import pytest
from tiny_chat import save_heads, save_model, save_questions


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With model, draft (a model), heads, medusa and questions.jsonl. Tests leave it as it is."""
    root = tmp_path_factory.mktemp("bench")
    save_model(root / "model")
    save_model(root / "draft", seed=5)
    save_heads(root / "heads")
    save_heads(root / "medusa", chained=False)
    save_questions(root / "questions.jsonl")
    return root


@pytest.fixture(autouse=True)
def nothing_of_the_user(own_cache: Path) -> None: ...
