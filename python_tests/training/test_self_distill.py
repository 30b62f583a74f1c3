"""The data stage: prompts, answers, shards."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import WORDS, model, options, tokenizer
from transformers import LlamaForCausalLM

from cerberus_ext.training import own_prompts, self_distill
from cerberus_ext.training.answer_writer import AnswerWriter, degenerate
from cerberus_ext.training.answers import Answers
from cerberus_ext.training.own_prompts import prompt_writer
from cerberus_ext.training.processes import Processes
from cerberus_ext.training.sampler import Text
from cerberus_ext.training.self_distill import load_data

EOS = 2
EXACT = {"rows": 4, "max_new_tokens": 12, "tokens": 330}


@pytest.fixture(autouse=True)
def short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_prompts, "CHAT_TOKENS", 12)


@pytest.fixture(scope="module")
def chat() -> LlamaForCausalLM:
    return model()


def load(base: LlamaForCausalLM, output: Path, has_template: bool = True, **changes: Any) -> Answers:
    chosen = options(None, output, **{**EXACT, **changes})
    return load_data(base, tokenizer(has_template), chosen, Processes())[0]


def files(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((output / "data").iterdir())}


def plain(answers: Answers) -> list[tuple[list[int], list[int], float | None]]:
    return [(list(line.prompt), list(line.answer), line.temperature) for line in answers.lines]


def said(*turns: str) -> list[int]:
    words = []
    for number, turn in enumerate(turns):
        words += ["<s>", ("user", "assistant")[number % 2], *turn.split(), "</s>"]
    return [WORDS.index(word) for word in (*words, "<s>", "assistant")]


def test_a_chat_model_writes_prompts_and_answers(tmp_path: Path, chat: LlamaForCausalLM) -> None:
    found = plain(load(chat, tmp_path))
    assert sum(len(answer) for _, answer, _ in found) >= 330
    for prompt, answer, _ in found:
        words = [WORDS[token] for token in prompt]
        assert words[:2] == ["<s>", "user"] and words[-3:] == ["</s>", "<s>", "assistant"] and len(words) > 5
        assert EOS not in answer[:-1] and (len(answer) == 12 or answer[-1] == EOS) and len(answer) > 1
    assert len({tuple(prompt) for prompt, _, _ in found}) == len(found)
    assert set(Counter(temperature for _, _, temperature in found)) == {0.0, 0.3, 0.7}


def test_greedy_answers_are_what_generate_writes(tmp_path: Path, chat: LlamaForCausalLM) -> None:
    greedy = [line for line in load(chat, tmp_path).lines if line.temperature == 0]
    assert len(greedy) > 3
    for line in greedy:
        ids = torch.tensor([list(line.prompt)])
        mask = torch.ones_like(ids)
        expected = chat.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=12, eos_token_id=EOS, pad_token_id=0
        )
        assert list(line.answer) == expected[0, ids.shape[1] :].tolist()


def test_a_base_model_goes_on_with_its_own_beginnings(tmp_path: Path, chat: LlamaForCausalLM) -> None:
    for prompt, answer, _ in plain(load(chat, tmp_path, has_template=False)):
        assert prompt[0] == WORDS.index("<s>") and EOS not in prompt and 9 <= len(prompt) <= 33
        assert len(answer) > 1


@pytest.mark.parametrize("has_template", [True, False])
def test_every_turn_of_given_questions_is_answered(tmp_path: Path, chat: LlamaForCausalLM, has_template: bool) -> None:
    questions = [
        ["w1 w2 w3", "w4"],
        ["w5"],
        ["w1 w2 w3"],
        ["w6 w7", "w8", "w9"],
        *([f"w{i} w{i}"] for i in range(20, 27)),
    ]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in questions))
    found = load(chat, tmp_path / "out", has_template, prompts=file, tokens=None).lines
    asked = {tuple(line.prompt) for line in found}
    assert len(asked) == len(found)
    if not has_template:
        assert tuple(WORDS.index(word) for word in ["w1", "w2", "w3"]) in asked
        return
    assert asked >= {tuple(said(turns[0])) for turns in questions}
    by_prompt = {tuple(line.prompt): line.answer for line in found}
    text = tokenizer(True)
    talk: list[str] = []
    for turn in questions[3]:
        talk.append(turn)
        answer = by_prompt[tuple(said(*talk))]
        talk.append(text.decode(list(answer), skip_special_tokens=True))
    # The third question is the first one again, and is answered once.
    assert len(found) == 10 + 1 + 2


def test_enough_answers_end_the_stage(tmp_path: Path, chat: LlamaForCausalLM) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"w{i % 50} w{i // 50} w3"}) + "\n" for i in range(100)))
    found = load(chat, tmp_path / "out", prompts=file, tokens=60)
    assert 60 <= sum(len(line.answer) for line in found.lines) < 60 + 8 * 12
    assert sorted(files(tmp_path / "out"))[-1] == "data.json" and len(files(tmp_path / "out")) == 2


def test_a_stage_that_is_cut_short_ends_with_the_same_files(
    tmp_path: Path, chat: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = plain(load(chat, tmp_path / "whole"))
    expected = files(tmp_path / "whole")
    assert len(expected) > 4
    write = AnswerWriter.write

    def killed(self: AnswerWriter, number: int, progress: Any) -> Any:
        if number == 2:
            raise KeyboardInterrupt
        return write(self, number, progress)

    monkeypatch.setattr(AnswerWriter, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        load(chat, tmp_path / "parts")
    assert len(files(tmp_path / "parts")) == 3
    # Of a kill while it was written.
    (tmp_path / "parts" / "data" / "answers-00002.jsonl.17-0123abcd.partial").write_text('{"p": [1')
    monkeypatch.setattr(AnswerWriter, "write", write)
    assert plain(load(chat, tmp_path / "parts")) == whole
    assert files(tmp_path / "parts") == expected

    # More tokens add shards, fewer read only the first ones; nothing is written again.
    assert plain(load(chat, tmp_path / "parts", tokens=420))[: len(whole)] == whole
    assert plain(load(chat, tmp_path / "parts")) == whole


def test_prompts_of_an_earlier_shard_are_left_out(
    tmp_path: Path, chat: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of a writer that repeats itself; also where the earlier shard was written before a kill."""
    write = AnswerWriter.write
    monkeypatch.setattr(AnswerWriter, "write", lambda self, number, progress: write(self, number // 2, progress))
    found = plain(load(chat, tmp_path))
    assert len({tuple(prompt) for prompt, _, _ in found}) == len(found)
    assert files(tmp_path)["answers-00001.jsonl"] == b""
    (tmp_path / "data" / "answers-00001.jsonl").unlink()
    for later in sorted((tmp_path / "data").glob("answers-*"))[1:]:
        later.unlink()
    assert plain(load(chat, tmp_path)) == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed must be 0 to go on with the answers in data of the output, got 1"),
        ({"max_new_tokens": 9}, "max_new_tokens must be 12 to go on"),
        ({"rows": 3}, "rows must be 4 to go on"),
    ],
)
def test_answers_of_another_run_are_refused(
    tmp_path: Path, chat: LlamaForCausalLM, changes: dict[str, int], message: str
) -> None:
    load(chat, tmp_path, tokens=1)
    with pytest.raises(ValueError, match=f"train: {message}"):
        load(chat, tmp_path, tokens=1, **changes)


def test_answers_of_another_model_are_refused(tmp_path: Path, chat: LlamaForCausalLM) -> None:
    load(chat, tmp_path, tokens=1)
    with pytest.raises(ValueError, match="train: model_fingerprint must be .* to go on with the answers"):
        load(model(seed=1), tmp_path, tokens=1)


def test_a_damaged_folder_is_refused(tmp_path: Path, chat: LlamaForCausalLM) -> None:
    load(chat, tmp_path)
    shard = tmp_path / "data" / "answers-00000.jsonl"
    whole = shard.read_text()
    shard.write_text(whole[:-20])
    with pytest.raises(ValueError, match=r"train: answers-00000.jsonl line \d+: must be JSON"):
        load(chat, tmp_path)
    shard.write_text(whole)
    record = tmp_path / "data" / "data.json"
    for damage in (lambda: record.write_text("{"), record.unlink):
        damage()
        with pytest.raises(ValueError, match="train: data/data.json of the output is missing or damaged; remove"):
            load(chat, tmp_path)


def test_a_model_that_writes_nothing_of_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = model()
    silent.lm_head.weight.zero_()  # all logits equal ...
    monkeypatch.setattr(self_distill, "BARREN", 3)
    with pytest.raises(ValueError, match="train: the model must write answers of use, got none in 3 shards of prompts"):
        load(silent, tmp_path, max_new_tokens=1)  # ... and a single token teaches nothing


def test_what_is_needed_for_prompts(tmp_path: Path, chat: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="train: tokenizer must be given unless data is"):
        load_data(chat, None, options(None, tmp_path), Processes())
    with pytest.raises(ValueError, match="prompts must be given for a model whose tokenizer has no token that begins"):
        prompt_writer(tokenizer(False), frozenset(), None, 99)
    mute = tokenizer(True)
    mute.chat_template = "<s> assistant"
    with pytest.raises(ValueError, match="prompts must be given for a model whose chat template has nothing before"):
        prompt_writer(mute, frozenset(), 1, 99)
    with pytest.raises(ValueError, match="the model must have room for a prompt beside 5 tokens of its chat template"):
        prompt_writer(tokenizer(True), frozenset(), 1, 5)
    (tmp_path / "bad.jsonl").write_text('{"question": 1}\n')
    with pytest.raises(ValueError, match='train: prompts: bad.jsonl line 1: must have "turns"'):
        load(chat, tmp_path, prompts=tmp_path / "bad.jsonl", tokens=None)


def test_a_user_text_ends_where_the_template_says() -> None:
    ids = WORDS.index
    special = prompt_writer(tokenizer(True), frozenset({EOS}), 1, 99)
    assert special.prefix == [ids("<s>"), ids("user")] and special.stop == {EOS}
    new = [ids("w1"), ids("w2"), EOS]
    assert special.prompt(Text([], 1, 1, torch.zeros(3), new)) == said("w1 w2")
    assert special.prompt(Text([], 1, 1, torch.zeros(3), [EOS])) is None

    words = tokenizer(True)
    words.chat_template = "user {{ messages[0]['content'] }} w9 assistant"  # no special token anywhere
    cut = prompt_writer(words, frozenset({EOS}), 1, 99)
    assert cut.stop == {EOS} and cut.suffix == "w9 assistant"
    new = [ids(word) for word in ["w1", "w9", "w2", "w9", "assistant", "w3"]]
    expected = [ids(word) for word in ["user", "w1", "w9", "w2", "w9", "assistant"]]
    assert cut.prompt(Text([], 1, 1, torch.zeros(6), new)) == expected


def test_degenerate() -> None:
    assert degenerate([]) and degenerate([5]) and not degenerate([5, 5])
    assert degenerate([1, 2, 3] * 11) and not degenerate([1, 2, 3, 4] * 8) and not degenerate([5] * 31)


def test_a_short_context_is_not_exceeded(tmp_path: Path) -> None:
    small = model(positions=24)
    for has_template in (True, False):
        found = load(small, tmp_path / str(has_template), has_template, max_new_tokens=50)
        assert max(map(len, found.lines)) == 24 and all(len(line.answer) > 1 for line in found.lines)


def test_texts_longer_than_the_context_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"p": [1], "r": [2, 3]}\n{"p": [1, 2, 3], "r": [4, 5, 6, 7, 8, 9, 10, 11, 12, 13]}\n')
    with pytest.raises(ValueError, match="train: data: data.jsonl must have texts of at most 12 tokens, got one of 13"):
        load_data(model(positions=12), None, options(file, tmp_path), Processes())
