"""Finds the tree and the gate that are fastest for heads on a machine; `cerberus calibrate` is the same from the shell.

Texts are traced (trace.py), steps are timed (cost.py), every tree and gate walks through the texts in predicted time
(walk.py, choice.py), and the winner is checked by the clock (validate.py).

The walk asks the gates themselves, with the numbers that they get from `decode`, so on a CPU its steps are those that
`decode` takes, one by one. What is chosen changes the speed, and never the text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from ..drafting.heads import CerberusHeads, fingerprint, output_matrix
from ..drafting.tree import MAX_NODES
from ..engine import checks
from ..engine.calibration_entries import Calibration, Expected
from ..engine.calibration_store import FILE, find, heads_fingerprint, key_of, place, read_entries, save
from ..engine.forked import threads_after_fork
from ..io.files import check_output_folder, check_writable, read_object, write_json
from ..io.prompts import Question
from ..target.model import position_limit
from . import report
from .batches import measure_batches
from .choice import PLAIN, choose
from .cost import measure_costs
from .plot import MADE_BY, plot
from .questions import OWN_QUESTIONS
from .trace import Answer, TracedText, trace, write_answers
from .validate import Measured, gate_gain, validate

__all__ = ["Calibration", "CalibrateOptions", "Expected", "calibrate", "find"]

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CONTEXTS = (64, 512, 1024)
REPORT, PICTURE = "calibration-report.json", "calibration.png"


@dataclass(frozen=True)
class CalibrateOptions:
    """What `calibrate` is asked to do.

    questions   what the model answers; several turns are a conversation
    tokens      at most so many tokens are answered in all: fewer questions, evenly spread, where they would be more;
                by default enough for all of its own, since texts differ much in how often they repeat themselves
    new_tokens  longest answer
    sizes       nodes of the trees that are tried; 1, plain decoding, always is. None: SIZES
    contexts    tokens of text at which a step is timed; None: those of CONTEXTS that the model has positions for
    rounds      of timing, in each of three passes
    validate    texts that are decoded once more at the end, to check the prediction, and whether a gate is slower than
                its absence after all; 0: none
    output      folder for calibration.png and calibration-report.json; None: only the picture, beside the calibration
    """

    questions: Sequence[Question] = OWN_QUESTIONS
    tokens: int = 12288
    new_tokens: int = 256
    sizes: Sequence[int] | None = None
    contexts: Sequence[int] | None = None
    rounds: int = 2
    validate: int = 8
    output: Path | None = None

    def __post_init__(self) -> None:
        for name, least in (("tokens", 4), ("new_tokens", 2), ("rounds", 1), ("validate", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"calibrate: {name} must be >= {least}, got {getattr(self, name)}")
        for name in ("questions", "sizes", "contexts"):
            if getattr(self, name) is not None and not len(getattr(self, name)):
                raise ValueError(f"calibrate: {name} must have at least one entry, got none")
        for name in ("sizes", "contexts"):
            for value in getattr(self, name) or ():
                if value < 1:
                    raise ValueError(f"calibrate: {name} must be >= 1, got {value}")
        if self.sizes is not None and max(self.sizes) > MAX_NODES:
            raise ValueError(f"calibrate: sizes must be at most {MAX_NODES}, got {max(self.sizes)}")


def calibrate(
    model: PreTrainedModel, heads: CerberusHeads, tokenizer: Any, options: CalibrateOptions | None = None
) -> Calibration:
    """Measures, chooses and stores what `decode(model, heads, ids)` then uses on this device, dtype and, on a CPU,
    number of threads.

    model: a transformers causal LM in evaluation mode; its dtype and device are those that are measured. It is left as
    it was. It takes about as long as decoding twice as many tokens as options.tokens, and a few minutes more.
    Returns what was stored. Raises TypeError on other heads than CerberusHeads, ValueError on options, heads, answers
    or an existing file that do not fit, and OSError where the result cannot be written.
    """
    threads_after_fork()
    options = options or CalibrateOptions()
    checks.check_model(model)
    if not isinstance(heads, CerberusHeads):
        raise TypeError(f"calibrate: heads must be CerberusHeads, got {type(heads).__name__}")
    heads.bind(model)
    check_places(place(heads), options.output)  # better than after minutes of measuring
    contexts = _contexts(model, heads, options.contexts)
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)

    texts = _texts(model, heads, tokenizer, options)
    traced = [text for _, text in texts]
    sizes = sorted({1, *(options.sizes or SIZES)})
    costs = measure_costs(model, heads, sizes, contexts, options.rounds)
    batches = measure_batches(model, contexts[len(contexts) // 2], options.rounds)
    choice = choose(traced, costs)
    measured: dict[str, Measured] = {}
    if options.validate:
        compared = {name: choice.settings[name] for name in (PLAIN, choice.best_ungated, choice.chosen)}
        measured = validate(model, heads, spread(by_turn(texts), options.validate), compared, costs)
    gain = gate_gain(choice, measured)
    if gain is not None and gain.slower:
        choice = replace(choice, chosen=choice.best_ungated)

    setting, tally = choice.settings[choice.chosen], choice.tallies[choice.chosen]
    paces = {name: one.pace for name, one in measured.items()}
    device, dtype, threads = key_of(model.device, model.dtype, torch.get_num_threads())
    found = Calibration(
        device=device,
        dtype=dtype,
        threads=threads,
        heads=heads_fingerprint(heads),
        model=fingerprint([output_matrix(model)]),
        tree=setting.tree,
        gate=setting.gate,
        expected=Expected(
            tokens_per_second=tally.tokens_per_second * paces.get(choice.chosen, 1.0),
            plain_tokens_per_second=choice.tallies[PLAIN].tokens_per_second * paces.get(PLAIN, 1.0),
            tokens_per_step=tally.tokens_per_step,
            gate_open_rate=tally.gate_open_rate,
            zero_accept_rate=tally.zero_accept_rate,
        ),
        details=report.details(traced, choice, costs, measured, gain),
        batches=batches,
    )
    file = save(heads, found)
    if options.output is None:
        plot(found.details, file.with_suffix(".png"))
    else:
        write_json(options.output / REPORT, found.to_json())
        plot(found.details, options.output / PICTURE)
    return found


def check_places(file: Path, output: Path | None) -> None:
    """Writes nothing. file: of the calibrations; output: as in CalibrateOptions.

    Raises ValueError, naming the file, where one would be written over that calibration has not made, OSError where one
    cannot be written.
    """
    read_entries(file)
    check_writable("calibrate", file.parent)
    picture = file.with_suffix(".png")
    if output is not None:
        check_output(output)
    elif picture.exists() and not file.exists() and MADE_BY.encode() not in picture.read_bytes():
        raise ValueError(f"calibrate: output: {picture} would be written over; name another folder for the picture")


def check_output(output: Path) -> None:
    """The same for the folder of the picture and the report."""
    ours = {"device", "threads", "tree", "gate"} <= (read_object(output / REPORT) or {}).keys()
    foreign = (
        output / name
        for name in (REPORT, PICTURE)
        if not (ours or name == PICTURE and read_entries(output / FILE))  # the picture of a calibration beside it
    )
    check_output_folder("calibrate: output", output, foreign, MADE_BY)


def _contexts(model: PreTrainedModel, heads: CerberusHeads, wanted: Sequence[int] | None) -> list[int]:
    """Where steps are timed: a tree has to have positions there."""
    most = position_limit(model) - 1 - heads.config.num_heads
    if most < 1:
        raise ValueError(f"calibrate: the model must have positions for a draft, it has {position_limit(model)}")
    for context in wanted or ():
        if context > most:
            raise ValueError(f"calibrate: contexts must be at most {most} for this model, got {context}")
    return sorted(set(wanted)) if wanted else sorted({min(context, most) for context in CONTEXTS})


def _texts(
    model: PreTrainedModel, heads: CerberusHeads, tokenizer: Any, options: CalibrateOptions
) -> list[tuple[Answer, TracedText]]:
    """Answers of at least two tokens, with what was traced in them."""
    turns = max(len(question.turns) for question in options.questions)
    least = min(2, len(options.questions))  # one half of them is there to fit, the other one to judge
    new_tokens = min(options.new_tokens, max(2, options.tokens // (least * turns)))
    questions = spread(options.questions, max(least, options.tokens // (new_tokens * turns)))
    answers, texts = write_answers(model, heads, tokenizer, questions, new_tokens), []
    total = sum(len(question.turns) for question in questions)
    for answer in tqdm(answers, total=total, desc="texts", unit="text"):
        if answer.new >= 2:
            texts.append((answer, trace(model, heads, answer)))
    if not texts:
        raise ValueError(
            "calibrate: questions must get answers of at least 2 tokens, all were shorter, or prompts too long"
        )
    return texts


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items, evenly spread; all, where there are no more."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def by_turn(texts: Sequence[tuple[Answer, TracedText]]) -> list[tuple[Answer, TracedText]]:
    """First turns before second ones: then some of each are among those that are spread over all."""
    turns, found = Counter[int](), []
    for pair in texts:
        found.append((turns[pair[0].question], pair))
        turns[pair[0].question] += 1
    return [pair for _, pair in sorted(found, key=lambda one: one[0])]
