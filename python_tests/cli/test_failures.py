"""What goes wrong on the command line is one line that names the option and the reason, and destroys nothing."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from training_runs import WORDS, model_folder, start
from typer.testing import CliRunner
from warm_process import CLOSED, WarmProcess

from cerberus_ext import CerberusConfig, CerberusHeads
from cerberus_ext.cli import generate as generate_command
from cerberus_ext.cli.main import app

runner = CliRunner()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model, heads, and files that are none."""
    root = tmp_path_factory.mktemp("failures")
    model_folder(root / "model")
    CerberusHeads(CerberusConfig("tiny", hidden_size=32, vocab_size=len(WORDS), num_heads=3)).save_pretrained(
        root / "heads"
    )
    for name in ("cut", "no-tokenizer"):
        model_folder(root / name)
    weights = root / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    tokenizer = root / "no-tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text()[:200])
    (root / "empty").mkdir()
    (root / "bad-heads").mkdir()
    (root / "bad-heads" / "config.json").write_text("[]")
    (root / "lines.jsonl").write_text('{"prompt": "w3"}\nno\n')
    (root / "mine").mkdir()
    for name in ("README.md", "bench.json", "calibration.png"):
        (root / "mine" / name).write_text("mine")
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def failed(root: Path, arguments: Sequence[str], *messages: str, stdin: bytes | None = None) -> None:
    """`{name}` in arguments is a path in root."""
    before = contents(root)
    command = [argument.replace("{", f"{root}/").replace("}", "") for argument in arguments]
    result = runner.invoke(app, command, input=stdin)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("cerberus: ") and result.stderr.count("\n") == 1, result.stderr
    for message in messages:
        assert message in result.stderr
    assert contents(root) == before


GENERATE = ["generate", "--model", "{model}", "--heads", "{heads}"]
MODELS = [
    ("{cut}", "cut/model.safetensors is damaged ("),
    ("{no-tokenizer}", "no-tokenizer/tokenizer.json is damaged ("),
    ("{heads}", "heads is a folder of Cerberus heads, not of a model"),
    ("{model}/none.gguf", "model/none.gguf"),
    ("{empty}", "empty has no config.json"),
    ("{lines.jsonl}", "lines.jsonl is a file, not a folder"),
    ("/nonexistent", "there is no folder '/nonexistent', and it is no Hub id"),
    ("a/b/c", "there is no folder 'a/b/c'"),
]


@pytest.mark.parametrize(("name", "message"), MODELS)
def test_models(root: Path, name: str, message: str) -> None:
    failed(root, ["generate", "--model", name, "--heads", "{heads}", "w3"], "--model: ", message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{bad-heads}", "bad-heads/config.json: it must be a JSON object, got list"),
        ("{model}", "model/config.json: it is of a model (llama), not of heads"),
        ("{lines.jsonl}", "lines.jsonl is a file, not a folder of heads"),
        ("/nonexistent", "'/nonexistent' is no folder, no Hub id"),
    ],
)
def test_heads(root: Path, name: str, message: str) -> None:
    failed(root, ["generate", "--model", "{model}", "--heads", name, "w3"], "--heads: ", message)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device", "nonsense", "must be cpu, cuda or cuda:0, cuda:1 ..., got nonsense"),
        ("--device", "meta", "must be cpu, cuda or"),
        ("--device", "cuda:9999", ""),
        ("--threads", "100000", "must be in 1..1024, got 100000"),
    ],
)
def test_devices_and_threads(root: Path, option: str, value: str, message: str) -> None:
    for command in (GENERATE, ["train", "--model", "{model}", "--output", "{out}"]):
        failed(root, [*command, option, value, *(["w3"] if command is GENERATE else [])], f"{option}: ", message)


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        (b"w3 \xff\xfe", "standard input: must be UTF-8 text, got byte 0xff at 3"),
        (b"w3 \0 w4", "PROMPT: must be text, got a byte of zero"),
        (b" \n", "the prompt is empty"),
    ],
)
def test_standard_input(root: Path, stdin: bytes, message: str) -> None:
    failed(root, GENERATE, message, stdin=stdin)


def test_a_prompt_of_other_bytes(root: Path) -> None:
    failed(root, [*GENERATE, "w3 \udcff"], "PROMPT: must be UTF-8 text")


BENCH = ["bench", "--model", "{model}", "--heads", "{heads}", "--out"]
CALIBRATE = ["calibrate", "--model", "{model}", "--heads", "{heads}"]


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ([*BENCH, "{out}"], "--questions"),
        (CALIBRATE, "--prompts"),
        (["train", "--model", "{model}", "--output", "{out}"], "--prompts"),
        (["train", "--model", "{model}", "--output", "{out}"], "--data"),
    ],
)
def test_files_of_questions(root: Path, command: list[str], option: str) -> None:
    failed(root, [*command, option, "{missing}"], f"{option}: {root}/missing: No such file or directory")
    failed(root, [*command, option, "{model}"], f"{option}: {root}/model: Is a directory")


def test_a_line_that_is_no_json(root: Path, tmp_path: Path) -> None:
    for command, option in ((BENCH + ["{out}"], "--questions"), (CALIBRATE, "--prompts")):
        failed(root, [*command, option, "{lines.jsonl}"], f"{option}: lines.jsonl line 2: must be JSON, got 'no'")
    for option in ("--prompts", "--data"):
        command = ["train", "--model", str(root / "model"), "--output", str(tmp_path / option)]
        result = runner.invoke(app, [*command, option, str(root / "lines.jsonl")])
        assert result.exit_code == 2 and result.stderr.startswith(f"cerberus: {option}: lines.jsonl line "), (
            result.stderr
        )


@pytest.mark.parametrize(
    ("command", "messages"),
    [
        (["train", "--model", "{model}", "--output", "{model}"], ["--output: ", "is the folder of --model"]),
        (["train", "--model", "{model}", "--output", "{mine}"], ["--output: ", "mine/README.md is there already"]),
        (["train", "--model", "{model}", "--output", "{lines.jsonl}"], ["--output: ", "lines.jsonl is a file"]),
        (["train", "--model", "{model}", "--output", "/proc/x"], ["--output: /proc/x cannot be written to: "]),
        (["train", "--model", "{model}", "--output", "{heads}"], ["--output: ", "heads/config.json is there already"]),
        (["train", "--model", "{model}", "--output", "{out}", "--lr", "-1"], ["--lr must be > 0, got -1.0"]),
        (["train", "--model", "{model}", "--output", "{out}", "--memory", "inf"], ["--memory must be finite, got inf"]),
        ([*CALIBRATE, "--output", "{mine}"], ["--output: ", "mine/calibration.png is there already, and was not"]),
        ([*CALIBRATE, "--output", "{lines.jsonl}"], ["--output: ", "lines.jsonl is a file, not a folder"]),
        ([*CALIBRATE, "--sizes", "1,10000000"], ["--sizes must be at most 1024, got 10000000"]),
    ],
)
def test_outputs(root: Path, command: list[str], messages: list[str]) -> None:
    failed(root, command, *messages)


@pytest.mark.parametrize(
    ("name", "message"), [("mine", "mine/bench.json is there already, and was not made"), ("lines.jsonl", "is a file")]
)
def test_bench_out(root: Path, tmp_path: Path, name: str, message: str) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "w3"}\n')
    failed(root, [*BENCH, f"{{{name}}}", "--questions", str(questions)], "--out: ", message)


def test_bench_does_not_take_a_line_of_the_users_for_its_own(root: Path, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"mine": 1}')  # without an end of line, as of a killed run
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "w3"}\n')
    failed(
        root, [*BENCH, str(tmp_path), "--questions", str(questions)], "results.jsonl: the last line must be a result"
    )
    assert (tmp_path / "results.jsonl").read_text() == '{"mine": 1}'


def test_mistakes_of_ours_are_a_line_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistake(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(generate_command, "load_any", mistake)
    failed(root, [*GENERATE, "w3"], "cerberus: KeyError: 'x' (CERBERUS_DEBUG=1 shows where)")
    monkeypatch.setenv("CERBERUS_DEBUG", "1")
    command = [argument.replace("{", f"{root}/").replace("}", "") for argument in GENERATE]
    result = runner.invoke(app, [*command, "w3"])
    assert result.exit_code == 2 and "Traceback" in result.stderr and "in mistake" in result.stderr


@pytest.mark.parametrize(
    ("stdout", "status", "message"), [(CLOSED, 141, ""), ("/dev/full", 2, "standard output: No space left on device")]
)
def test_nobody_reads_standard_output_or_it_is_full(root: Path, stdout: str, status: int, message: str) -> None:
    command = ["generate", "--model", root / "model", "--heads", root / "heads", "--max-new-tokens", "240", "w3 w4"]
    process = WarmProcess(*command, stdout=stdout)
    error, _ = process.communicate(timeout=100)
    assert process.returncode == status, error
    assert "Traceback" not in error and "Exception" not in error
    assert f"cerberus: {message}" in error if message else not error


def test_an_interrupt_is_one_line(root: Path, tmp_path: Path) -> None:
    """Ctrl-C while the data stage runs; what it wrote stays for the next start."""
    # A child of a process that ignores the signal, as one in the background of a script does, would ignore it, too.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = start(
            "train", "--model", root / "model", "--output", tmp_path / "heads", "--rows", "8", "--device", "cpu"
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    for line in process.stdout:
        if "time about" in line:  # the last line before the first shard
            break
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=100)
    assert process.returncode == 130, printed
    assert "cerberus: interrupted; the same command goes on from here\n" in printed and "Traceback" not in printed
    assert json.loads((tmp_path / "heads" / "training.json").read_text()) == {"made_by": "cerberus train"}
