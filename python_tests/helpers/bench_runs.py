"""Runs of `cerberus bench` in the tests' own process, and what goes into them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from cerberus_ext import CerberusHeads
from cerberus_ext.cli.main import app
from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.engine.calibration_store import Calibration, Expected, heads_fingerprint, key_of, save


def bench(folder: Path, out: Path, *arguments: str, dtype: str = "float32") -> Any:
    command = ["bench", "--questions", str(folder / "questions.jsonl"), "--out", str(out)]
    command += ["--model", str(folder / "model"), "--heads", str(folder / "heads"), "--dtype", dtype]
    return CliRunner().invoke(app, [*command, "--device", "cpu", "--new-tokens", "12", *arguments])


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def way_file(folder: Path, body: str) -> Path:
    """A file with one way, "mine", whose `run` is the autoregressive one and then `body`, which may change `tokens`."""
    file = folder / "mine.py"
    file.write_text(f"""
from cerberus_ext import AlwaysClosed, decode

class Way:
    name = "mine"
    expected = 123.0

    def __init__(self, context):
        self.context = context

    def run(self, ids, new_tokens):
        out = decode(self.context.model, self.context.heads, ids, max_new_tokens=new_tokens, gate=AlwaysClosed())
        tokens, stats = out.sequences[0, ids.shape[1]:].tolist(), None
        {body}
        return tokens, stats

def ways(context):
    return [Way(context)]
""")
    return file


def calibrated(folder: Path, target: Path, gate: Any, tree: DynamicPolicy | None = None) -> Path:
    """A copy of the heads, with a calibration for this machine. tree: None: of 5 nodes."""
    shutil.copytree(folder / "heads", target, dirs_exist_ok=True)
    heads = CerberusHeads.from_pretrained(target)
    device, dtype, threads = key_of(torch.device("cpu"), torch.float32, torch.get_num_threads())
    expected = Expected(50.0, 25.0, 2.0, 1.0, 0.1)
    own = heads_fingerprint(heads)
    save(
        heads,
        Calibration(device, dtype, threads, own, "model", tree or DynamicPolicy(5), gate, expected),
    )
    return target
