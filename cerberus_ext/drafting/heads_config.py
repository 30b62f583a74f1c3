"""CerberusConfig: the numbers that describe a set of heads, and what they may be."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, fields
from typing import Any

from .context_layer import check_has_anchor

FORMAT_VERSION = 1
MOST_RANK = 1024  # of conditional drafts: far beyond what is useful
ANCHORS = ("root", "hidden")


@dataclass
class CerberusConfig:
    """Describes heads; everything needed to build them empty and to see whether a model fits them.

    hidden_size, vocab_size: of the target model. num_heads: K, tokens drafted after the pending one. num_layers: L.
    anchor: "root" (embedding of the pending token) or "hidden" (the paper's heads): what starts the chain.
    chained: False drops the neighbour: Medusa's heads.
    draft_vocab: how many rows of the LM head the heads project to, or None for all of them.
    context_layer: whether a context layer (context_layer.py) stands in front of the heads; it reads the root's
    embedding, too, so it needs chained heads with anchor="root". context_heads: its query heads, key heads and head
    size, which are those of the target model's attention, whose cache it shares.
    conditional_rank: r of the conditional drafts (conditional.py), or None: heads 2 to K do not know the token before.
    lm_head_fingerprint: of the LM head the heads were trained on, see `fingerprint`; None is never checked.
    accuracy: (K, P), measured by the trainer: entry [k][r] is the probability that draft r of head k + 1 is
    the token that the target model chooses, given that the drafts on the path before it are right.
    paths: measured too: paths through the drafts (ranks, one per depth), most useful first: the best tree of
    N nodes is the pending token and the first N - 1 of them.
    """

    base_model: str
    hidden_size: int
    vocab_size: int
    num_heads: int = 4
    num_layers: int = 2
    anchor: str = "root"
    chained: bool = True
    draft_vocab: int | None = None
    context_layer: bool = False
    context_heads: list[int] | None = None
    conditional_rank: int | None = None
    lm_head_fingerprint: str | None = None
    accuracy: list[list[float]] | None = None
    paths: list[list[int]] | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name in ("hidden_size", "vocab_size", "num_heads", "num_layers"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"CerberusConfig: {name} must be an integer >= 1, got {value!r}")
        self._check_types()
        if self.anchor not in ANCHORS:
            raise ValueError(f'CerberusConfig: anchor must be "root" or "hidden", got {self.anchor!r}')
        if self.draft_vocab is not None and not 1 <= self.draft_vocab <= self.vocab_size:
            raise ValueError(
                f"CerberusConfig: draft_vocab must be None or in 1..vocab_size ({self.vocab_size}),"
                f" got {self.draft_vocab}"
            )
        self._check_context()
        if self.conditional_rank is not None and (self.num_heads < 2 or not 1 <= self.conditional_rank <= MOST_RANK):
            raise ValueError(
                f"CerberusConfig: conditional_rank must be None or in 1..{MOST_RANK} with num_heads >= 2,"
                f" got {self.conditional_rank} with {self.num_heads}"
            )
        if self.accuracy is not None and len(self.accuracy) != self.num_heads:
            raise ValueError(
                f"CerberusConfig: accuracy must have one row per head ({self.num_heads}), got {len(self.accuracy)}"
            )

    def _check_types(self) -> None:
        """Of what a damaged or hand-written file may hold."""
        for name, kind, what in (
            ("base_model", str, "a text"),
            ("chained", bool, "true or false"),
            ("context_layer", bool, "true or false"),
            ("draft_vocab", int | None, "None or an integer"),
            ("conditional_rank", int | None, "None or an integer"),
            ("lm_head_fingerprint", str | None, "None or a text"),
        ):
            value = getattr(self, name)
            if not isinstance(value, kind) or kind == int | None and isinstance(value, bool):
                raise ValueError(f"CerberusConfig: {name} must be {what}, got {value!r}")
        for name, what, fits in (
            ("context_heads", "integers", lambda value: type(value) is int),
            ("accuracy", "rows of probabilities", lambda value: _all(value, _is_probability)),
            ("paths", "paths of ranks >= 0", lambda value: _all(value, _is_rank) and len(value) <= self.num_heads),
        ):
            value = getattr(self, name)
            if value is not None and not _all(value, fits):
                raise ValueError(f"CerberusConfig: {name} must be {what}, got {repr(value)[:60]}")

    def _check_context(self) -> None:
        if not self.context_layer:
            return
        check_has_anchor("CerberusConfig", self.anchor, self.chained)
        sizes = self.context_heads
        if not sizes or len(sizes) != 3 or min(sizes) < 1 or sizes[0] % sizes[1] or sizes[2] % 2:
            raise ValueError(
                "CerberusConfig: context_heads must be query heads, a divisor of them as key heads, and an even head"
                f" size, got {sizes!r}"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CerberusConfig:
        """Reads what `save_pretrained` wrote; refuses another format, and fields that are missing or not known."""
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(f"CerberusConfig: format_version must be {FORMAT_VERSION}, got {version!r}")
        known = {field.name for field in fields(cls)}
        for name in values:
            if name not in known:
                raise ValueError(f"CerberusConfig: unknown field {name!r}")
        for field in fields(cls):
            if field.default is MISSING and field.name not in values:
                raise ValueError(f"CerberusConfig: there is no {field.name}")
        return cls(**values)


def _all(value: Any, fits: Any) -> bool:
    """Whether it is a list or tuple, of at least one, of what fits."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(map(fits, value))


def _is_probability(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and 0 <= value <= 1


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 0
