"""The CUDA kernels under emulation, built once for the test run."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import pytest
from simt_library import Emulation, build, missing_tools


@pytest.fixture(scope="session")
def built() -> None:
    """Skips where nothing can be built; CERBERUS_SIMT=required makes that an error."""
    if missing := missing_tools():
        if os.environ.get("CERBERUS_SIMT") == "required":
            pytest.fail(f"the emulated kernels cannot be built without {missing}")
        pytest.skip(f"the emulated kernels cannot be built without {missing}")


@pytest.fixture(scope="session")
def emulation(built: None) -> Emulation:
    return Emulation(build("_simt.so") / "_simt.so")


@pytest.fixture
def simt(emulation: Emulation, request: pytest.FixtureRequest) -> Iterator[Emulation]:
    """Every test has a schedule of its own, the same at every run."""
    emulation.seed(zlib.crc32(request.node.nodeid.encode()))
    yield emulation
    emulation.device()
