"""Decoding without a model: the steps that `decode` would take through texts that are known, and their time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from ..decode import ask
from ..gate import Gate
from ..stats import StepCounts
from ..tree import DraftTree
from .cost import StepCosts
from .trace import TracedText

_NOT_ASKED = Gate()


@dataclass
class Tally(StepCounts):
    """What the steps through some texts come to. The first token of a text comes with the prompt, without a step.

    tokens: those that are in the texts: a last step that goes beyond the end is counted as far as the end.
    """

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of the steps, without the prompt."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def __iadd__(self, other: Tally) -> Tally:
        for name in ("tokens", "steps", "open_steps", "wasted_steps", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        return self


class _Place:
    """What a gate may want to see at one place of a text; see `decode.Signals`."""

    def __init__(self, text: TracedText, guesses: int) -> None:
        self._text = text
        self._logprobs = text.logprobs[:, :, :guesses]
        self.index = 0

    @property
    def hidden(self) -> Tensor:
        return self._text.hidden[self.index : self.index + 1]

    def entropy(self) -> float:
        return self._text.entropy[self.index]

    def logprobs(self) -> Tensor:
        return self._logprobs[self.index : self.index + 1]


def walk(texts: Iterable[TracedText], tree: DraftTree, gate: Gate, costs: StepCosts) -> Tally:
    """The steps of `decode(..., tree=tree, gate=gate)` through the texts: the gate itself is asked, at every step."""
    tally = Tally()
    guesses = max(one.guesses for one in gate.trees(tree))
    plain = DraftTree.root()
    for text in texts:
        place = _Place(text, guesses)
        while place.index < len(text):
            deepest = text.deepest[place.index]
            asks = deepest > 0 and guesses > 0
            chosen = (ask(gate, tree, place, deepest) if asks else None) or plain
            size = chosen.cut(deepest).size
            accepted = text.accepted(chosen)[place.index] if size > 1 else 0
            context = text.prompt + place.index
            tally.seconds += costs.seconds(size, context, gate if asks else _NOT_ASKED)
            tally.steps += 1
            tally.open_steps += size > 1
            tally.wasted_steps += size > 1 and accepted == 0
            place.index += accepted + 1
        tally.tokens += len(text)
    return tally
