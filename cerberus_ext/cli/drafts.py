"""An answer in the colours of those who drafted its tokens."""

from __future__ import annotations

import os
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from ..engine.decoder import Decoder

# By proposer, as in Chunk: the model itself is None, the heads are 0, the first of the others is 1.
_WHO = {None: ("the model itself", None), 0: ("the heads", "green"), 1: ("the text's own past", "yellow")}


def show_drafts(decoder: Decoder, tokenizer: PreTrainedTokenizerBase, ids: Tensor, max_new_tokens: int) -> Any:
    """Prints the answer while it is generated, each token in the colour of its proposer, and a legend.

    Only whole characters are printed, in the colour of the token that completes them. Without colours, as with
    NO_COLOR or where the output is no terminal, the legend says how many tokens are whose. Returns the statistics.
    """
    from ..io.words import Words

    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    text, counts = Words(tokenizer), Counter[int | None]()
    for chunk in decoder.stream(ids, max_new_tokens=max_new_tokens):
        for token, proposer in zip(chunk.tokens, chunk.proposers, strict=True):
            counts[proposer] += 1
            typer.echo(_painted(text.add(token), proposer, coloured), nl=False)
        sys.stdout.flush()
    parts = [_painted(f"{counts[who]} of {name}", who, coloured) for who, (name, _) in _WHO.items() if counts[who]]
    typer.echo(f"{text.end()}\n[tokens: {', '.join(parts)}]")
    return decoder.stats


def _painted(text: str, proposer: int | None, coloured: bool) -> str:
    colour = _WHO[proposer][1]
    return typer.style(text, fg=colour) if coloured and colour and text else text
