"""Text comes as whole characters, and never beyond what a stop string may begin."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cerberus_ext.io.words import Words


class Bytes:
    """A tokenizer whose tokens are bytes; 256 is a special one."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = True) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


def shown(text: str, stops: list[str]) -> tuple[list[str], Words]:
    words: Any = Words(Bytes(), stops)  # type: ignore[arg-type]
    pieces = []
    for token in text.encode():
        pieces.append(words.add(token))
        if words.stopped:
            return pieces, words
    return [*pieces, words.end()], words


@given(st.text("abé€\U0001f600 ", max_size=40), st.lists(st.text("abé€", min_size=1, max_size=4), max_size=3))
def test_the_text_before_the_first_stop(text: str, stops: list[str]) -> None:
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    pieces, words = shown(text, stops)
    if ends:  # the stop that is complete first; of several that end there the one that began first
        begins = min(text[: min(ends)].index(stop) for stop in stops if stop in text[: min(ends)])
        assert "".join(pieces) == text[:begins] and words.stopped
        assert words.tokens == len(text[: min(ends)].encode()) and words.end() == ""
    else:
        assert "".join(pieces) == text and not words.stopped
    assert all("�" not in piece for piece in pieces)


@pytest.mark.parametrize(("tokens", "want"), [([0xC3], "�"), ([0x61, 256, 0x62], "ab"), ([256], ""), ([], "")])
def test_ends(tokens: list[int], want: str) -> None:
    words: Any = Words(Bytes(), ["x"])  # type: ignore[arg-type]
    assert "".join(map(words.add, tokens)) + words.end() == want
