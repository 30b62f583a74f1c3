"""`calibrate` and `cerberus calibrate` from end to end, on tiny models."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memorized import answer, memorize, untrained
from stand_ins import RandomHeads
from tiny_models import VOCAB, prompt, tiny_model
from typer.testing import CliRunner
from word_tokenizer import word_tokenizer

from cerberus_ext import CerberusHeads, decode
from cerberus_ext.calibration import calibrate as calibrate_module
from cerberus_ext.calibration import questions, report
from cerberus_ext.calibration import trace as trace_module
from cerberus_ext.calibration.calibrate import CalibrateOptions, by_turn, calibrate, find, spread
from cerberus_ext.calibration.choice import KINDS, PLAIN, Choice, choose
from cerberus_ext.calibration.trace import Answer
from cerberus_ext.calibration.validate import GateGain
from cerberus_ext.cli.main import app
from cerberus_ext.drafting.gate import ConfidenceGate
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.engine.calibration_store import place, read_entries
from cerberus_ext.io.prompts import Question

WORDS = [f"w{i}" for i in range(VOCAB)]
QUESTIONS = [
    Question("1", "writing", ("w3 w4 w5", "w6 w7")),
    Question("2", "math", ("w8 w9 w10 w11",)),
    Question("3", "coding", ("w12 w13 w14",)),
]
QUICK = {"tokens": 144, "new_tokens": 24, "sizes": (1, 2, 4), "contexts": (16, 64), "rounds": 1, "validate": 1}
runner = CliRunner()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """Model with its tokenizer, heads that know some of its text, and a file of questions."""
    root, model = tmp_path_factory.mktemp("calibrate"), tiny_model("llama")
    model.save_pretrained(root / "model")
    word_tokenizer(WORDS).save_pretrained(root / "model")
    asked = [torch.tensor([[3, 4, 5]]), torch.tensor([[8, 9, 10, 11]])]
    memorize(model, [answer(model, ids, 24) for ids in asked]).save_pretrained(root / "heads")
    lines = [{"question_id": one.id, "category": one.category, "turns": one.turns} for one in QUESTIONS]
    (root / "questions.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return str(root / "model"), str(root / "heads"), str(root / "questions.jsonl")


def command(folders: tuple[str, str, str], *arguments: str) -> Any:
    model, heads, asked = folders
    quick = ["--tokens", "144", "--new-tokens", "24", "--sizes", "2,1,4", "--contexts", "16,64", "--rounds", "1"]
    given = ["calibrate", "--model", model, "--heads", heads, "--prompts", asked, *quick, "--validate", "1", *arguments]
    return runner.invoke(app, given)


def numbers(values: Any) -> list[float]:
    """All numbers in a JSON value."""
    if isinstance(values, dict | list):
        inner = values.values() if isinstance(values, dict) else values
        return [number for value in inner for number in numbers(value)]
    return [values] if isinstance(values, int | float) else []


def test_command(folders: tuple[str, str, str], tmp_path: Path) -> None:
    heads_folder = Path(folders[1])
    result = command(folders, "--dtype", "float32", "--output", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    file = heads_folder / "calibration.json"
    assert f"stored in {file}" in result.stdout
    for part in ("nodes  ms a step", "AUC", "entropy of softmax(h)", "validation", "chosen:", "x plain decoding"):
        assert part in result.stdout
    (entry,) = json.loads(file.read_text())["entries"]
    assert entry == json.loads((tmp_path / "out" / "calibration-report.json").read_text())
    assert all(math.isfinite(number) for number in numbers(entry))
    assert (tmp_path / "out" / "calibration.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    details = entry["details"]
    assert details["texts"] == 4 and details["tokens"] == 4 * 23, "two turns of one question, and two of one turn"
    assert [row["size"] for row in details["sizes"]] == [1, 2, 4] and details["agreeing"] == 1.0
    assert set(details["expectations"]) == {"drafted", "corrected"}
    assert list(details["gates"]) == list(KINDS)
    assert [signal["name"] for signal in details["signals"]][0] == "entropy of softmax(h)"
    for row in details["validation"].values():
        assert row["steps"] == row["predicted_steps"] and row["same_texts"]
        assert row["tokens_per_second"] > 0 and row["predicted_tokens_per_second"] > 0
    plain = details["validation"][PLAIN]
    pace = (plain["tokens_per_second"] / plain["predicted_tokens_per_second"]) ** 0.5
    foreseen = details["sizes"][0]["tokens_per_second"]
    assert entry["expected"]["plain_tokens_per_second"] == pytest.approx(foreseen * pace)

    model, heads = tiny_model("llama"), CerberusHeads.from_pretrained(heads_folder)
    calibrated = find(heads, model.device, model.dtype, torch.get_num_threads())
    assert calibrated is not None and json.loads(json.dumps(calibrated.to_json())) == entry
    unaided = decode(model, heads, prompt(), max_new_tokens=20, tree=StaticPolicy.root())
    assert decode(model, heads, prompt(), max_new_tokens=20).sequences.equal(unaided.sequences)
    again = runner.invoke(
        app, ["generate", "--model", folders[0], "--heads", folders[1], "--dtype", "float32", "w3 w4"]
    )
    assert again.exit_code == 0, again.output
    file.unlink()


def test_picture_beside_the_calibration() -> None:
    """Heads without a folder; own questions, of which a few are taken; twice, the second one replaces the first."""
    model, heads = tiny_model("llama"), untrained(tiny_model("llama"))
    for _ in range(2):
        found = calibrate(model, heads, word_tokenizer(WORDS), CalibrateOptions(**QUICK))
        assert found.details["texts"] == 6
        stored = find(heads, model.device, model.dtype, torch.get_num_threads())
        assert json.loads(json.dumps(found.to_json())) == json.loads(json.dumps(stored.to_json()))
    file = place(heads)
    assert len(read_entries(file)) == 1 and file.with_suffix(".png").is_file()
    assert sorted(other.suffix for other in file.parent.iterdir()) == [".json", ".png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tokens", "3"), "--tokens must be >= 4, got 3"),
        (("--new-tokens", "1"), "--new-tokens must be >= 2, got 1"),
        (("--rounds", "0"), "--rounds must be >= 1, got 0"),
        (("--validate", "-1"), "--validate must be >= 0, got -1"),
        (("--sizes", "1,two"), "--sizes must be integers separated by commas, got '1,two'"),
        (("--sizes", "0"), "--sizes must be >= 1, got 0"),
        (("--contexts", ""), "--contexts must be integers separated by commas, got ''"),
        (("--contexts", "253"), "--contexts must be at most 252 for this model, got 253"),
        (("--prompts", "missing.jsonl"), "missing.jsonl"),
        (("--dtype", "int8"), "--dtype must be one of"),
    ],
)
def test_bad_option(folders: tuple[str, str, str], arguments: tuple[str, ...], message: str) -> None:
    result = command(folders, *arguments)
    assert result.exit_code == 2 and message in result.output
    assert not (Path(folders[1]) / "calibration.json").exists()


def test_bad_files(folders: tuple[str, str, str], tmp_path: Path) -> None:
    questions_file, taken = tmp_path / "questions.jsonl", tmp_path / "taken"
    questions_file.write_text('{"prompt": 3}\n')
    taken.write_text("")
    for arguments, message in (
        (("--prompts", str(questions_file)), "questions.jsonl line 1"),
        (("--output", str(taken)), "taken"),
    ):
        result = command(folders, *arguments)
        assert result.exit_code == 2 and message in result.output, result.output
    assert len(command(folders, "--prompts", str(questions_file)).output.strip().splitlines()) == 1


def test_a_damaged_calibration_is_found_before_measuring(
    folders: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_module, "decode", None)
    file = Path(folders[1]) / "calibration.json"
    file.write_text("{")
    result = command(folders)
    assert result.exit_code == 2 and f"{file} is no file of calibrations" in result.output
    assert file.read_text() == "{"
    file.unlink()


def test_answers_that_are_too_short() -> None:
    model = tiny_model("llama")
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = list(range(VOCAB))
    try:
        with pytest.raises(ValueError, match="questions must get answers of at least 2 tokens, all were shorter"):
            calibrate(model, untrained(model), word_tokenizer(WORDS), CalibrateOptions(**QUICK))
    finally:
        model.generation_config.eos_token_id = before


def test_a_model_with_few_positions() -> None:
    """gpt2 has 96: texts reach its end, and steps are timed where a tree still has positions."""
    model = tiny_model("gpt2")
    quick = {**QUICK, "contexts": None, "new_tokens": 120, "tokens": 360}
    options = CalibrateOptions(questions=QUESTIONS[1:], **quick)
    found = calibrate(model, untrained(model), word_tokenizer(WORDS), options)
    assert found.details["costs"]["contexts"] == (64, 92)


def test_second_turns_follow_the_first_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tiny_model("llama"), word_tokenizer(WORDS)
    first, second, _ = trace_module.write_answers(model, untrained(model), tokenizer, QUESTIONS[:2], 6)
    said = tokenizer.decode(first.ids[0, first.prompt :])
    assert first.ids[0, :3].tolist() == [3, 4, 5] and (first.question, second.question) == (0, 0)
    expected = tokenizer(f"w3 w4 w5\n\n{said}\n\nw6 w7").input_ids
    assert second.ids[0, : second.prompt].tolist() == expected and second.new == 6


@pytest.mark.parametrize("slower", [False, True])
def test_what_the_clock_decides(slower: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def choosing(texts: Any, costs: Any) -> Choice:
        found = choose(texts, costs)
        return replace(found, chosen=next(name for name in found.settings if name.startswith("confidence")))

    gain = GateGain(1.05, 0.9, (0.85, 0.95) if slower else (0.8, 1.01))
    monkeypatch.setattr(calibrate_module, "choose", choosing)
    monkeypatch.setattr(calibrate_module, "gate_gain", lambda choice, measured: gain)
    model = tiny_model("llama")
    options = CalibrateOptions(questions=QUESTIONS, **QUICK)
    found = calibrate(model, memorize(model, [answer(model, prompt(), 24)]), word_tokenizer(WORDS), options)
    assert isinstance(found.gate, ConfidenceGate) == (not slower)
    assert found.details["gate_gain"]["measured"] == 0.9 and "by the clock 0.900x (0.8" in "\n".join(
        report.lines(found)
    )


def test_first_turns_before_second_ones() -> None:
    pairs: list[Any] = [(Answer(question, prompt(), 1, 1), None) for question in (0, 0, 1, 2, 2, 2)]
    assert [pair[0].question for pair in by_turn(pairs)] == [0, 1, 2, 0, 2, 2]


def test_heads_of_another_kind() -> None:
    model = tiny_model("llama")
    with pytest.raises(TypeError, match="calibrate: heads must be CerberusHeads, got RandomHeads"):
        calibrate(model, RandomHeads(prompt(), 3, VOCAB), word_tokenizer(WORDS))


@pytest.mark.parametrize("name", ["questions", "sizes", "contexts"])
def test_nothing_to_do(name: str) -> None:
    with pytest.raises(ValueError, match=f"calibrate: {name} must have at least one entry, got none"):
        CalibrateOptions(**{name: []})


def test_evenly_spread() -> None:
    assert [spread(list(range(10)), count) for count in (1, 2, 5)] == [[5], [2, 7], [1, 3, 5, 7, 9]]
    assert spread([1, 2], 5) == [1, 2]


def test_own_questions() -> None:
    """As many of each kind, also where two thirds of the usual number of tokens are; all have a second turn."""
    options, own = CalibrateOptions(), questions.OWN_QUESTIONS
    assert len({turn for one in own for turn in one.turns}) == 48 and len({one.id for one in own}) == 24
    assert all(len(one.turns) == 2 for one in own)
    usual, fewer = (spread(own, tokens // (2 * options.new_tokens)) for tokens in (options.tokens, 8192))
    for taken, each in ((own, 3), (usual, 3), (fewer, 2)):
        assert set(Counter(one.category for one in taken).values()) == {each}
