"""`cerberus bench`: how fast heads make a model, next to other ways, over questions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..evaluation.options import BenchOptions
from .failures import fail, option
from .shared import PACKAGED_HEADS, Device, DTypeName, Heads, Model, Threads, load, load_heads, options_of

TURNS = {"1": (1,), "2": (2,), "both": (1, 2)}


@options_of(BenchOptions)
def bench(
    questions: Annotated[
        Path | None, typer.Option(help='JSON lines, as of MT-Bench: {"turns": [...]} or {"prompt": ...}.')
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results and report; a run that was stopped goes on from it.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Only writes the report of this folder's results again.")] = None,
    model: Model = None,
    heads: Heads = None,
    medusa: Annotated[str | None, typer.Option(help="Medusa's heads, as `cerberus train --no-chained` makes.")] = None,
    draft_model: Annotated[str | None, typer.Option(help="Folder or Hub id: for assisted generation.")] = None,
    llama_cpp: Annotated[
        str | None,
        typer.Option(metavar="PYTHON", help="A Python with xllamacpp: adds llama.cpp, for the default model."),
    ] = None,
    way: Annotated[list[str] | None, typer.Option(help="FILE.py[:ARGUMENT] with more ways; may be repeated.")] = None,
    ways: Annotated[str | None, typer.Option(help="Only these, separated by commas. Default: all.")] = None,
    turns: Annotated[str, typer.Option(help="1, 2 or both: a second turn follows the model's own answer.")] = "both",
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many questions, the first ones.")] = None,
    dtype: DTypeName = None,
    device: Device = None,
    threads: Threads = None,
    **more: Any,
) -> None:
    """Times ways to generate over questions, in turns, checks that their texts are the same, and writes a report.

    Ends with status 1 where texts differ that must not.
    """
    if report is not None:
        if questions is not None or out is not None:
            fail("--report: it makes a report of what is measured already; give it alone")
        return _report_again(report)
    if questions is None or out is None:
        fail("--questions FILE and --out DIR are needed, or --report DIR")
    if turns not in TURNS:
        fail(f"--turns must be one of {', '.join(TURNS)}, got {turns}")

    from ..evaluation.evaluate import begin_folder, evaluate
    from ..evaluation.llama_cpp import llama_cpp_ways
    from ..io.default_model import load_model
    from ..io.prompts import read_questions

    with option("--questions"):
        asked = read_questions(questions, limit)
    options = BenchOptions(turns=TURNS[turns], ways=_names(ways, llama_cpp), way_files=tuple(way or ()), **more)
    begin_folder(out)
    target, tokenizer, trained = load(model, heads, dtype, device, threads)
    if llama_cpp is not None and (model is not None or target.device.type != "cpu"):
        fail("--llama-cpp: it runs the default model on the CPU: leave --model out, and give --device cpu")
    others = None if medusa is None else load_heads(medusa, target, "--medusa")
    with option("--draft-model"):
        draft = None if draft_model is None else load_model(draft_model, target.dtype, target.device)
    given = {
        "questions": questions, "model": model, "heads": heads or PACKAGED_HEADS, "medusa": medusa,
        "draft": draft_model, "llama_cpp": llama_cpp,
    }  # fmt: skip
    called = {name: Path(value).name for name, value in given.items() if value is not None}
    with llama_cpp_ways(llama_cpp) as peers:
        summary = evaluate(
            target, tokenizer, trained, asked, out, options, names=called, medusa=others, draft=draft, llama_cpp=peers
        )
    finish(summary, out)


def _names(ways: str | None, llama_cpp: str | None) -> tuple[str, ...] | None:
    """Those that are asked for, llama.cpp's by its option; None: all."""
    from ..evaluation.ways import LLAMA_CPP

    if ways is None:
        return None
    names = tuple(name.strip() for name in ways.split(","))
    return names + tuple(name for name in LLAMA_CPP if llama_cpp is not None and name not in names)


def _report_again(folder: Path) -> None:
    from ..evaluation.evaluate import report

    with option("--report"):
        summary = report(folder)
    finish(summary, folder)


def finish(summary: dict, folder: Path) -> None:
    """Prints the most important, and ends with status 1 where texts differ that must not."""
    from ..evaluation.tables import equality_lines, lines_of

    for line in (*lines_of(summary), *equality_lines(summary["equality"])):
        typer.echo(line)
    for name, reason in summary["about"]["left_out"].items():
        typer.echo(f"left out: {name}: {reason}")
    typer.echo(f"report: {folder / 'index.html'}")
    if summary["equality"]["violations"]:
        raise typer.Exit(1)
