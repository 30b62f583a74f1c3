from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def nothing_of_the_user(own_cache: Path) -> None: ...
