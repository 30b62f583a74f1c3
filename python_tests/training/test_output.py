"""The output folder of a run: nothing of the user's is written over, and a failed write leaves the last good files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
from training_runs import options
from transformers import LlamaForCausalLM

from cerberus_ext import CerberusHeads
from cerberus_ext.io import files
from cerberus_ext.training.output import NAMES, check_output
from cerberus_ext.training.train import train

QUICK = {"steps": 4, "eval_every": 2, "warmup": 1, "heads": 1, "layers": 1}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_the_users_is_refused(name: str, llama: LlamaForCausalLM, answers: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"mine": 1}')
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"train: output: .*/{name} is there already, and was not made by"):
        train(llama, options(answers, tmp_path, **QUICK))
    assert contents(tmp_path) == before


def test_a_symbolic_link_is_the_folder_that_it_leads_to(answers: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "link").symlink_to("model")
    with pytest.raises(ValueError, match="train: output: .*/link is the folder of --model"):
        check_output(options(answers, tmp_path / "link"), str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("inside", "given"),
    [
        ("", {"model": "."}),
        ("", {"init": "."}),
        ("data", {"model": "data"}),
        ("data", {"prompts": "data/answers-00000.jsonl"}),
        ("", {"data": "model.safetensors"}),
        ("data", {"cache": "data"}),
    ],
)
def test_what_is_read_must_not_lie_where_is_written(inside: str, given: dict[str, str], tmp_path: Path) -> None:
    """Not even where the folder is a run's."""
    (tmp_path / inside).mkdir(exist_ok=True)
    for file in ("training.json", "model.safetensors", f"{inside or '.'}/answers-00000.jsonl"):
        (tmp_path / file).write_text('{"made_by": "cerberus train"}')
    paths: dict[str, Any] = {name: tmp_path / value for name, value in given.items()}
    model = paths.pop("model", None)
    (name,) = given
    asked = options(None, tmp_path)
    for key, path in paths.items():
        setattr(asked, key, str(path) if key == "init" else path)
    with pytest.raises(ValueError, match=f"train: (output|cache): .*{name}|train: cache: "):
        check_output(asked, None if model is None else str(model))


def test_neighbours_parents_and_children_are_fine(answers: Path, tmp_path: Path) -> None:
    model = tmp_path / "models" / "mine"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    for output in (model / "heads", tmp_path / "models", tmp_path / "models" / "heads", tmp_path):
        check_output(options(answers, output, cache=output), str(model))
    assert contents(tmp_path) == {"models/mine/config.json": b"{}"}


def test_a_file_is_no_output(answers: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="train: output: .*/file is a file, not a folder"):
        check_output(options(answers, tmp_path / "file"), None)


@pytest.mark.parametrize("killed", [False, True])
def test_a_folder_of_a_run_is_gone_on_with(
    killed: bool, llama: LlamaForCausalLM, answers: Path, tmp_path: Path
) -> None:
    train(llama, options(answers, tmp_path, **QUICK))
    file = tmp_path / "training.json"
    made = json.loads(file.read_text())
    assert made["made_by"] == "cerberus train"
    if killed:  # before the first measurement
        file.write_text(json.dumps({"made_by": made["made_by"]}))
    again = train(llama, options(answers, tmp_path, **QUICK))
    assert again is not None and again["curve"] == made["curve"]


def test_a_changed_model_card_stays(llama: LlamaForCausalLM, answers: Path, tmp_path: Path) -> None:
    train(llama, options(answers, tmp_path, **QUICK))
    card = tmp_path / "README.md"
    assert "heads for unknown" in card.read_text()
    train(llama, options(answers, tmp_path, **QUICK))
    assert "heads for unknown" in card.read_text()
    card.write_text("my own words")
    for _ in range(2):
        train(llama, options(answers, tmp_path, **QUICK))
        assert card.read_text() == "my own words"


def test_a_full_disk_leaves_the_last_good_files(
    llama: LlamaForCausalLM, answers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is full at the second measurement, and the run goes on where the first one was once there is room."""
    save, calls = files.save_file, list[str]()

    def full(tensors: Any, file: Path, metadata: Any = None) -> None:
        calls.append(file.name)
        if len(calls) <= 2:  # heads and checkpoint of the first measurement
            return save(tensors, file, metadata)
        file.write_bytes(b"half")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    whole = tmp_path / "whole"
    train(llama, options(answers, whole, **QUICK))
    output = tmp_path / "full"
    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match=rf"No space left on device: '{output}/(model|checkpoint).safetensors'"):
        train(llama, options(answers, output, **QUICK))
    assert len(calls) == 3 and not list(output.glob("*.partial"))
    assert json.loads((output / "training.json").read_text())["steps"] == 2
    assert CerberusHeads.from_pretrained(output).config.num_heads == 1
    monkeypatch.setattr(files, "save_file", save)
    train(llama, options(answers, output, **QUICK))
    for name in ("model.safetensors", "config.json"):
        assert (output / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("damage", [lambda content: content[:200], lambda content: b"garbage", lambda content: b""])
def test_a_damaged_checkpoint(damage: Any, llama: LlamaForCausalLM, answers: Path, tmp_path: Path) -> None:
    train(llama, options(answers, tmp_path, **QUICK))
    file = tmp_path / "checkpoint.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"train: output: .*/checkpoint.safetensors is no checkpoint .*; remove it"):
        train(llama, options(answers, tmp_path, **QUICK))


def test_a_cache_folder_of_something_else(llama: LlamaForCausalLM, answers: Path, tmp_path: Path) -> None:
    record = tmp_path / "cache" / "cache.json"
    record.parent.mkdir()
    for text in ('{"mine": 1}', "[]", "no JSON"):
        record.write_text(text)
        with pytest.raises(ValueError, match=r"train: cache: .*/cache.json .*; choose another folder"):
            train(llama, options(answers, tmp_path / "heads", cache=record.parent, **QUICK))
        assert record.read_text() == text
