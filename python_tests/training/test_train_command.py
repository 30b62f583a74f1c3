"""`cerberus train` from nothing, as a process: killed anywhere and started again, and as several processes."""

from __future__ import annotations

import json
import random
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import training_worker
from safetensors.torch import load_file
from training_runs import model_folder, start
from typer.testing import CliRunner
from warm_process import WarmProcess

from cerberus_ext import CerberusHeads
from cerberus_ext.cli.main import app
from cerberus_ext.training import positions

ARGUMENTS = [
    "--tokens", "1500", "--max-new-tokens", "24", "--rows", "16", "--heads", "3", "--draft-vocab", "48",
    "--conditional-rank", "4",
    "--steps", "60", "--batch", "64", "--warmup", "5", "--lr", "3e-3", "--held-out", "0.1", "--eval-every", "10",
    "--device", "cpu", "--threads", "1",
]  # fmt: skip
TIMEOUT = 100  # seconds that a run may take


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("train") / "model")


def launched(arguments: Sequence[str | Path], port: int) -> str:
    """Two processes, as users start them; what they printed."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    process = start(*arguments, launcher=[*launcher, training_worker.__file__])
    printed, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, printed
    return printed


def with_a_launchers_environment(arguments: Sequence[str | Path], port: int) -> str:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        WarmProcess(*arguments, script=training_worker.__file__, environment={**shared, "RANK": str(rank)})
        for rank in range(2)
    ]
    printed = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    return "".join(printed)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def in_this_process(folder: Path, output: Path, *more: str) -> str:
    threads = torch.get_num_threads()
    result = CliRunner().invoke(app, ["train", "--model", str(folder), "--output", str(output), *ARGUMENTS, *more])
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    printed = in_this_process(folder, folder.parent / "whole")
    for stage in (
        "data: 1500 answer tokens",
        "draft vocabulary: 48 tokens cover",
        "training: 60 steps of 64 positions",
        f"are in {folder.parent / 'whole'}; to try them:\n  cerberus generate --model {folder} --heads ",
    ):
        assert stage in printed
    return folder.parent / "whole"


def data(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((output / "data").iterdir())}


def test_one_command_trains_heads(uninterrupted: Path) -> None:
    record = json.loads((uninterrupted / "training.json").read_text())
    assert record["data"]["answer_tokens"] >= 1500 and record["steps"] == 60 and len(record["curve"]) == 6
    assert record["data"]["source"] == "prompts written by the model"
    assert record["curve"][-1]["loss"] < record["curve"][0]["loss"]
    assert CerberusHeads.from_pretrained(uninterrupted).config.base_model == "model"
    assert (uninterrupted / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert not [file for file in uninterrupted.rglob("*.partial")]


def test_conditional_drafts_alone_are_trained_for_the_heads_of_a_run(folder: Path, uninterrupted: Path) -> None:
    output = folder.parent / "only"
    printed = in_this_process(folder, output, "--init", str(uninterrupted), "--only", "conditional")
    assert "after the right token: top-1 of heads 2 to 3" in printed and "for what the heads offer" in printed
    before, after = (load_file(made / "model.safetensors") for made in (uninterrupted, output))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert after.keys() == before.keys() and "conditional.keys" in changed
    assert all(name.startswith("conditional.") for name in changed)


@pytest.mark.parametrize("seed", [0])
def test_killed_at_random_and_started_again_it_ends_the_same(folder: Path, uninterrupted: Path, seed: int) -> None:
    """SIGKILL at some moment of the data stage and at one of the training, at the file that shows the stage's progress
    or within a quarter of a second after it."""
    moment = random.Random(seed)
    output = folder.parent / f"killed-{seed}"
    shards = len(data(uninterrupted)) - 1
    shard = output / "data" / f"answers-{moment.randrange(shards - 1):05d}.jsonl"
    for sign in (shard, output / "checkpoint.safetensors"):
        process = WarmProcess("train", "--model", folder, "--output", output, *ARGUMENTS)
        end = time.monotonic() + TIMEOUT
        while not sign.exists() and time.monotonic() < end:
            assert process.poll() is None, process.communicate(TIMEOUT)[0]
            time.sleep(0.005)
        time.sleep(moment.uniform(0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=TIMEOUT)
        assert process.returncode == -signal.SIGKILL and sign.exists(), process.returncode
        assert not (output / "curves.png").exists()  # it was not done
    printed = in_this_process(folder, output)
    assert "resuming at step" in printed
    assert data(output) == data(uninterrupted)
    for name in ("model.safetensors", "config.json"):
        assert (output / name).read_bytes() == (uninterrupted / name).read_bytes()
    curves = [json.loads((run / "training.json").read_text())["curve"] for run in (output, uninterrupted)]
    assert [{**point, "seconds": 0} for point in curves[0]] == [{**point, "seconds": 0} for point in curves[1]]


@pytest.mark.parametrize("start_two", [with_a_launchers_environment, pytest.param(launched, marks=pytest.mark.slow)])
def test_two_processes_train_as_one(
    start_two: Callable[[Sequence[str | Path], int], str],
    folder: Path,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums over processes are rounded in another order; apart from that all losses are the same, and so is the data.

    Windows of a part of the data, of which each process computes a share, and a cache for some of the states.
    """
    monkeypatch.setattr(positions, "CHUNK_LINES", training_worker.CHUNK_LINES)
    more = ["--memory", "5e-5", "--cache-size", "4e-5"]
    one, two = (tmp_path / name for name in ("one", "two"))
    in_this_process(folder, one, *more, "--cache", str(one / "states"))
    options = ["--model", folder, "--output", two, *ARGUMENTS, *more, "--cache", two / "states"]
    printed = start_two(["train", *options], free_port())
    assert printed.count("training: 60 steps") == 1  # one of them tells

    assert data(one) == data(two) == data(uninterrupted)
    cached = [sorted(file.name for file in (output / "states").iterdir()) for output in (one, two)]
    assert cached[0] == cached[1] and len(cached[0]) > 3
    for name in cached[0]:
        assert (one / "states" / name).read_bytes() == (two / "states" / name).read_bytes()
    curves = []
    for output, count in ((one, 1), (two, 2)):
        record = json.loads((output / "training.json").read_text())
        assert record["processes"] == count
        curves.append(record["curve"])
    assert len(curves[0]) == len(curves[1]) == 6
    for expected, point in zip(*curves, strict=True):
        assert point["loss"] == pytest.approx(expected["loss"], abs=2e-4)
        assert point["tokens_per_step"] == pytest.approx(expected["tokens_per_step"], rel=0.02)
    weights = [load_file(output / "checkpoint.safetensors")["weight"] for output in (one, two)]
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-5)
    assert weights[0].abs().max() > 1e-3 and not [file for file in two.rglob("*.partial")]


def test_two_processes_train_conditional_drafts_as_one(folder: Path, uninterrupted: Path, tmp_path: Path) -> None:
    more = ["--init", str(uninterrupted), "--only", "conditional"]
    in_this_process(folder, tmp_path / "one", *more)
    with_a_launchers_environment(
        ["train", "--model", folder, "--output", tmp_path / "two", *ARGUMENTS, *more], free_port()
    )
    curves = [json.loads((tmp_path / name / "training.json").read_text())["curve"] for name in ("one", "two")]
    assert len(curves[0]) == len(curves[1]) == 7
    for expected, point in zip(*curves, strict=True):
        assert point["conditional_loss"] == pytest.approx(expected["conditional_loss"], abs=1e-3)
    assert curves[0][-1]["loss"] == pytest.approx(curves[1][-1]["loss"], abs=1e-3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lr", "-1"], "--lr must be > 0, got -1.0"),
        (["--data", "missing.jsonl"], "--tokens must not be given together with data"),
        (["--prompts", "missing.jsonl"], "missing.jsonl"),
        (["--init", "missing"], "'missing' is no folder, no Hub id"),
        (["--draft-vocab", "65"], "--draft-vocab must be at most the vocabulary, 64, got 65"),
        (["--dtype", "float16"], "--model must be float32 or bfloat16, got float16"),
        (["--anchor", "sea"], 'anchor must be "root" or "hidden", got \'sea\''),
        (["--cache-size", "1"], "--cache-size needs cache"),
        (["--only", "conditional"], "--only needs init"),
    ],
)
def test_bad_options_are_one_line(
    folder: Path, tmp_path: Path, uninterrupted: Path, more: list[str], message: str
) -> None:
    result = CliRunner().invoke(app, ["train", "--model", str(folder), "--output", str(tmp_path), *ARGUMENTS, *more])
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert result.stderr.strip().count("\n") == 0
