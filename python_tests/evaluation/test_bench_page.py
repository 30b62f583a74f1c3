"""The page: well-formed, self-contained, and right about which head guessed what."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from tiny_chat import save_model

from cerberus_ext import CerberusHeads
from cerberus_ext.default_model import load_model
from cerberus_ext.evaluate import BenchOptions, evaluate
from cerberus_ext.evaluation.page import code, span
from cerberus_ext.evaluation.tokens import Guess, guesses_of, pieces_of
from cerberus_ext.prompts import Question

VOID = {"meta", "img", "br", "hr"}
OPTIONAL = {"dt", "dd"}  # whose ends may be left out


class Reader(HTMLParser):
    """Checks that tags are closed in order; collects texts, attributes, and the tokens shown."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.spans: list[tuple[dict[str, str | None], str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID | OPTIONAL:
            self.open.append(tag)
        if tag == "span":
            self.spans.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "span":
            attributes, text = self.spans[-1]
            self.spans[-1] = attributes, text + data


@pytest.fixture(scope="module")
def page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict]:
    """A page, and its summary."""
    out = tmp_path_factory.mktemp("page")
    model, tokenizer = load_model(folder / "model", torch.float32, "cpu")
    heads = CerberusHeads.from_pretrained(folder / "heads")
    questions = [Question("1", "a<b>&", ("<script>alert(1)</script> w1",)), Question("2", "c", ("w3 <b>&",))]
    options = BenchOptions(turns=(1,), new_tokens=24, tree_size=9, ways=("cerberus", "generate"))
    summary = evaluate(model, tokenizer, heads, questions, out, options, names={"model": "<i>model</i>"})
    return (out / "index.html").read_text(), summary


def test_it_is_well_formed_and_small(page: tuple[str, dict]) -> None:
    reader = Reader()
    reader.feed(page[0])
    reader.close()
    assert reader.open == []
    assert len(page[0]) < 500_000


def test_it_needs_nothing_else(page: tuple[str, dict]) -> None:
    reader = Reader()
    reader.feed(page[0])
    sources = [value for _, name, value in reader.attributes if name in ("src", "srcset", "data", "poster")]
    assert len(sources) == 3
    for source in sources:
        assert source is not None and source.startswith("data:image/png;base64,")
        assert base64.b64decode(source.partition(",")[2]).startswith(b"\x89PNG")
    assert {tag for tag, _, _ in reader.attributes} & {"link", "script", "iframe", "object"} == set()
    assert "url(" not in page[0] and "@import" not in page[0] and "<script" not in page[0]
    assert "prefers-color-scheme: dark" in page[0]


def test_texts_are_escaped(page: tuple[str, dict]) -> None:
    reader = Reader()
    reader.feed(page[0])
    assert "<script>alert(1)</script> w1" in reader.text and "a<b>&" in reader.text and "<i>model</i>" in reader.text
    assert "<i>" not in page[0] and "<b>" not in page[0]
    assert span('<"&', Guess(0), None) == '<span title="from the prompt\'s forward">&lt;&quot;&amp;</span>'
    assert code("a `b<c` d") == "a <code>b&lt;c</code> d"


def test_every_token_has_its_head(page: tuple[str, dict]) -> None:
    reader = Reader()
    reader.feed(page[0])
    tokens = [(attributes, text) for attributes, text in reader.spans if "title" in attributes]
    histogram = page[1]["ways"]["cerberus"]["all"]["decode"]["accepted_histogram"]
    heads = [re.search(r"head (\d)", attributes["title"] or "") for attributes, _ in tokens]
    shown = [int(found.group(1)) for found in heads if found]
    # A step that accepts a guesses shows heads 1 .. a; the last step may be cut.
    counted = [sum(histogram[head:]) for head in range(1, len(histogram))]
    assert len(tokens) == page[1]["ways"]["cerberus"]["all"]["tokens"] and sum(counted) > 3
    for head, count in enumerate(counted, start=1):
        assert count - 2 <= shown.count(head) <= count
    for attributes, _ in tokens:
        head = re.search(r"head (\d), node \d of \d", attributes["title"] or "")
        classes = (attributes.get("class") or "").split()
        assert (f"h{head.group(1)}" in classes) if head else not [name for name in classes if name.startswith("h")]


def test_guesses_of_a_trace() -> None:
    trace = [(4, [1, 3]), (1, []), (4, [2])]
    first = [Guess(1, 1, 1, 4), Guess(1, 2, 3, 4), Guess(1, nodes=4)]
    expected = [Guess(0), *first, Guess(2), Guess(3, 1, 2, 4), Guess(3, nodes=4)]
    assert guesses_of(trace, 7) == expected
    assert guesses_of(trace, 6) == expected[:6]  # the text ended within the last step
    assert guesses_of([], 1) == [Guess(0)]


def test_pieces_are_the_text(tmp_path: Path) -> None:
    save_model(tmp_path)
    _, tokenizer = load_model(tmp_path, torch.float32, "cpu")
    pieces = pieces_of(tokenizer, [5, 2, 6, 63])
    assert len(pieces) == 4 and "".join(pieces) == tokenizer.decode([5, 2, 6, 63]) and pieces[3] == " <b>&"


def test_a_character_of_several_tokens() -> None:
    class Bytes:
        def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
            return bytes(tokens).decode(errors="replace")

    assert pieces_of(Bytes(), list("aé!".encode())) == ["a", "", "é", "!"]  # type: ignore[arg-type]
    assert pieces_of(Bytes(), list("aé".encode())[:2]) == ["a", "\ufffd"]  # type: ignore[arg-type]
    assert pieces_of(Bytes(), []) == []  # type: ignore[arg-type]
