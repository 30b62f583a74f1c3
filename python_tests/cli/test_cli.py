"""The command line, on a tiny model and tokenizer made here."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result
from word_tokenizer import word_tokenizer

from cerberus_ext import CerberusConfig, CerberusHeads
from cerberus_ext.cli import generate as generate_command
from cerberus_ext.cli.main import app
from cerberus_ext.evaluation import ways
from cerberus_ext.training.options import TrainOptions

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(61))]
runner = CliRunner()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(model folder, heads folder)"""
    root = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "model")
    word_tokenizer(WORDS, bos_token="<s>", eos_token="</s>").save_pretrained(root / "model")
    heads = CerberusHeads(CerberusConfig("tiny", hidden_size=32, vocab_size=len(WORDS), num_heads=3))
    heads.save_pretrained(root / "heads")
    return str(root / "model"), str(root / "heads")


def generate(folders: tuple[str, str], *arguments: str, stdin: str | None = None):
    model, heads = folders
    command = ["generate", "--model", model, "--heads", heads, "--max-new-tokens", "12", *arguments]
    return runner.invoke(app, command, input=stdin)


def test_generate_prints_the_answer_and_one_line(folders: tuple[str, str]) -> None:
    result = generate(folders, "w3 w4 w5")
    assert result.exit_code == 0, result.output
    answer, line = result.stdout.strip().rsplit("\n", 1)
    assert answer
    assert re.fullmatch(r"\[\d+ tokens, [\d.]+ tokens/s, [\d.]+ tokens per step\]", line)


def test_generate_shows_who_drafted(folders: tuple[str, str]) -> None:
    """Without colours, as no terminal is there."""
    result, plain = generate(folders, "--show-drafts", "w3 w4 w5"), generate(folders, "w3 w4 w5")
    assert result.exit_code == 0 and "\x1b" not in result.stdout
    answer, legend, line = result.stdout.strip().rsplit("\n", 2)
    assert answer.split() == plain.stdout.rsplit("\n", 2)[0].split()
    assert re.fullmatch(r"\[tokens: (\d+ of [a-z' ]+(, )?)+\]", legend)
    total = sum(map(int, re.findall(r"\d+", legend)))
    assert line.startswith(f"[{total} tokens, ")


COMPARED = r"\[[\d.]+x plain decoding: [\d.]+ tokens/s, (.+); [\d.]+x model\.generate: [\d.]+ tokens/s, (.+)\]"


def compared(result: Result) -> tuple[str, ...]:
    """What --compare says about the texts of plain decoding and of model.generate."""
    return re.fullmatch(COMPARED, result.stdout.splitlines()[-1]).groups()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generate_compare_prints_speed_ups(dtype: str, folders: tuple[str, str]) -> None:
    result = generate(folders, "--compare", "--dtype", dtype, "w3 w4 w5")
    assert result.exit_code == 0, result.output
    line = result.stdout.splitlines()[-2]
    assert re.fullmatch(r"\[\d+ tokens, [\d.]+ tokens/s, [\d.]+ tokens per step\]", line)
    plain, others = compared(result)
    assert plain == "same output" and (dtype != "float32" or others == "same output")


@pytest.mark.parametrize(
    ("dtype", "wrong", "message", "status"),
    [
        ("float32", "DecodeWay", "OUTPUT DIFFERS from token 4 on", 1),
        ("bfloat16", "DecodeWay", "OUTPUT DIFFERS from token 4 on", 1),
        ("float32", "GenerateWay", "OUTPUT DIFFERS from token 4 on", 1),
        ("bfloat16", "GenerateWay", "another output from token 4 on, as its kernels round bfloat16 otherwise", 0),
    ],
)
def test_generate_compare_finds_another_text(
    dtype: str, wrong: str, message: str, status: int, folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = getattr(ways, wrong).run

    def another(way: Any, ids: torch.Tensor, new_tokens: int) -> Any:
        text, stats = run(way, ids, new_tokens)
        return (text if way.name == "drafts" else [*text[:3], text[3] + 1, *text[4:]]), stats

    monkeypatch.setattr(getattr(ways, wrong), "run", another)
    result = generate(folders, "--compare", "--dtype", dtype, "w3 w4 w5")
    assert result.exit_code == status, result.output
    assert compared(result)[wrong == "GenerateWay"] == message


def test_generate_compare_makes_texts_of_one_length(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where generate, which rounds otherwise, would end its text."""
    counts = []
    run = ways.GenerateWay.run

    def counting(way: Any, ids: torch.Tensor, new_tokens: int) -> Any:
        way.model.generation_config.eos_token_id = list(range(len(WORDS)))  # every text ends at once
        text, stats = run(way, ids, new_tokens)
        counts.append(len(text))
        return text, stats

    monkeypatch.setattr(ways.GenerateWay, "run", counting)
    monkeypatch.setattr(generate_command, "ROUNDS", 1)
    result = generate(folders, "--compare", "w3 w4 w5")
    assert result.exit_code == 0 and counts == [int(re.search(r"\[(\d+) tokens", result.stdout)[1])], result.output
    assert counts[0] > 1


def test_generate_in_fewer_bits(folders: tuple[str, str]) -> None:
    """Heads of the model as it was draft for it."""
    model = folders[0]
    for bits in ("q4", "q8"):
        result = generate(folders, "--quantize", bits, "--compare", "--dtype", "float32", "w3 w4 w5")
        assert result.exit_code == 0 and "DIFFERS" not in result.stdout, result.output
    refused = runner.invoke(app, ["generate", "--model", model, "--heads", "none", "--quantize", "q3", "w3"])
    assert refused.exit_code == 2
    assert refused.stderr == "cerberus: --quantize: bits must be one of q4, q8, got 'q3'\n"


def test_generate_reads_standard_input(folders: tuple[str, str]) -> None:
    piped, given = generate(folders, stdin="w3 w4 w5"), generate(folders, "w3 w4 w5")
    assert piped.exit_code == 0, piped.output
    assert piped.stdout.splitlines()[0] == given.stdout.splitlines()[0]


def test_generate_without_heads(folders: tuple[str, str]) -> None:
    """The text alone is drafted from: a model that repeats itself gains, and the answer is the same."""
    model, _ = folders
    command = ["generate", "--model", model, "--max-new-tokens", "40", "--compare", "w3 w4 w5"]
    alone, neither = (
        runner.invoke(app, [*command, "--heads", "none", *more]) for more in (["--tree-size", "6"], ["--no-suffix"])
    )
    assert alone.exit_code == neither.exit_code == 0, alone.output + neither.output
    assert alone.stdout.splitlines()[0] == neither.stdout.splitlines()[0]
    assert compared(alone) == compared(neither) == ("same output", "same output")
    steps = [float(re.search(r"([\d.]+) tokens per step", one.stdout)[1]) for one in (alone, neither)]
    assert steps[0] > 1.5 and steps[1] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("",), "the prompt is empty"),
        (("--dtype", "int8", "w3"), "--dtype must be one of float32, bfloat16, float16, got int8"),
        (("--max-new-tokens", "0", "w3"), "max-new-tokens"),
        (("--tree-size", "1", "w3"), "tree-size"),
        (("--threads", "0", "w3"), "threads"),
    ],
)
def test_generate_bad_option(folders: tuple[str, str], arguments: tuple[str, ...], message: str) -> None:
    result = generate(folders, *arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_generate_model_without_heads(folders: tuple[str, str]) -> None:
    result = runner.invoke(app, ["generate", "--model", folders[0], "w3"])
    assert result.exit_code == 2
    assert "--heads" in result.output and "'none'" in result.output


def test_generate_unknown_model(folders: tuple[str, str], tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    result = runner.invoke(app, ["generate", "--model", missing, "--heads", folders[1], "w3"])
    assert result.exit_code == 2
    assert "--model" in result.output and "missing" in result.output


def test_generate_unknown_heads(folders: tuple[str, str], tmp_path: Path) -> None:
    result = runner.invoke(app, ["generate", "--model", folders[0], "--heads", str(tmp_path / "missing"), "w3"])
    assert result.exit_code == 2
    assert "--heads" in result.output and "missing" in result.output


def test_generate_heads_of_another_model(folders: tuple[str, str], tmp_path: Path) -> None:
    CerberusHeads(CerberusConfig("other", hidden_size=48, vocab_size=len(WORDS))).save_pretrained(tmp_path)
    result = runner.invoke(app, ["generate", "--model", folders[0], "--heads", str(tmp_path), "w3"])
    assert result.exit_code == 2
    assert "hidden_size 48" in result.output


def test_train_has_an_option_for_every_number_of_a_run() -> None:
    command = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    options = {option.name: option for option in command.params}
    others = {"model", "dtype", "device", "threads", "ray", "replicas"}
    assert set(options) - {field.name for field in fields(TrainOptions)} == others
    for field in fields(TrainOptions):
        if field.name in ("base_model", "clip", "head_decay"):
            assert field.name not in options
            continue
        option = options[field.name]
        assert option.help and option.required == (field.name == "output")
        assert option.required or option.default == field.default


def test_info_names_versions_and_libraries() -> None:
    result = runner.invoke(app, ["info"])
    assert result.exit_code == 0, result.output
    for part in ("cerberus_ext", "torch", "transformers", "_C", "CUDA", "CPU"):
        assert part in result.stdout
