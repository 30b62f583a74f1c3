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

    def common(self, ids: list[int]) -> int:
        """How many tokens the two have in common, from the beginning on."""
        pairs = enumerate(zip(self.tokens, ids, strict=False))
        return next((place for place, (old, new) in pairs if old != new), min(len(self.tokens), len(ids)))

    def cut(self, common: int, capacity: int) -> None:
        """Keeps so many of the tokens, and gives the cache room for `capacity` of them."""
        self.tokens = self.tokens[:common]
        if self.cache.capacity < capacity:
            self.cache.grow(capacity, common)

    def begin_as(self, other: Past, common: int) -> None:
        """Copies so many tokens of the other's."""
        self.cache.begin_as(other.cache, common)
        self.tokens = other.tokens[:common]


def take_past(pasts: list[Past], key: tuple[Any, ...], prompt: Tensor, empty: TreeCache, most: int) -> Past:
    """What a text begins with, of `pasts`, the latest last: what has most in common with its prompt (1, S).

    A past that the text goes on from is taken; of one that would lose tokens the common ones are copied where it may
    stay: no more than `most` do, this text's included. `empty`: its cache where there is none. Pasts of another key are
    freed. The prompt's last token is left out: what it leads to has to be computed.
    """
    pasts[:] = [past for past in pasts if past.key == key]
    ids = prompt[0, :-1].tolist()
    if not pasts:
        return Past(key, empty)
    common = [past.common(ids) for past in pasts]
    kept = max(common)
    place = common.index(kept)
    best, is_full = pasts[place], len(pasts) >= most
    if kept == len(best.tokens) or (is_full and place == 0):
        found = pasts.pop(place)
        found.cut(kept, empty.capacity)
    else:
        # Memory that is there already: a heap that takes and gives such pieces at every text grows and grows.
        found = pasts.pop(0) if is_full else Past(key, empty)
        found.cut(0, empty.capacity)
        found.begin_as(best, kept)
    del pasts[: max(0, len(pasts) + 1 - most)]  # of a decode with more slots
    return found
