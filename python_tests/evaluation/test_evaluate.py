"""`cerberus bench` from end to end, on a tiny model."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_runs import bench, calibrated, rows_of, way_file
from typer.testing import CliRunner

from cerberus_ext import AlwaysOpen, CerberusHeads, ConfidenceGate, EntropyGate, StaticPolicy, decode
from cerberus_ext.cli.main import app
from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.engine import plan
from cerberus_ext.evaluation.evaluate import BenchOptions, Context, evaluate
from cerberus_ext.evaluation.measuring import median_entropy
from cerberus_ext.io.default_model import load_model
from cerberus_ext.io.prompts import encode_chat, read_questions

OUTPUTS = {"bench.json", "bench.md", "index.html", "speed_up.png", "accepted.png", "time.png"}
runner = CliRunner()


@pytest.fixture(scope="module")
def everything(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run with all ways but the calibrated one: its folder, and how it ended."""
    out = tmp_path_factory.mktemp("everything") / "out"
    arguments = ["--medusa", str(folder / "medusa"), "--draft-model", str(folder / "draft")]
    return out, bench(folder, out, *arguments, "--tree-size", "9")


ALL_WAYS = [
    "autoregressive", "generate", "prompt-lookup", "assisted", "medusa", "suffix", "cerberus-static",
    "cerberus-dynamic", "cerberus", "cerberus-entropy",
]  # fmt: skip
DYNAMIC_WAYS = ("suffix", "cerberus-dynamic", "cerberus")
OF_DECODE = [name for name in ALL_WAYS if name not in ("autoregressive", "generate", "prompt-lookup", "assisted")]


def test_all_ways_run_and_say_the_same(everything: tuple[Path, Any]) -> None:
    out, done = everything
    assert done.exit_code == 0, done.output
    assert OUTPUTS | {"results.jsonl"} == {file.name for file in out.iterdir()}
    header, *rows = rows_of(out)
    assert list(header["identity"]["ways"]) == ALL_WAYS
    texts: dict[tuple, set] = {}
    for row in rows:
        if "way" in row:
            texts.setdefault((row["question"], row["turn"]), set()).add((row["way"], tuple(row["tokens"])))
    assert len(texts) == 7  # four questions, one of which has one turn
    for found in texts.values():
        assert {way for way, _ in found} == set(ALL_WAYS) and len({tokens for _, tokens in found}) == 1
    assert all(row["parts"] == {} for row in rows if "parts" in row)
    assert "All are the same." in done.output
    assert "left out: cerberus-calibrated: no calibration is stored for this machine" in done.output


def test_ways_take_turns_in_being_first(everything: tuple[Path, Any]) -> None:
    rows = [row for row in rows_of(everything[0]) if "way" in row]
    first: dict[str, str] = {}
    for row in rows:
        first.setdefault(row["key"].rsplit("/", 1)[0], row["way"])
    assert list(first.values()) == ALL_WAYS[:7]


def test_numbers_of_a_run(everything: tuple[Path, Any]) -> None:
    out, _ = everything
    summary = json.loads((out / "bench.json").read_text())
    assert summary["categories"] == ["all", "first", "second"] and summary["texts"] == 7 and summary["questions"] == 4
    for name in OF_DECODE:
        decode = summary["ways"][name]["all"]["decode"]
        assert decode["steps"] == sum(decode["accepted_histogram"])
        assert decode["tokens_per_step"] > 1 and 0 < decode["gate_open_rate"] <= 1
        assert summary["settings"]["ways"][name].count("tree of 9 nodes") == 1
        assert 1 < decode["nodes_per_step"] <= 9
        assert ("dynamic tree" in summary["settings"]["ways"][name]) == (name in DYNAMIC_WAYS)
    assert 0.1 < summary["ways"]["cerberus-entropy"]["all"]["decode"]["gate_open_rate"] < 0.9  # the median threshold
    assert set(summary["over_medusa"]) == set(OF_DECODE) - {"medusa"}
    assert summary["settings"]["machine"]["threads"] == str(torch.get_num_threads())
    text = (out / "bench.md").read_text()
    for category in summary["categories"]:
        assert f" {category} |" in text
    assert str(out) not in text and str(out.parent) not in (out / "index.html").read_text()


def test_a_second_turn_follows_the_models_own_answer(everything: tuple[Path, Any], folder: Path) -> None:
    _, tokenizer = load_model(folder / "model", torch.float32, "cpu")
    rows = {row["key"]: row for row in rows_of(everything[0]) if "way" in row}
    question = read_questions(folder / "questions.jsonl")[0]
    said = tokenizer.decode(rows["7/1/0/autoregressive"]["tokens"], skip_special_tokens=True)
    expected = encode_chat(tokenizer, [question.turns[0], said, question.turns[1]]).shape[1]
    assert expected > 12 and {rows[f"7/2/0/{way}"]["prompt_tokens"] for way in ALL_WAYS} == {expected}


def test_only_second_turns(folder: Path, tmp_path: Path, everything: tuple[Path, Any]) -> None:
    done = bench(folder, tmp_path, "--turns", "2", "--ways", "generate")
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "bench.json").read_text())
    assert summary["texts"] == 3 and list(summary["ways"]) == ["autoregressive", "generate"]
    before = {row["key"]: row["tokens"] for row in rows_of(everything[0]) if "way" in row}
    for row in rows_of(tmp_path):
        if "way" in row:
            assert row["tokens"] == before[row["key"]]


SMALL = ("--ways", "generate,cerberus", "--limit", "2", "--turns", "1")


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The results of a run with the options SMALL."""
    out = tmp_path_factory.mktemp("finished")
    assert bench(folder, out, *SMALL).exit_code == 0
    return (out / "results.jsonl").read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.97, 1.0])
def test_a_killed_run_goes_on(share: float, folder: Path, tmp_path: Path, finished: bytes) -> None:
    """A kill leaves the file's beginning, up to any byte."""
    file, whole = tmp_path / "results.jsonl", finished
    kept = whole[: int(share * len(whole))]
    file.write_bytes(kept)
    done = bench(folder, tmp_path, *SMALL)
    assert done.exit_code == 0, done.output
    now = file.read_bytes()
    lines = kept[: kept.rfind(b"\n") + 1]
    assert now.startswith(lines)
    assert [json.loads(line).get("key") for line in now.splitlines()] == [
        json.loads(line).get("key") for line in whole.splitlines()
    ]


def test_nothing_is_run_twice(folder: Path, tmp_path: Path) -> None:
    file = way_file(tmp_path, "open(__file__ + '.calls', 'a').write('x')")
    options = ["--way", str(file), "--ways", "mine", "--turns", "1"]
    assert bench(folder, tmp_path / "out", *options).exit_code == 0
    calls = Path(f"{file}.calls").read_text()
    assert len(calls) == 1 + 4  # one to warm up
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    assert bench(folder, tmp_path / "out", *options).exit_code == 0
    assert Path(f"{file}.calls").read_text() == calls and (tmp_path / "out" / "results.jsonl").read_bytes() == before


def test_more_questions_may_follow(folder: Path, tmp_path: Path) -> None:
    assert bench(folder, tmp_path, *SMALL[:2], "--turns", "1", "--limit", "1").exit_code == 0
    assert bench(folder, tmp_path, *SMALL[:2], "--turns", "1").exit_code == 0
    assert json.loads((tmp_path / "bench.json").read_text())["texts"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--new-tokens", "9"], "--new-tokens must be 12 to go on"),
        (["--ways", "generate"], "ways must be"),
        (["--turns", "2"], "turns must be [1] to go on"),
        (["--tree-size", "5"], "--tree-size must be None"),
        (["--rounds", "2"], "rounds must be 1"),
        (["--threads", str(torch.get_num_threads() + 1)], "machine must be"),
    ],
)
def test_other_settings_are_refused(
    change: list[str], message: str, folder: Path, tmp_path: Path, finished: bytes
) -> None:
    (tmp_path / "results.jsonl").write_bytes(finished)
    threads = torch.get_num_threads()
    try:
        done = bench(folder, tmp_path, *SMALL, *change)
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 2 and message in done.output, done.output
    assert (tmp_path / "results.jsonl").read_bytes() == finished


def test_other_heads_are_refused(folder: Path, tmp_path: Path, finished: bytes) -> None:
    (tmp_path / "results.jsonl").write_bytes(finished)
    done = bench(folder, tmp_path, *SMALL, "--heads", str(folder / "medusa"))
    assert done.exit_code == 2 and "heads must be heads to go on" in done.output


WRONG = "tokens[5] = (tokens[5] + 1) % 60"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_text_is_found(dtype: str, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = bench(folder, out, "--way", str(way_file(tmp_path, WRONG)), "--ways", "mine", "--turns", "1", dtype=dtype)
    assert done.exit_code == 1, done.output
    summary = json.loads((out / "bench.json").read_text())
    first = summary["equality"]["violations"][0]
    assert (first["way"], first["new_token"], first["text"]) == ("mine", 5, "7/1/0")
    assert first["got"] == (first["want"] + 1) % 60 and first["gap"] > 0.1
    assert "VIOLATION" in done.output and "VIOLATION" in (out / "bench.md").read_text()
    assert "Texts differ that must not" in (out / "index.html").read_text()
    assert runner.invoke(app, ["bench", "--report", str(out)]).exit_code == 1


def test_a_text_that_ends_early_is_found(folder: Path, tmp_path: Path) -> None:
    file = way_file(tmp_path, "tokens = tokens[:-1]")
    done = bench(folder, tmp_path / "out", "--way", str(file), "--ways", "mine", "--limit", "1", "--turns", "1")
    assert done.exit_code == 1 and "new token 11 is None" in done.output, done.output


def test_a_way_in_decode_must_be_exact_in_bfloat16(folder: Path, tmp_path: Path) -> None:
    """However near a tie it is."""
    body = "tokens[3], stats = (tokens[3] + 1) % 60, out.stats"
    file = way_file(tmp_path, body)
    done = bench(
        folder, tmp_path / "out", "--way", str(file), "--ways", "mine", "--limit", "1", "--turns", "1", dtype="bfloat16"
    )
    assert done.exit_code == 1, done.output


def test_what_was_foreseen_is_compared(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = bench(folder, out, "--way", str(way_file(tmp_path, "")), "--ways", "mine", "--turns", "1")
    assert done.exit_code == 0, done.output
    found = json.loads((out / "bench.json").read_text())["expected"]["mine"]
    assert found["expected"] == 123 and found["deviation_percent"] == pytest.approx((123 / found["measured"] - 1) * 100)
    assert re.search(r"\| mine \| 123.0 \| [\d.]+ \| [+-][\d.]+ % \|", (out / "bench.md").read_text())


@pytest.mark.parametrize("gate", [EntropyGate(1.25), ConfidenceGate({1: 1.0, 8: 1.2})], ids=["entropy", "confidence"])
def test_what_calibration_stored_is_used(gate: Any, folder: Path, tmp_path: Path) -> None:
    heads = calibrated(folder, tmp_path / "heads", gate)
    done = bench(folder, tmp_path / "out", "--turns", "1", "--limit", "2", "--heads", str(heads))
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "out" / "bench.json").read_text())
    ways = summary["settings"]["ways"]
    assert ways["cerberus-static"] == "heads, tree of 4 nodes, drafts at every step", "not calibrated"
    assert ways["cerberus-calibrated"].endswith(type(gate).__name__)
    assert ("< 1.25" in ways["cerberus-entropy"]) == isinstance(gate, EntropyGate)
    assert {name: found["expected"] for name, found in summary["expected"].items()} == {
        "autoregressive": 25.0,
        "cerberus-calibrated": 50.0,
    }
    assert "cerberus-calibrated: calibration foresaw 50.0 tokens/s behind the prompt, measured" in done.output
    calibrated(folder, tmp_path / "heads", EntropyGate(1.5))  # with another gate
    again = bench(folder, tmp_path / "out", "--turns", "1", "--limit", "2", "--heads", str(heads))
    assert again.exit_code == 2 and "calibration must be" in again.output


@pytest.mark.parametrize("size", [None, 9])
def test_a_calibrated_tree_that_is_made_anew(size: int | None, folder: Path, tmp_path: Path) -> None:
    """It says how probabilities are corrected; its size is for all such ways, unless the user wants another."""
    stored = DynamicPolicy(6, drafts=4, platt=((0.5, 0.1),) * 3)
    heads = calibrated(folder, tmp_path / "heads", ConfidenceGate({1: 1.0, 8: 1.2}), stored)
    options = ["--turns", "1", "--limit", "1", "--heads", str(heads), "--entropy-threshold", "1"]
    done = bench(folder, tmp_path / "out", *options, *(["--tree-size", str(size)] if size else []))
    assert done.exit_code == 0, done.output
    ways = json.loads((tmp_path / "out" / "bench.json").read_text())["settings"]["ways"]
    for name in DYNAMIC_WAYS:
        assert f", dynamic tree of {size or 6} nodes, drafts at every step" in ways[name]
    assert ways["cerberus-calibrated"] == "as calibrated, dynamic tree of 6 nodes, ConfidenceGate"
    model, tokenizer = load_model(folder / "model", torch.float32, "cpu")
    context = Context(model, tokenizer, CerberusHeads.from_pretrained(heads), size)
    assert context.dynamic_tree() == replace(stored, size=size or 6)
    assert context.suffix_tree() == DynamicPolicy(size or 6, drafts=4)


def test_rounds(folder: Path, tmp_path: Path) -> None:
    done = bench(folder, tmp_path, "--rounds", "3", "--ways", "generate", "--limit", "1", "--turns", "1")
    assert done.exit_code == 0, done.output
    rows = [row for row in rows_of(tmp_path) if row.get("way") == "generate"]
    assert [row["round"] for row in rows] == [0, 1, 2]
    seconds = json.loads((tmp_path / "bench.json").read_text())["ways"]["generate"]["all"]["seconds"]
    assert seconds == sorted(row["seconds"] for row in rows)[1]


def test_the_report_is_made_anew(everything: tuple[Path, Any], tmp_path: Path) -> None:
    out, _ = everything
    shutil.copy(out / "results.jsonl", tmp_path)
    done = runner.invoke(app, ["bench", "--report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert {file.name for file in tmp_path.iterdir()} - {"cache"} == OUTPUTS | {"results.jsonl"}
    for name in ("bench.json", "bench.md", "index.html"):
        assert (tmp_path / name).read_bytes() == (out / name).read_bytes()


def test_an_unfinished_text_is_left_out(everything: tuple[Path, Any], tmp_path: Path) -> None:
    lines = (everything[0] / "results.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_bytes(b"".join(lines[: 1 + 2 * 11 + 3]))  # two texts of ten ways, then three
    done = runner.invoke(app, ["bench", "--report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "bench.json").read_text())["texts"] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there must be results in"),
        (b"", "there must be results in"),
        (b'{"identity": {"ways": {}, "turns": [1]}, "about": {}}\n', "must have a text that every way has made"),
        (b"[1]\n", "line 1: must be a result"),
        (b'{"identity": {}, "about": {}}\nnonsense\n{}\n', "line 2: must be a result"),
    ],
)
def test_no_report_without_results(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "results.jsonl").write_bytes(content)
    done = runner.invoke(app, ["bench", "--report", str(tmp_path)])
    assert done.exit_code == 2 and message in done.output.replace("\n", " "), done.output
    assert not (tmp_path / "bench.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ways", "nonsense"], "ways must be of autoregressive, generate, prompt-lookup, suffix, cerberus-static"),
        (["--ways", "medusa"], "ways must not name medusa here: no heads of that kind were given"),
        (["--ways", "cerberus-calibrated"], "no calibration is stored"),
        (["--way", "missing.py"], "there is no file missing.py"),
        (["--way", __file__], "a file with a function ways(context), test_evaluate.py has none"),
        (["--turns", "3"], "--turns must be one of 1, 2, both"),
        (["--medusa", "HEADS"], "medusa must be heads with chained=False"),
        (["--medusa", "nowhere"], "--medusa: "),
        (["--draft-model", "nowhere/at/all"], "--draft-model: "),
        (["--limit", "0"], "limit"),
        (["--report", "x"], "--report: it makes a report of what is measured already"),
        (["--seed", "-1"], "seed"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if arguments[0] == "--way":  # refused before a model is loaded
        monkeypatch.setattr("cerberus_ext.cli.bench.load", None)
    arguments = [str(folder / "heads") if argument == "HEADS" else argument for argument in arguments]
    done = bench(folder, tmp_path / "out", *arguments)
    assert done.exit_code == 2, done.output
    assert message in " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.output).split()), done.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model", "heads"])
def test_a_folder_with_a_model_is_no_place_for_results(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cerberus_ext.cli.bench.load", None)
    before = sorted((folder / name).iterdir())
    done = bench(folder, folder / name, *SMALL)
    there = f"{folder / name / 'config.json'} is there already, and was not made by cerberus bench; choose another"
    assert done.exit_code == 2 and f"cerberus: --out: {there} folder" in done.output, done.output
    assert sorted((folder / name).iterdir()) == before


def test_questions_and_folder_are_needed(tmp_path: Path) -> None:
    done = runner.invoke(app, ["bench", "--out", str(tmp_path)])
    assert done.exit_code == 2 and "--questions FILE and --out DIR are needed" in done.output


def test_no_second_turns_at_all(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text('{"prompt": "w1 w2"}\n')
    done = bench(folder, tmp_path / "out", "--questions", str(file), "--turns", "2")
    assert done.exit_code == 2 and "questions must have a turn 2, none has" in done.output
    assert bench(folder, tmp_path / "out", "--questions", str(file), "--turns", "both").exit_code == 0
    summary = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert summary["categories"] == ["all"] and summary["texts"] == 1


def test_questions_need_ids_of_their_own(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "two.jsonl"
    file.write_text('{"question_id": 1, "turns": ["w1"]}\n' * 2)
    done = bench(folder, tmp_path / "out", "--questions", str(file))
    assert done.exit_code == 2 and "questions must have ids of their own" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"new_tokens": 0}, "new_tokens must be >= 1, got 0"),
        ({"rounds": 0}, "rounds must be >= 1"),
        ({"tree_size": 1}, "tree_size must be >= 2"),
        ({"entropy_threshold": float("nan")}, "entropy_threshold must be a number"),
        ({"turns": ()}, "turns must be ascending"),
        ({"turns": (2, 1)}, "turns must be ascending"),
    ],
)
def test_bad_python_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BenchOptions(**options)


def test_python_call(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(folder / "model", torch.float32, "cpu")
    heads = CerberusHeads.from_pretrained(folder / "heads")
    questions = read_questions(folder / "questions.jsonl", 1)
    options = BenchOptions(turns=(1,), new_tokens=1, ways=("cerberus",), entropy_threshold=1.0)
    summary = evaluate(model, tokenizer, heads, questions, tmp_path, options)
    # One token: it comes with the prompt, and there is no step.
    found = summary["ways"]["cerberus"]["all"]
    assert found["tokens"] == 1 and found["decode"]["tokens_per_step"] is None
    assert "| cerberus | – |" in (tmp_path / "bench.md").read_text()


def test_median_entropy_where_plain_decoding_is_the_fastest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate is not asked about a plain step, and so sees no entropy there."""
    model, tokenizer = load_model(folder / "model", torch.float32, "cpu")
    context = Context(model, tokenizer, CerberusHeads.from_pretrained(folder / "heads"))
    questions = read_questions(folder / "questions.jsonl")
    want = median_entropy(context, questions)
    plain = SimpleNamespace(tree=StaticPolicy.root(), gate=AlwaysOpen(), batches=None)
    monkeypatch.setattr(plan, "find", lambda *arguments: plain)
    assert decode(model, context.heads, [3, 4], max_new_tokens=8).stats.open_steps == 0
    assert median_entropy(context, questions) == want
