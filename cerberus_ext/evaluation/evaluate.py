"""How fast heads make a model over questions, next to other ways; `cerberus bench` is the same from the shell.

A run that was stopped goes on when it is started again with the same arguments; with others it is refused.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafting.gate import EntropyGate
from ..drafting.heads import CerberusHeads, fingerprint
from ..engine.calibration_entries import gate_to_json
from ..io.files import check_output_folder, write_bytes, write_text
from ..io.machine import commit, describe_machine, describe_versions
from ..io.prompts import Question
from .measuring import Measuring, make_tasks, median_entropy
from .numbers import summarize
from .options import BenchOptions
from .page import html
from .plots import TITLES, draw
from .results import Results
from .tables import markdown
from .ways import ENTROPY, Context, Way, built_in_ways, model_name, select

__all__ = ["BenchOptions", "Context", "Way", "evaluate", "report"]

RESULTS_FILE = "results.jsonl"
REPORT_FILES = ("bench.json", "bench.md", "index.html", *(f"{name}.png" for name in TITLES))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    heads: CerberusHeads,
    questions: Sequence[Question],
    out: Path,
    options: BenchOptions | None = None,
    *,
    names: dict[str, str] | None = None,
    medusa: CerberusHeads | None = None,
    draft: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    llama_cpp: Sequence[Way] = (),
) -> dict[str, Any]:
    """Measures, writes the report into the folder `out`, and returns the summary, as in bench.json.

    medusa: heads with chained=False to compare with. draft: model and tokenizer for assisted generation.
    llama_cpp: of `llama_cpp_ways`, where `model` is the default one on the CPU.
    names: what to call "model", "heads", "medusa", "draft", "llama_cpp" and "questions" in the report.
    Raises ValueError on options that do not fit, on results in `out` of other settings or of another machine, and on
    files in it that no run has made; OSError where it cannot be written to.
    """
    options = options or BenchOptions()
    names = names or {}
    context = Context(model, tokenizer, heads, options.tree_size)
    tasks = make_tasks(questions, options.turns)
    if medusa is not None:
        if medusa.config.chained:
            raise ValueError("bench: medusa must be heads with chained=False, got chained ones")
        medusa.bind(model)  # raises where they do not fit
    results = begin_folder(out)
    threshold = options.entropy_threshold
    if threshold is None and (options.ways is None or ENTROPY in options.ways):
        threshold = find_threshold(context, questions, results)
    ways, missing = built_in_ways(context, medusa, draft, threshold, llama_cpp)
    for more in options.more_ways:
        ways += more(context)
    ways = select(ways, missing, options.ways)
    about = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "command": command_of(names, options, model),
        "left_out": missing if options.ways is None else {},
        "entropy_threshold": threshold,
        **{
            what: {way.name: value for way in ways if (value := getattr(way, what, None)) is not None}
            for what in ("expected", "not_compared")
        },
    }
    others = {"model": model, "heads": heads, "medusa": medusa, "draft": None if draft is None else draft[0]}
    results.begin(identity_of(context, ways, options, names, others), about)
    Measuring(context, ways, results, options.new_tokens, options.rounds).run(tasks)
    return report(out)


def identity_of(
    context: Context, ways: Sequence[Way], options: BenchOptions, names: dict[str, str], others: dict[str, Any]
) -> dict[str, Any]:
    """What must be the same for a run to go on. others: the models and heads by name, None where there are none."""
    model = context.model
    stored = context.calibration()
    rows = {"model": 16, "draft": 16}  # of each tensor: models have many
    return {
        **{name: names.get(name) for name in ("questions", "heads", "medusa", "draft")},
        "model": names.get("model", model_name(model)),
        "prints": {
            name: None if one is None else fingerprint(one.parameters(), rows.get(name, 256))
            for name, one in others.items()
        },
        "calibration": {"heads": stored and [stored.tree.to_json(), gate_to_json(stored.gate)]},
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        **{name: getattr(options, name) for name in ("turns", "new_tokens", "rounds", "tree_size", "seed")},
        "ways": {way.name: getattr(way, "description", "") for way in ways},
        "machine": describe_machine(model.device),
        "versions": describe_versions(),
    }


def begin_folder(out: Path) -> Results:
    """The results in the folder of a run, none where it is new; makes nothing.

    Raises ValueError where it holds a model or heads, or files that a run would write over and that none has made,
    OSError where it cannot be written to.
    """
    try:
        results = Results(out / RESULTS_FILE)
    except ValueError as error:
        raise ValueError(f"bench: out: {error}") from None
    foreign = ("config.json", *(() if results.identity is not None else REPORT_FILES))
    check_output_folder("bench: out", out, (out / name for name in foreign), "cerberus bench")
    return results


def find_threshold(context: Context, questions: Sequence[Question], results: Results) -> float:
    """Where no threshold was given: that of the run to go on with, or the calibrated one, or the median."""
    calibration = context.calibration()
    if (begun := results.about.get("entropy_threshold")) is not None:
        return begun
    if calibration is not None and isinstance(calibration.gate, EntropyGate):
        return calibration.gate.threshold
    return median_entropy(context, questions)


def command_of(names: dict[str, str], options: BenchOptions, model: PreTrainedModel) -> str:
    """What repeats the run, with the names of files and folders for their paths."""
    flags: dict[str, Any] = {
        "questions": names.get("questions", "FILE"),
        "out": "DIR",
        **{name: names.get(name) for name in ("model", "heads", "medusa", "llama_cpp")},
        "draft-model": names.get("draft"),
        "turns": "both" if len(options.turns) > 1 else options.turns[0],
        **{name: getattr(options, name) for name in ("new_tokens", "rounds", "seed", "tree_size", "entropy_threshold")},
        "ways": None if options.ways is None else ",".join(options.ways),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "threads": torch.get_num_threads() if model.device.type == "cpu" else None,
    }
    words = [f"--{flag.replace('_', '-')} {value}" for flag, value in flags.items() if value is not None]
    words += ["--way " + ":".join(Path(part).name for part in file.split(":")) for file in options.way_files]
    return " ".join(["cerberus bench", *words])


def report(folder: Path) -> dict[str, Any]:
    """Writes bench.json, bench.md, the plots and index.html of the results in `folder`, and returns the summary.

    Texts that not all ways have made yet are left out. Raises ValueError where there is nothing to report.
    """
    results = Results(folder / RESULTS_FILE)
    summary = summarize(results)
    plots = draw(summary)
    write_text(folder / "bench.json", json.dumps(summary, indent=1) + "\n")
    write_text(folder / "bench.md", markdown(summary))
    for name, image in plots.items():
        write_bytes(folder / f"{name}.png", image)
    write_text(folder / "index.html", html(summary, results, plots))
    return summary
