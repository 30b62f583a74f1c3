"""`cerberus train --ray`: replicas on a cluster write the answers that one process would write."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ray_clusters import two_nodes
from training_runs import model_folder
from typer.testing import CliRunner

from cerberus_ext.cli.main import app
from cerberus_ext.training import self_distill
from cerberus_ext.training.self_distill import ShardWriter

ARGUMENTS = [
    "--tokens", "2500", "--max-new-tokens", "24", "--rows", "8", "--heads", "2", "--steps", "2", "--batch", "64",
    "--warmup", "1", "--eval-every", "2", "--device", "cpu", "--threads", "1",
]  # fmt: skip


def run(folder: Path, output: Path, *more: str) -> Any:
    threads = torch.get_num_threads()
    result = CliRunner().invoke(app, ["train", "--model", str(folder), "--output", str(output), *ARGUMENTS, *more])
    torch.set_num_threads(threads)
    return result


def files(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in [*(output / "data").iterdir(), output / "model.safetensors"]}


@pytest.mark.slow
def test_on_two_nodes_one_of_which_loses_its_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    died, wrote = tmp_path / "died", tmp_path / "wrote"

    class Mortal(ShardWriter):
        def write(self, number: int) -> Any:
            if number == 3 and not died.exists():
                died.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            answers = super().write(number)
            with wrote.open("a") as file:
                file.write(f"{number} {os.getpid()}\n")
            return answers

    folder, here, there = (tmp_path / name for name in ("model", "here", "there"))
    model_folder(folder)
    assert run(folder, here).exit_code == 0
    shards = len(list((here / "data").glob("answers-*")))
    assert shards > 6
    monkeypatch.setattr(self_distill, "ShardWriter", Mortal)
    with two_nodes(monkeypatch, tmp_path) as address:
        ray = ["--ray", address, "--replicas", "2"]
        result = run(folder, there, *ray)
        assert result.exit_code == 0, result.output
        assert files(there) == files(here)
        lines = [line.split() for line in wrote.read_text().splitlines()]
        assert {int(number) for number, _ in lines} >= set(range(shards))
        assert len({pid for _, pid in lines} - {died.read_text()}) == 2  # the other one, and the successor

        for number in range(4, shards):  # stopped; the training then begins again
            (there / "data" / f"answers-{number:05d}.jsonl").unlink()
        (there / "checkpoint.safetensors").unlink()
        wrote.unlink()
        result = run(folder, there, *ray)
        assert result.exit_code == 0 and "data: going on after" in result.output, result.output
        assert files(there) == files(here)
        assert min(int(line.split()[0]) for line in wrote.read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ray", "auto"], '--ray: ray is missing: pip install "cerberus_ext[ray]"'),
        (["--ray", "auto", "--data", "data.jsonl"], "--ray: cannot be had with --data"),
    ],
)
def test_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str], message: str) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    model_folder(tmp_path / "model")
    result = run(tmp_path / "model", tmp_path / "out", *more)
    assert result.exit_code == 2 and message in result.output
