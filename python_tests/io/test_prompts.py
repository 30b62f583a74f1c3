"""Files of questions, and conversations as token ids."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast
from word_tokenizer import word_tokenizer

from cerberus_ext.io.prompts import Question, encode_chat, read_questions

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ' ' + m.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def make_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer(["<unk>", "user", "assistant", "a", "b", "c"])
    tokenizer.chat_template = template
    return tokenizer


def test_reads_both_kinds_of_lines(tmp_path: Path) -> None:
    file = write(
        tmp_path / "q.jsonl",
        {"question_id": 81, "category": "writing", "turns": ["one", "two"], "reference": []},
        "",
        {"prompt": "three"},
    )
    expected = [Question("81", "writing", ("one", "two")), Question("3", "", ("three",))]
    assert read_questions(file) == expected
    assert read_questions(file, limit=1) == expected[:1]


@pytest.mark.parametrize("line", ["{", "[]", "3", {"turns": []}, {"turns": "one"}, {"turns": [1]}, {"prompt": " "}, {}])
def test_a_wrong_line_is_named(tmp_path: Path, line: object) -> None:
    with pytest.raises(ValueError, match=r"^q\.jsonl line 2: must"):
        read_questions(write(tmp_path / "q.jsonl", {"prompt": "one"}, line))


def test_a_file_without_questions_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^q\.jsonl must have at least one question, got none$"):
        read_questions(write(tmp_path / "q.jsonl", ""))


def test_a_conversation_goes_through_the_template() -> None:
    ids = encode_chat(make_tokenizer(TEMPLATE), ["a", "b", "c"])
    assert torch.equal(ids, torch.tensor([[1, 3, 2, 4, 1, 5, 2]]))


def test_without_a_template_the_turns_are_plain_text() -> None:
    assert torch.equal(encode_chat(make_tokenizer(None), ["a", "b", "c"]), torch.tensor([[3, 4, 5]]))


def test_a_conversation_ends_with_the_user() -> None:
    with pytest.raises(ValueError, match="encode_chat: turns must begin and end with the user's, got 2 turns"):
        encode_chat(make_tokenizer(None), ["a", "b"])
