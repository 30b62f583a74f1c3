"""What a text leaves for the next one that begins with the same tokens, as the turns of a conversation do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..target.cache import TreeCache


@dataclass
class Past:
    """tokens: their keys and values are in the first slots of `cache`, the heads' context layer's, too.

    key: what these depend on besides the tokens. They do not depend on how the text was cut into forwards, where all of
    it was computed as steps.
    """

    key: tuple[Any, ...]
    cache: TreeCache
    tokens: list[int] = field(default_factory=list)

    def cut(self, prompt: Tensor, capacity: int) -> None:
        """For the text of a prompt (1, S): keeps what it begins with, and gives the cache room for so many tokens.

        The prompt's last token is left out: what it leads to has to be computed.
        """
        ids = prompt[0, :-1].tolist()
        pairs = enumerate(zip(self.tokens, ids, strict=False))
        common = next((place for place, (old, new) in pairs if old != new), min(len(self.tokens), len(ids)))
        self.tokens = self.tokens[:common]
        if self.cache.capacity < capacity:
            self.cache.grow(capacity, common)
