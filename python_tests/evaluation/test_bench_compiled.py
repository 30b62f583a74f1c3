"""`cerberus bench --compile`: ways with compiled steps beside the others. What inductor makes is not the matter here,
and takes seconds, so the pieces of a step are run op by op."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_runs import bench, calibrated, rows_of, way_file

from cerberus_ext import AlwaysOpen, CerberusHeads, Decoder, decode
from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.evaluation.evaluate import BenchOptions, evaluate
from cerberus_ext.evaluation.ways import COMPILED
from cerberus_ext.io.default_model import load_model
from cerberus_ext.io.prompts import read_questions
from cerberus_ext.runtime import compiled_step
from cerberus_ext.runtime.compiled_step import CompileError

SMALL = ("--limit", "2", "--turns", "1")


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each piece that would be compiled the number of nodes."""
    found: list[int] = []
    monkeypatch.setattr(compiled_step, "_compile_piece", lambda piece, examples, nodes: found.append(nodes) or piece)
    return found


def test_all_run_beside_the_others(folder: Path, tmp_path: Path) -> None:
    heads, out = calibrated(folder, tmp_path / "heads", AlwaysOpen(), DynamicPolicy(6)), tmp_path / "out"
    names = ("generate", "cerberus", "cerberus-calibrated", *COMPILED)
    done = bench(folder, out, *SMALL, "--compile", "--heads", str(heads), "--ways", ",".join(names))
    assert done.exit_code == 0 and "All are the same." in done.output, done.output
    rows = {row["key"]: row for row in rows_of(out)[1:]}
    texts = [row for row in rows.values() if "way" in row]
    assert {row["way"] for row in texts} == {"autoregressive", *names}
    for row in texts:
        if row["stats"]:
            assert (row["stats"]["compilations"], row["stats"]["compile_seconds"]) == (0, 0.0)
            assert (row["stats"]["row_invariant"] is True) == (row["way"] in COMPILED), "whose steps were compiled"
    # An earlier way's sizes serve the later ones: a plain step, then 4 and 6 nodes, then nothing.
    assert [rows[f"compiled/{name}"]["compilations"] for name in COMPILED] == [1, 2, 0]
    assert "compiled/cerberus" not in rows

    summary = json.loads((out / "bench.json").read_text())
    for name in ("cerberus", "cerberus-compiled"):
        over = summary["ways"][name]["all"]["over"]
        assert {"autoregressive", "autoregressive-compiled", "generate"} <= set(over)
        both = (summary["ways"][one]["all"]["tokens_per_second"] for one in (name, "autoregressive-compiled"))
        assert over["autoregressive-compiled"]["total"] == pytest.approx(next(both) / next(both))
    assert list(summary["compiled"]) == list(COMPILED)
    assert all(one["timed_compile_seconds"] == 0 for one in summary["compiled"].values())
    report = (out / "bench.md").read_text()
    assert "| over autoregressive | over autoregressive-compiled | over generate |" in report
    assert "\n## Compiling\n" in report and "--compile" in summary["about"]["command"]
    assert "cerberus-compiled: compiled 2 sizes of steps in" in done.output


def test_a_run_goes_on_with_what_it_had_compiled(folder: Path, tmp_path: Path) -> None:
    options = ("--turns", "1", "--tree-size", "4", "--ways", "cerberus-compiled")
    assert bench(folder, tmp_path, "--compile", "--limit", "1", *options).exit_code == 0
    first = [row for row in rows_of(tmp_path) if row.get("key", "").startswith("compiled/")]
    assert len(first) == 2
    assert bench(folder, tmp_path, "--compile", "--limit", "2", *options).exit_code == 0
    rows = rows_of(tmp_path)
    assert [row for row in rows if row.get("key", "").startswith("compiled/")] == first, "how long it took at first"
    assert {row["way"] for row in rows if "way" in row} == {"autoregressive", "autoregressive-compiled", options[-1]}
    other = bench(folder, tmp_path, "--limit", "2", *options[:-1], "generate")
    assert other.exit_code == 2 and "to go on with results.jsonl" in other.output


def test_they_have_to_be_asked_for(folder: Path, tmp_path: Path) -> None:
    done = bench(folder, tmp_path, *SMALL, "--ways", "cerberus-compiled")
    assert done.exit_code == 2 and "cerberus-compiled here: compiled steps were not asked for" in done.output
    done = bench(folder, tmp_path / "out", "--limit", "1", "--turns", "1", "--entropy-threshold", "1")
    assert done.exit_code == 0 and "left out: cerberus-compiled: compiled steps were not asked for" in done.output
    assert not set(COMPILED) & set(json.loads((tmp_path / "out" / "bench.json").read_text())["ways"])


def test_without_a_calibration(folder: Path, tmp_path: Path) -> None:
    done = bench(folder, tmp_path, *SMALL, "--compile", "--ways", "cerberus-calibrated-compiled")
    assert done.exit_code == 2 and "no calibration is stored for this machine" in done.output


@pytest.mark.parametrize("compiled", [False, True])
def test_which_calibration_counts(compiled: bool, folder: Path, tmp_path: Path) -> None:
    """That of compiled steps, or else that of the others, which foresees nothing of compiled ones."""
    heads = calibrated(folder, tmp_path / "heads", AlwaysOpen(), DynamicPolicy(6))
    if compiled:
        calibrated(folder, heads, AlwaysOpen(), DynamicPolicy(8), compiled=True)
    options = ("--compile", "--heads", str(heads), "--ways", "cerberus-calibrated,cerberus-calibrated-compiled")
    done = bench(folder, tmp_path / "out", "--limit", "1", "--turns", "1", *options)
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "out" / "bench.json").read_text())
    about = summary["settings"]["ways"]["cerberus-calibrated-compiled"]
    assert about.startswith(f"as calibrated, dynamic tree of {8 if compiled else 6} nodes, drafts at every step, comp")
    assert about.endswith("(calibrated for steps that are not)") == (not compiled)
    assert "of 6 nodes" in summary["settings"]["ways"]["cerberus-calibrated"]
    foreseen = {"autoregressive-compiled", "cerberus-calibrated-compiled"}
    assert set(summary["expected"]) == {"autoregressive", "cerberus-calibrated", *(foreseen if compiled else ())}
    assert set(summary["settings"]["calibration"]) == {"heads", "compiled"}


COMPILED_WAY = "tokens[3], stats = (tokens[3] + 1) % 60, out.stats; self.compiled = True"


@pytest.mark.parametrize("body", [COMPILED_WAY, COMPILED_WAY.replace("True", "False")], ids=["compiled", "not"])
def test_whose_text_a_way_has_to_have(body: str, folder: Path, tmp_path: Path) -> None:
    """Compiled steps round differently: such ways are compared with each other, to the bit."""
    file = way_file(tmp_path, body)
    file.write_text(file.read_text().replace("expected = 123.0", f"compiled = {body == COMPILED_WAY}"))
    options = ("--compile", "--ways", "mine,autoregressive-compiled", "--way", str(file))
    done = bench(folder, tmp_path / "out", *SMALL, *options, dtype="bfloat16")
    assert done.exit_code == 1, done.output
    summary = json.loads((tmp_path / "out" / "bench.json").read_text())
    other = "autoregressive-compiled" if body == COMPILED_WAY else "autoregressive"
    assert {(one["way"], one["other"], one["exact"]) for one in summary["equality"]["violations"]} == {
        ("mine", other, True)
    }
    assert f"{other} has" in done.output


def test_steps_that_cannot_be_compiled(folder: Path, tmp_path: Path) -> None:
    """It is said before anything is written."""
    model, tokenizer = load_model(folder / "model", torch.float32, "cpu")
    model.model.layers[0].register_forward_hook(lambda *_: None)
    heads, questions = CerberusHeads.from_pretrained(folder / "heads"), read_questions(folder / "questions.jsonl", 1)
    with pytest.raises(CompileError, match="the model has hooks"):
        evaluate(model, tokenizer, heads, questions, tmp_path / "out", BenchOptions(compile=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "tree", [None, DynamicPolicy(9), StaticPolicy.from_widths([2, 2])], ids=["default", "9", "static"]
)
def test_warmed_up(tree: Any, folder: Path, pieces: list[int]) -> None:
    model, _ = load_model(folder / "model", torch.float32, "cpu")
    heads = CerberusHeads.from_pretrained(folder / "heads")
    decoder = Decoder(model, heads, tree=tree, compile=True)
    stats = decoder.warm_up()
    sizes = {None: {1, 4, 6}, DynamicPolicy(9): {1, 4, 8, 9}}.get(tree, {1, 7})
    assert set(pieces) == sizes and stats.compilations == len(sizes) and stats.row_invariant is True
    assert stats.compile_seconds > 0 and stats.steps == 0
    out = decode(model, heads, torch.tensor([[3, 4, 5]]), max_new_tokens=20, tree=tree, compile=True)
    assert out.stats.compilations == 0 and decoder.warm_up().compilations == 0
