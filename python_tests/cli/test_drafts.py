"""`cerberus generate --show-drafts`: colours, whole characters, a legend."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer

from cerberus_ext.cli.drafts import show_drafts
from cerberus_ext.runtime.stepper import Chunk

TOKENIZER = byte_tokenizer(256)


def shown(capsys: pytest.CaptureFixture[str], text: str, proposers: list[int | None]) -> list[str]:
    """What is printed for the text, of which each byte is a token, in chunks of two."""
    tokens = TOKENIZER.encode(text, add_special_tokens=False)
    assert len(tokens) == len(proposers)
    chunks = [Chunk(tokens[i : i + 2], proposers[i : i + 2]) for i in range(0, len(tokens), 2)]
    decoder: Any = SimpleNamespace(stream=lambda ids, max_new_tokens: iter(chunks), stats=3)
    assert show_drafts(decoder, TOKENIZER, torch.zeros(1, 1), 9) == 3
    return capsys.readouterr().out.splitlines()


def test_colours(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A character of several tokens has the colour of the last of them."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    line, legend = shown(capsys, "aé€z", [None, 0, 1, 1, 1, 0, None])
    green, yellow, end = "\x1b[32m", "\x1b[33m", "\x1b[0m"
    assert line == f"a{yellow}é{end}{green}€{end}z"
    assert legend == (
        f"[tokens: 2 of the model itself, {green}2 of the heads{end}, {yellow}3 of the text's own past{end}]"
    )
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown(capsys, "aé", [None, 0, 1])[0] == "aé"


def test_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    line, legend = shown(capsys, "a b", [None, 0, None])
    assert (line, legend) == ("a b", "[tokens: 2 of the model itself, 1 of the heads]")
