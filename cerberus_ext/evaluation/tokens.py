"""A text token by token: how each reads, and who drafted it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"


class Draft(NamedTuple):
    """From where a token came.

    step: counted from 1; 0: the prompt's forward. head: that drafted it, counted from 1; proposer: that drafted it, as
    in DecodeStats.trace_proposers; both 0: the target model chose it. node: of the step's tree, which has `nodes`.
    """

    step: int
    head: int = 0
    node: int = 0
    nodes: int = 1
    proposer: int = 0


def drafts_of(
    trace: Sequence[tuple[int, Sequence[int]]], proposers: Sequence[Sequence[int]], tokens: int
) -> list[Draft]:
    """trace, proposers: as in DecodeStats -> one entry for each of the text's `tokens`.

    A step that accepts a drafts gains them and one token of the target model. The text may end within the last step.
    """
    found = [Draft(0)]
    for step, ((nodes, path), who) in enumerate(zip(trace, proposers, strict=True), start=1):
        for depth, (node, proposer) in enumerate(zip(path, who, strict=True), start=1):
            found.append(Draft(step, 0 if proposer else depth, node, nodes, proposer))
        found.append(Draft(step, nodes=nodes))
    return found[:tokens]


def pieces_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> list[str]:
    """How the text grows with each token. A character that several tokens make comes with the last of them."""
    pieces: list[str] = []
    shown = ""
    for end in range(1, len(tokens) + 1):
        text = str(tokenizer.decode(list(tokens[:end]), skip_special_tokens=False))
        if text.endswith(_UNFINISHED) and end < len(tokens):
            pieces.append("")
        elif text.startswith(shown):
            pieces.append(text[len(shown) :])
            shown = text
        else:  # the tokenizer changes what it has said; so the text is shown token by token
            pieces.append(str(tokenizer.decode([tokens[end - 1]], skip_special_tokens=False)))
            shown = text
    return pieces
