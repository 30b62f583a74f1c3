"""A model whose forward's argument was renamed, as transformers renames arguments."""

from __future__ import annotations

import warnings
from functools import wraps
from typing import Any

from torch import nn


def renamed(forward: Any) -> Any:
    """As transformers renames an argument: the old name goes on being taken, with a warning."""

    @wraps(forward)
    def taking_both(*args: Any, **kwargs: Any) -> Any:
        if "past_key_values" in kwargs:
            warnings.warn("`past_key_values` is deprecated", FutureWarning, stacklevel=2)
            kwargs["cache"] = kwargs.pop("past_key_values")
        return forward(*args, **kwargs)

    return taking_both


class Renamed(nn.Module):
    @renamed
    def forward(self, input_ids: Any, cache: Any = None) -> Any: ...
