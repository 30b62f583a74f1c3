"""`cerberus calibrate`: the tree and the gate that are fastest on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .failures import fail, option
from .shared import Device, DTypeName, Heads, Model, Threads, load


def calibrate(
    model: Model = None,
    heads: Heads = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='JSON lines, {"turns": [...]} as in MT-Bench or {"prompt": ...}. Default: 24 own ones of two turns.'
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="The model answers with at most so many tokens in all.")] = 12288,
    new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    sizes: Annotated[
        str | None, typer.Option(help="Nodes of the trees to try, such as 1,4,16. Default: 1 to 64.")
    ] = None,
    contexts: Annotated[
        str | None, typer.Option(help="Lengths of text at which a step is timed. Default: 64,512,1024.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of timing, in each of three passes.")] = 2,
    validate: Annotated[int, typer.Option(help="Texts that check the prediction at the end; 0: none.")] = 8,
    output: Annotated[Path | None, typer.Option(help="Folder for calibration.png and calibration-report.json.")] = None,
    dtype: DTypeName = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Finds the draft tree and the gate that are fastest on this machine, and stores them with the heads.

    About eight minutes for the default model on two cores. `cerberus generate` and `decode` use the result for the same
    device, dtype and number of threads.
    """
    lists = {"sizes": _integers("--sizes", sizes), "contexts": _integers("--contexts", contexts)}
    changes: dict[str, Any] = {name: value for name, value in lists.items() if value is not None}

    from ..calibration import calibrate as calibration
    from ..calibration import report
    from ..engine.calibration_store import place
    from ..io.prompts import read_questions

    if prompts is not None:
        with option("--prompts"):
            changes["questions"] = read_questions(prompts)
    options = calibration.CalibrateOptions(
        tokens=tokens, new_tokens=new_tokens, rounds=rounds, validate=validate, output=output,
        **changes,
    )  # fmt: skip
    if output is not None:
        calibration.check_output(output)
    target, tokenizer, trained = load(model, heads, dtype, device, threads)
    result = calibration.calibrate(target, trained, tokenizer, options)
    typer.echo("\n".join(report.lines(result)))
    typer.echo(f"stored in {place(trained)}")


def _integers(name: str, text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in text.split(",")]
    except ValueError:
        fail(f"{name} must be integers separated by commas, got {text!r}")
