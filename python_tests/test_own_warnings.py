"""Warnings about code of ours are errors in every test: in this one, too."""

from __future__ import annotations

import warnings
from typing import Any

import own_warnings
import pytest
import torch
from renamed import Renamed
from torch import nn

LIBRARY = """
import warnings

def deprecated(category):
    warnings.warn("gone tomorrow", category, stacklevel=2)

def noisy(category):
    warnings.warn("gone tomorrow", category)

def calls_deprecated(category):
    deprecated(category)
"""


@pytest.fixture
def library() -> dict[str, Any]:
    """Functions of a package that is not ours."""
    functions: dict[str, Any] = {}
    exec(compile(LIBRARY, "/site-packages/library.py", "exec"), functions)
    return functions


@pytest.mark.parametrize("category", [FutureWarning, DeprecationWarning, PendingDeprecationWarning])
@pytest.mark.parametrize("function", ["deprecated", "noisy"])
def test_our_call_raises(library: dict[str, Any], function: str, category: type[Warning]) -> None:
    for _ in range(2):  # not only where it is new
        with pytest.raises(category, match="gone tomorrow"):
            library[function](category)


def test_a_renamed_argument_of_a_forward_raises() -> None:
    """It names `nn.Module.__call__`, whoever called."""
    model = Renamed()
    with pytest.raises(FutureWarning, match="`past_key_values` is deprecated"):
        model(torch.zeros(1), past_key_values=None)
    with pytest.raises(FutureWarning, match="`past_key_values` is deprecated"):
        torch.func.functional_call(model, {}, (torch.zeros(1),), {"past_key_values": None})
    model(torch.zeros(1), cache=None)


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


def test_libraries_warn_each_other(library: dict[str, Any], recwarn: pytest.WarningsRecorder) -> None:
    forward = "def forward(self, x):\n    return self.inner(x, past_key_values=None)\n"
    exec(compile(forward, "/site-packages/library.py", "exec"), library)
    theirs = type("Theirs", (Outer,), {"forward": library["forward"]})
    with own_warnings.raised():  # once more: recwarn has taken the place of that around the test
        library["calls_deprecated"](FutureWarning)
        theirs(Renamed())(torch.zeros(1))
    assert [str(warning.message) for warning in recwarn] == ["gone tomorrow", "`past_key_values` is deprecated"]


def test_other_warnings_stay_warnings() -> None:
    with pytest.warns(UserWarning, match="as ever"):
        warnings.warn("as ever", UserWarning, stacklevel=1)
