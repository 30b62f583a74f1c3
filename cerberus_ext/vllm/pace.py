"""When does a draft pay? What vLLM's steps take, and what they bring, learnt while they run.

A step of t tokens, drafts included, takes fixed + each * t: reading the weights and what the engine does per step, and
the arithmetic. A small batch hardly notices drafts; in a large one every draft takes the time of a token.
"""

from __future__ import annotations

_KEPT = 0.99  # of what earlier steps say, at every step: about the last hundred count
_USUAL = 16.0  # fixed / each, before anything is known
_WEIGHT = 50.0  # so much variation of t, in tokens squared, counts as much as what is usual
_LONGEST = 2.0  # a step that takes longer than so many times what was expected did something else, too


class Pace:
    """What steps take, and what their drafts bring; old steps fade."""

    def __init__(self) -> None:
        self._sums: tuple[float, ...] = (0.0,) * 8

    def observe(self, rows: int, drafts: int, gained: int, seconds: float) -> None:
        """A step that verified `drafts` drafts of `rows` rows has added `gained` tokens. seconds: more than 0."""
        tokens = rows + drafts
        if self._sums[0] > 0:
            fixed, each = self.line()
            seconds = min(seconds, _LONGEST * (fixed + each * tokens))
        step = (1, tokens, tokens * tokens, seconds, seconds * tokens, rows, drafts, gained)
        self._sums = tuple(_KEPT * before + now for before, now in zip(self._sums, step, strict=True))

    def line(self) -> tuple[float, float]:
        """(fixed, each), in seconds, or in an unknown unit before there was a step: least squares, drawn to _USUAL."""
        steps, tokens, squares, seconds, products, *_ = self._sums
        if steps == 0:
            return _USUAL, 1.0
        size, time = tokens / steps, seconds / steps
        usual = time / (_USUAL + size)
        each = (products - size * seconds + _WEIGHT * usual) / (squares - size * tokens + _WEIGHT)
        each = min(max(each, 0.0), time / size)
        return max(time - each * size, 0.0), each

    def least_probability(self, rows: int) -> float:
        """How probably a draft has to be right to bring more tokens than the batch gains otherwise in its time."""
        fixed, each = self.line()
        *_, seen, drafts, gained = self._sums
        drafts, gained = (drafts / seen, gained / seen) if seen > 0 else (0.0, 1.0)
        return each * rows * gained / (fixed + each * rows * (1 + drafts))
