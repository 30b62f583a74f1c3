from __future__ import annotations

import copy
from typing import Any

import pytest
from serving_runs import tiny


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model to be served, its tokenizer, and the same model to be asked meanwhile."""
    model, tokenizer = tiny(tmp_path_factory.mktemp("serving"))
    return model, tokenizer, copy.deepcopy(model)
