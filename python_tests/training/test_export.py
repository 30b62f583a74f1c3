"""`export_dataset`: the answers as rows for other trainers, never over a file that is not one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_llama import VOCAB
from training_runs import options
from transformers import LlamaForCausalLM

from cerberus_ext.training.answers import read_answers
from cerberus_ext.training.export import check_export, export_dataset
from cerberus_ext.training.train import train

QUICK = {"steps": 2, "eval_every": 2, "warmup": 1, "heads": 1, "layers": 1}


def test_every_answer_is_a_row(answers: Path, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    file = tmp_path / "sets" / "rows.jsonl"
    for _ in range(2):  # the same command goes on with what is there
        train(llama, options(answers, tmp_path / "out", export_dataset=file, **QUICK))
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        lines = [json.loads(line) for line in answers.read_text().splitlines()]
        assert len(rows) == len(lines) == 40
        for row, line in zip(rows, lines, strict=True):
            assert list(row) == ["input_ids", "loss_mask"] and row["input_ids"] == line["p"] + line["r"]
            assert row["loss_mask"] == [0] * len(line["p"]) + [1] * len(line["r"])
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert "export_dataset" not in record["options"]  # names no folder of the machine


@pytest.mark.parametrize("content", ["mine", "", '{"p": [1], "r": [2]}\n', '["input_ids", "loss_mask"]\n'])
def test_a_file_of_the_users_is_refused_before_anything_else(
    content: str, answers: Path, llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"train: export_dataset: .*/rows.jsonl is there already, and holds no such"):
        train(llama, options(answers, tmp_path / "out", export_dataset=file, **QUICK))
    assert file.read_text() == content and not (tmp_path / "out").exists()


def test_rows_of_other_answers_stay(answers: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"input_ids": [1, 2], "loss_mask": [0, 1]}\n')
    before = file.read_bytes()
    check_export(file)
    with pytest.raises(ValueError, match=r"train: export_dataset: .*/rows.jsonl is there already, with other rows"):
        export_dataset(read_answers([answers], VOCAB), file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["training.json", "config.json", "model.safetensors"])
def test_it_is_no_file_of_the_run(name: str, answers: Path, llama: LlamaForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"train: output: .*/{name} is written there, and --export-dataset is"):
        train(llama, options(answers, tmp_path, export_dataset=tmp_path / name, **QUICK))
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_file(answers: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is there already, and holds no such rows"):
        check_export(tmp_path)
