"""What `cerberus info` shows."""

from __future__ import annotations

import platform
import warnings
from pathlib import Path

import pytest
import torch
from tiny_chat import save_model
from tiny_families import make_family
from torch import Tensor, nn
from transformers import PreTrainedModel
from typer.testing import CliRunner

from cerberus_ext.cli import info
from cerberus_ext.cli.main import app
from cerberus_ext.ops import libraries
from cerberus_ext.runtime.stepper import Stepper

runner = CliRunner()


def test_sections_and_what_they_must_name() -> None:
    sections = info.collect()
    assert list(sections) == ["Versions", "Libraries", "CPU", "CUDA"]
    assert all(isinstance(value, str) and value for section in sections.values() for value in section.values())
    assert torch.__version__ in sections["Versions"]["torch"]
    assert platform.python_version() in sections["Versions"]["Python"]
    assert sections["Libraries"]["_C.so"] == f"loaded from {libraries.PACKAGE / '_C.so'}"
    assert f"torch {libraries.build_record()['torch']}" in sections["Libraries"]["built"]


def test_the_chosen_kernels_are_among_those_built() -> None:
    chosen, built = info.collect()["CPU"]["kernels"].split(", of ")
    assert chosen in built.split()
    if "avx2" not in info.cpu_features():
        assert chosen == "portable"


def test_a_library_that_is_not_loaded_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = libraries.Library("_cuda.so", libraries.PACKAGE / "_cuda.so", loaded=False, reason="no GPU today")
    monkeypatch.setattr(libraries, "load_libraries", lambda: (missing,))
    assert info.collect()["Libraries"]["_cuda.so"] == "not loaded: no GPU today"


def test_printed_as_one_label_a_line() -> None:
    lines = runner.invoke(app, ["info"]).stdout.splitlines()
    sections = info.collect()
    assert len(lines) == len(sections) + sum(len(section) for section in sections.values())
    assert "Libraries" in lines
    assert any(line.split()[:1] == ["_C.so"] for line in lines)


class Mixing(nn.Module):
    """Of tokens, by a share of their mean."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.share * hidden.mean(1, keepdim=True)


def llama(share: float | None = None) -> PreTrainedModel:
    model = make_family("llama")
    if share is not None:
        model.model.layers[0].mlp = Mixing(share)
    return model


class TestModel:
    def test_section(self) -> None:
        section = info.model_section(llama().to(torch.bfloat16))
        assert section == {"class": "LlamaForCausalLM", "dtype": "bfloat16", "exact": "yes", "drafts": "yes"}

    def test_what_is_not_certain(self) -> None:
        section = info.model_section(llama(0.0))
        assert section["exact"] == "no: Mixing calls mean" and section["drafts"] == "yes"

    def test_no_drafts(self) -> None:
        """Without them the text is the model's own; the section says it, and no warning."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            section = info.model_section(llama(0.5))
        assert section["exact"] == "yes"
        assert section["drafts"].startswith("no: LlamaForCausalLM computes other numbers for a token of a tree")

    @pytest.fixture
    def folder(self, tmp_path: Path) -> str:
        save_model(tmp_path)
        return str(tmp_path)

    def test_command(self, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The other sections as ever, then the model's; nothing is decoded."""
        monkeypatch.setattr(Stepper, "prefill", None)
        result = runner.invoke(app, ["info", "--model", folder, "--dtype", "float32"])
        assert result.exit_code == 0, result.output
        alone = runner.invoke(app, ["info"]).stdout
        assert result.stdout.startswith(alone) and "Model" not in alone
        lines = [line.split() for line in result.stdout.removeprefix(alone).splitlines()]
        assert lines == [
            ["Model"], ["class", "LlamaForCausalLM"], ["dtype", "float32"], ["exact", "yes"], ["drafts", "yes"]
        ]  # fmt: skip

    def test_without_a_model_none_is_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cerberus_ext.cli.info.load_target", lambda *_: pytest.fail("a model is loaded"))
        assert runner.invoke(app, ["info"]).exit_code == 0

    def test_a_model_that_is_refused(self, tmp_path: Path) -> None:
        save_model(tmp_path)  # its tokenizer
        make_family("mpt").save_pretrained(tmp_path)
        result = runner.invoke(app, ["info", "--model", str(tmp_path)])
        assert result.exit_code == 2 and result.stdout == ""
        lines = result.stderr.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("cerberus: --model must have an attention that is known here, MptForCausalLM has")

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        result = runner.invoke(app, ["info", "--model", str(tmp_path / "missing")])
        assert result.exit_code == 2 and "--model" in result.stderr and result.stdout == ""


def test_what_fewer_bits_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "QUESTIONS", 2)
    monkeypatch.setattr(info, "ANSWER", 8)
    save_model(tmp_path / "model")
    shown = runner.invoke(app, ["info", "--model", str(tmp_path / "model"), "--quantize", "q4", "--device", "cpu"])
    lines = [line.split(None, 1) for line in shown.stdout[shown.stdout.index("Quantized") :].splitlines()[1:]]
    section = dict(lines)
    assert list(section) == ["weights", "left", "answers", "perplexity", "same"]
    assert section["answers"] == "2 of the model before, of up to 8 tokens"
    assert " in 4 bits, 1 in 8 bits" in section["weights"] and section["same"].startswith("tokens")
