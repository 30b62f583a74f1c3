"""A test that takes `device` runs on the CPU, and once more on CUDA where there is a GPU and _cuda.so."""

import pytest
import torch

from cerberus_ext.ops import libraries

DEVICES = ["cpu"]
if torch.cuda.is_available() and all(library.loaded for library in libraries.load_libraries()):
    DEVICES.append("cuda")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param
