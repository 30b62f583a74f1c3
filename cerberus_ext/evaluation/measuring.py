"""Runs the ways in turns over the questions, times them, and checks that their texts are the same."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from ..drafting.gate import Gate, Signals
from ..io.prompts import Question, encode_chat
from ..runtime.stats import DecodeStats
from .results import Results
from .rotation import rotated
from .texts import difference
from .tokens import pieces_of
from .ways import AUTOREGRESSIVE, AUTOREGRESSIVE_COMPILED, Context, DecodeWay, Way, is_compiled

WARM_UP_TOKENS = 16
ENTROPY_QUESTIONS, ENTROPY_TOKENS = 4, 64
MAX_VIEWS = 8  # texts that the page shows token by token


@dataclass(frozen=True)
class Task:
    """A turn of a question, turns counted from 1. view: the page shows its texts."""

    number: int
    question: Question
    turn: int
    view: bool

    def key(self, turn: int, round: int) -> str:
        return f"{self.question.id}/{turn}/{round}"


def make_tasks(questions: Sequence[Question], turns: Sequence[int]) -> list[Task]:
    """Every one of the turns that a question has; shown is the first text of each category.

    Raises ValueError where questions share an id, by which their results are known, or none has such a turn.
    """
    seen: set[str] = set()
    for question in questions:
        if question.id in seen or "/" in question.id:
            raise ValueError(f'bench: questions must have ids of their own, without "/", got {question.id} again')
        seen.add(question.id)
    wanted = [(question, turn) for question in questions for turn in turns if turn <= len(question.turns)]
    if not wanted:
        raise ValueError(f"bench: questions must have a turn {turns[0]}, none has")
    tasks: list[Task] = []
    categories: set[str] = set()
    for number, (question, turn) in enumerate(wanted):
        view = question.category not in categories and len(categories) < MAX_VIEWS
        categories.add(question.category)
        tasks.append(Task(number, question, turn, view))
    return tasks


class Measuring:
    """One run over all tasks."""

    def __init__(self, context: Context, ways: Sequence[Way], results: Results, new_tokens: int, rounds: int) -> None:
        self.context, self.ways, self.results = context, ways, results
        self.new_tokens, self.rounds = new_tokens, rounds
        self.plain = next(way for way in ways if way.name == AUTOREGRESSIVE)

    def run(self, tasks: Sequence[Task]) -> None:
        """Measures what the results do not have yet."""
        todo = [
            (task, round)
            for task in tasks
            for round in range(self.rounds)
            if any(key not in self.results for key in self.keys(task, round))
        ]
        if not todo:
            return
        self.warm_up(tasks)
        total = len(tasks) * self.rounds * len(self.ways)
        left = sum(f"{task.key(task.turn, round)}/{way.name}" not in self.results
                   for task, round in todo for way in self.ways)  # fmt: skip
        with tqdm(total=total, initial=total - left, desc="bench", unit="text") as bar:
            for task, round in todo:
                ids = self.prompt(task)
                for way in rotated(self.ways, task.number * self.rounds + round):
                    if f"{task.key(task.turn, round)}/{way.name}" not in self.results:
                        bar.set_postfix_str(f"question {task.question.id}, turn {task.turn}, {way.name}")
                        self.measure(task, task.turn, round, way, ids)
                        bar.update()
                self.compare(task, round, ids)

    def keys(self, task: Task, round: int) -> Iterator[str]:
        key = task.key(task.turn, round)
        yield key
        for way in self.ways:
            yield f"{key}/{way.name}"

    def warm_up(self, tasks: Sequence[Task]) -> None:
        """The first call of a way sets up kernels, and CUDA graphs for texts of this length, and before it everything
        is compiled that the way may need: nobody times it. The results keep how long compiling took at first."""
        longest = max((encode_chat(self.context.tokenizer, task.question.turns[:1]) for task in tasks), key=torch.numel)
        ids = longest.to(self.context.model.device)
        new_tokens = min(self.new_tokens, WARM_UP_TOKENS) if ids.device.type == "cpu" else self.new_tokens
        for way in tqdm(self.ways, desc="warm-up", unit="way", leave=False):
            compiling = getattr(way, "compile_ahead", None)
            stats = None if compiling is None else compiling()
            key = f"compiled/{way.name}"
            if stats is not None and key not in self.results:
                self.results.add(key, compilations=stats.compilations, compile_seconds=stats.compile_seconds)
            way.run(ids, new_tokens)

    def prompt(self, task: Task) -> Tensor:
        """(1, S): a later turn follows the model's own answers, those of the autoregressive way."""
        said: list[str] = []
        for turn, asked in enumerate(task.question.turns[: task.turn], start=1):
            said.append(asked)
            ids = encode_chat(self.context.tokenizer, said).to(self.context.model.device)
            if turn < task.turn:
                key = f"{task.key(turn, 0)}/{AUTOREGRESSIVE}"
                if key not in self.results:  # only later turns were asked for; the report leaves it out
                    self.measure(task, turn, 0, self.plain, ids)
                said.append(self.decoded(self.results[key]["tokens"]))
        return ids

    def decoded(self, tokens: list[int]) -> str:
        return self.context.tokenizer.decode(tokens, skip_special_tokens=True)  # type: ignore[return-value]

    def measure(self, task: Task, turn: int, round: int, way: Way, ids: Tensor) -> None:
        """One text, timed from prompt to last token."""
        wait_for(ids.device)
        begin = time.perf_counter()
        tokens, stats = way.run(ids, self.new_tokens)
        wait_for(ids.device)
        seconds = time.perf_counter() - begin
        self.results.add(
            f"{task.key(turn, round)}/{way.name}",
            question=task.question.id,
            category=task.question.category,
            turn=turn,
            round=round,
            way=way.name,
            prompt_tokens=ids.shape[1],
            tokens=tokens,
            seconds=seconds,
            stats=None if stats is None else row_of(stats),
        )

    def compare(self, task: Task, round: int, ids: Tensor) -> None:
        """Where the ways' texts part from the autoregressive one; and the pieces of those that are shown.

        Ways with compiled steps, which round differently, are compared with the autoregressive way with such steps,
        and only that one with the other.
        """
        key = task.key(task.turn, round)
        if key in self.results:
            return
        rows = {way.name: self.results[f"{key}/{way.name}"] for way in self.ways}
        texts = {name: torch.cat([ids, ids.new_tensor([row["tokens"]])], 1) for name, row in rows.items()}
        parts: dict[str, Any] = {}
        for way in self.ways:
            other = self.compared_with(way)
            found = difference(self.context.model, texts[way.name], texts[other.name], ids.shape[1])
            if found is not None:
                # On a CPU, `decode` gives every node the same bits, unless compiled steps were found not to.
                stats = rows[way.name]["stats"]
                exact = (
                    ids.device.type == "cpu"
                    and stats is not None
                    and stats.get("row_invariant") is not False
                    and is_compiled(way) == is_compiled(other)
                )
                parts[way.name] = {**found, "other": other.name, "exact": exact}
        shown = task.view and round == 0
        self.results.add(
            key,
            parts=parts,
            asked=task.question.turns[task.turn - 1] if shown else None,
            pieces={
                name: pieces_of(self.context.tokenizer, row["tokens"]) if row["stats"] else None
                for name, row in rows.items()
            }
            if shown
            else None,
        )

    def compared_with(self, way: Way) -> Way:
        """The way whose text `way` has to have."""
        name = AUTOREGRESSIVE_COMPILED if is_compiled(way) and way.name != AUTOREGRESSIVE_COMPILED else AUTOREGRESSIVE
        return next((other for other in self.ways if other.name == name), self.plain)


def row_of(stats: DecodeStats) -> dict[str, Any]:
    """Statistics as they are kept."""
    row = asdict(stats)
    row["seconds"] = {phase: round(seconds, 6) for phase, seconds in stats.seconds.items()}
    return row


def wait_for(device: torch.device) -> None:
    """Until everything given to the device is done; on the CPU it is when a call returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_entropy(context: Context, questions: Sequence[Question]) -> float:
    """Of softmax(hidden), in nats, at the beginning of the first answers: a gate with it opens every other time."""
    seen: list[float] = []

    class Watching(Gate):
        needs = frozenset({"entropy"})

        def decide(self, signals: Signals) -> int:
            assert signals.entropy is not None
            seen.append(signals.entropy)
            return 0

    way = DecodeWay("entropy", context.model, context.heads, gate=Watching())
    for question in tqdm(questions[:ENTROPY_QUESTIONS], desc="median entropy", unit="text", leave=False):
        ids = encode_chat(context.tokenizer, question.turns[:1]).to(context.model.device)
        way.run(ids, ENTROPY_TOKENS)
    if not seen:
        raise ValueError("bench: entropy_threshold must be given, every answer ends at once and shows no median")
    return median(seen)
