"""Which warnings are about code of ours: those are errors in every test (conftest.py).

A warning is raised by the library that is called, and names whoever it takes for the caller: for a model's forward that
is `nn.Module.__call__`, never this package. So the stack decides: ours is what names a file of ours, or a function that
a file of ours calls, what only hands calls on not counted. Libraries may warn each other as they like.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch._functorch import functional_call
from torch.nn.utils import stateless
from torch.utils import _contextlib

import cerberus_ext

CATEGORIES = (FutureWarning, DeprecationWarning, PendingDeprecationWarning)
_TESTS = Path(__file__).resolve().parents[1]
_OURS = tuple(
    f"{folder}/" for folder in (Path(cerberus_ext.__file__).resolve().parent, _TESTS, _TESTS.parent / "bench")
)
_SHOWING = {__file__, warnings.__file__}
_HANDING_ON = {
    module.__file__
    for module in (torch.nn.modules.module, functional_call, stateless, _contextlib, contextlib, functools)
}


def is_own(filename: str, line: int) -> bool:
    """Whether the warning that is being shown, which names this place, is about code of ours."""
    warning: FrameType | None = sys._getframe()
    while warning and warning.f_code.co_filename in _SHOWING:
        warning = warning.f_back
    frame = warning
    while frame and (frame.f_code.co_filename, frame.f_lineno) != (filename, line):
        frame = frame.f_back
    if frame is None:  # it names a place that is not being executed
        return filename.startswith(_OURS)
    if frame is warning:  # it names no caller, only what was called
        frame = frame if frame.f_code.co_filename.startswith(_OURS) else frame.f_back
    while frame and frame.f_code.co_filename in _HANDING_ON:
        frame = frame.f_back
    return frame is not None and frame.f_code.co_filename.startswith(_OURS)


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """While inside, warnings that code of ours is out of date are raised; others go where they went."""
    show: Any = warnings.showwarning

    def raise_own(message: Warning | str, category: type[Warning], filename: str, line: int, *rest: Any) -> None:
        if issubclass(category, CATEGORIES) and isinstance(message, Warning) and is_own(filename, line):
            raise message
        show(message, category, filename, line, *rest)

    warnings.showwarning = raise_own
    try:
        yield
    finally:
        warnings.showwarning = show
