"""The page: well-formed, self-contained, and right about who drafted what."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from tiny_chat import save_model

from cerberus_ext import CerberusHeads
from cerberus_ext.evaluation.evaluate import BenchOptions, evaluate, report
from cerberus_ext.evaluation.page import code
from cerberus_ext.evaluation.tokens import Draft, drafts_of
from cerberus_ext.io.default_model import load_model
from cerberus_ext.io.prompts import Question
from cerberus_ext.io.words import pieces_of

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
def page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A page, and its folder."""
    out = tmp_path_factory.mktemp("page")
    model, tokenizer = load_model(folder / "model", torch.float32, "cpu")
    heads = CerberusHeads.from_pretrained(folder / "heads")
    questions = [Question("1", "a<b>&", ("<script>alert(1)</script> w1",)), Question("2", "c", ("w3 <b>&",))]
    options = BenchOptions(turns=(1,), new_tokens=48, tree_size=9, ways=("cerberus", "generate"))
    evaluate(model, tokenizer, heads, questions, out, options, names={"model": "<i>model</i>"})
    return (out / "index.html").read_text(), out


def test_it_is_well_formed_and_small(page: tuple[str, Path]) -> None:
    reader = Reader()
    reader.feed(page[0])
    reader.close()
    assert reader.open == []
    assert len(page[0]) < 500_000


def test_it_needs_nothing_else(page: tuple[str, Path]) -> None:
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


def test_texts_are_escaped(page: tuple[str, Path]) -> None:
    reader = Reader()
    reader.feed(page[0])
    assert "<script>alert(1)</script> w1" in reader.text and "a<b>&" in reader.text and "<i>model</i>" in reader.text
    assert "<i>" not in page[0] and "<b>" not in page[0]
    assert code("a `b<c` d") == "a <code>b&lt;c</code> d"


def test_tokens_are_escaped(page: tuple[str, Path], tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (page[1] / "results.jsonl").read_text().splitlines()]
    for line in lines:
        if line.get("pieces"):
            line["pieces"]["cerberus"][0] = '<b>"&'
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report(tmp_path)
    reader = Reader()
    reader.feed((tmp_path / "index.html").read_text())
    shown = [(attributes, text) for attributes, text in reader.spans if "title" in attributes]
    assert shown[0] == ({"title": "from the prompt's forward"}, '<b>"&')


WHO = re.compile(r"step \d+: (?:(head|proposer) (\d), node \d of \d|target model)|from the prompt's forward")


def shown_tokens(page: str) -> list[tuple[str, int]]:
    """Of each token ("head", k), ("proposer", k) or ("", 0); its colour is that of who drafted it."""
    reader = Reader()
    reader.feed(page)
    found = []
    for attributes, _ in reader.spans:
        if "title" in attributes:
            match = WHO.fullmatch(attributes["title"] or "")
            assert match
            kind, number = match.group(1) or "", int(match.group(2) or 0)
            colours = [name for name in (attributes.get("class") or "").split() if name != "first"]
            assert colours == ([kind[0] + str(number)] if kind else [])
            found.append((kind, number))
    return found


def test_every_token_has_who_drafted_it(page: tuple[str, Path]) -> None:
    shown, expected = shown_tokens(page[0]), []
    for line in (page[1] / "results.jsonl").read_text().splitlines()[1:]:
        row = json.loads(line)
        if row.get("way") == "cerberus":
            tokens: list[tuple[str, int]] = [("", 0)]
            for proposers in row["stats"]["trace_proposers"]:
                tokens += [
                    ("proposer", who) if who else ("head", depth) for depth, who in enumerate(proposers, start=1)
                ]
                tokens.append(("", 0))
            expected += tokens[: len(row["tokens"])]
    assert shown == expected
    assert ("head", 1) in shown and ("proposer", 1) in shown, "else little is tested"
    key = page[0].partition('<p class="key">')[2].partition("</p>")[0]
    for name in {kind[0] + str(number) for kind, number in shown if kind}:
        assert f'<span class="{name}">' in key and f".{name} {{ background: hsl(" in page[0]
    colours = re.findall(r"background: (hsl\([^)]*\))", page[0])
    assert len(set(colours)) == len(colours) >= 2


def test_results_alone_make_the_page(page: tuple[str, Path], tmp_path: Path) -> None:
    shutil.copy(page[1] / "results.jsonl", tmp_path)
    report(tmp_path)
    assert (tmp_path / "index.html").read_text() == page[0]


def test_drafts_of_a_trace() -> None:
    trace = [(4, [1, 3]), (1, []), (4, [2])]
    first = [Draft(1, 1, 1, 4), Draft(1, 2, 3, 4), Draft(1, nodes=4)]
    expected = [Draft(0), *first, Draft(2), Draft(3, 1, 2, 4), Draft(3, nodes=4)]
    assert drafts_of(trace, [[0, 0], [], [0]], 7) == expected
    assert drafts_of(trace, [[0, 0], [], [0]], 6) == expected[:6]  # the text ended within the last step
    assert drafts_of([], [], 1) == [Draft(0)]
    mixed = drafts_of(trace, [[2, 0], [], [1]], 7)
    assert mixed[1:3] == [Draft(1, 0, 1, 4, 2), Draft(1, 2, 3, 4)] and mixed[5] == Draft(3, 0, 2, 4, 1)


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
