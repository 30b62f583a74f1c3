"""Runs the ways in turns over the questions, times them, and checks that their texts are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from ..drafting.gate import Gate, Signals
from ..io.prompts import Question, encode_chat
from ..io.words import pieces_of
from ..runtime.stats import DecodeStats
from .results import Results
from .texts import difference
from .timing import rotated, timed
from .ways import AUTOREGRESSIVE, Context, DecodeWay, Way

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
    ids = [question.id for question in questions]
    for id in ids:
        if ids.count(id) > 1 or "/" in id:
            raise ValueError(f'bench: questions must have ids of their own, without "/", got {id}')
    wanted = [(question, turn) for question in questions for turn in turns if turn <= len(question.turns)]
    if not wanted:
        raise ValueError(f"bench: questions must have a turn {turns[0]}, none has")
    first = {question.category: number for number, (question, _) in reversed(list(enumerate(wanted)))}
    shown = sorted(first.values())[:MAX_VIEWS]
    return [Task(number, question, turn, number in shown) for number, (question, turn) in enumerate(wanted)]


class Measuring:
    """One run over all tasks."""

    def __init__(self, context: Context, ways: Sequence[Way], results: Results, new_tokens: int, rounds: int) -> None:
        self.context, self.ways, self.results = context, ways, results
        self.new_tokens, self.rounds = new_tokens, rounds
        self.by_name = {way.name: way for way in ways}

    def run(self, tasks: Sequence[Task]) -> None:
        """Measures what the results do not have yet."""
        names = ["", *(f"/{name}" for name in self.by_name)]
        todo = [
            (task, round)
            for task in tasks
            for round in range(self.rounds)
            if any(task.key(task.turn, round) + name not in self.results for name in names)
        ]
        if not todo:
            return
        self.warm_up(tasks)
        total = len(tasks) * self.rounds * len(self.ways)
        left = sum(task.key(task.turn, round) + name not in self.results for task, round in todo for name in names[1:])
        with tqdm(total=total, initial=total - left, desc="bench", unit="text") as bar:
            for task, round in todo:
                ids = self.prompt(task)
                for way in rotated(self.ways, task.number * self.rounds + round):
                    if f"{task.key(task.turn, round)}/{way.name}" not in self.results:
                        bar.set_postfix_str(f"question {task.question.id}, turn {task.turn}, {way.name}")
                        self.measure(task, task.turn, round, way, ids)
                        bar.update()
                self.compare(task, round, ids)

    def warm_up(self, tasks: Sequence[Task]) -> None:
        """The first call of a way sets up kernels, the fused step, and CUDA graphs for texts of this length: nobody
        times it."""
        longest = max((self.encode(task.question.turns[:1]) for task in tasks), key=torch.numel)
        new_tokens = min(self.new_tokens, WARM_UP_TOKENS) if longest.device.type == "cpu" else self.new_tokens
        for way in tqdm(self.ways, desc="warm-up", unit="way", leave=False):
            way.run(longest, new_tokens)

    def encode(self, said: Sequence[str]) -> Tensor:
        return encode_chat(self.context.tokenizer, said).to(self.context.model.device)

    def prompt(self, task: Task) -> Tensor:
        """(1, S): a later turn follows the model's own answers, those of the autoregressive way."""
        said: list[str] = []
        for turn, asked in enumerate(task.question.turns[: task.turn], start=1):
            said.append(asked)
            ids = self.encode(said)
            if turn < task.turn:
                key = f"{task.key(turn, 0)}/{AUTOREGRESSIVE}"
                if key not in self.results:  # only later turns were asked for; the report leaves it out
                    self.measure(task, turn, 0, self.by_name[AUTOREGRESSIVE], ids)
                answer: Any = self.context.tokenizer.decode(self.results[key]["tokens"], skip_special_tokens=True)
                said.append(answer)
        return ids

    def measure(self, task: Task, turn: int, round: int, way: Way, ids: Tensor) -> None:
        """One text, timed from prompt to last token."""
        (tokens, stats), seconds = timed(partial(way.run, ids, self.new_tokens), ids.device)
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
        """Where the ways' texts part from the autoregressive one; and the pieces of those that are shown."""
        key = task.key(task.turn, round)
        if key in self.results:
            return
        rows = {name: self.results[f"{key}/{name}"] for name in self.by_name}
        texts = {name: torch.cat([ids, ids.new_tensor([row["tokens"]])], 1) for name, row in rows.items()}
        parts: dict[str, Any] = {}
        other = self.by_name[AUTOREGRESSIVE]
        for way in self.ways:
            if getattr(way, "not_compared", None) is not None:
                continue
            found = difference(self.context.model, texts[way.name], texts[other.name], ids.shape[1])
            if found is not None:
                exact = rows[way.name]["stats"] is not None and ids.device.type == "cpu"  # every node has the same bits
                parts[way.name] = {**found, "other": other.name, "exact": exact}
        asked = pieces = None
        if task.view and round == 0:
            asked = task.question.turns[task.turn - 1]
            pieces = {
                name: pieces_of(self.context.tokenizer, row["tokens"]) if row["stats"] else None
                for name, row in rows.items()
            }
        self.results.add(key, parts=parts, asked=asked, pieces=pieces)


def row_of(stats: DecodeStats) -> dict[str, Any]:
    """Statistics as they are kept."""
    return asdict(stats) | {"seconds": {phase: round(seconds, 6) for phase, seconds in stats.seconds.items()}}


def median_entropy(context: Context, questions: Sequence[Question]) -> float:
    """Of softmax(hidden), in nats, at the beginning of the first answers: a gate with it opens every other time."""
    seen: list[float] = []

    class Watching(Gate):
        needs = frozenset({"entropy"})

        def decide(self, signals: Signals) -> int:
            assert signals.entropy is not None
            seen.append(signals.entropy)
            return 0

    # A tree, for a gate is not asked about a plain step, which calibration may have found to be the fastest.
    way = DecodeWay("entropy", context.model, context.heads, options={"gate": Watching(), "tree": 2})
    for question in tqdm(questions[:ENTROPY_QUESTIONS], desc="median entropy", unit="text", leave=False):
        way.run(encode_chat(context.tokenizer, question.turns[:1]).to(context.model.device), ENTROPY_TOKENS)
    if not seen:
        raise ValueError("bench: entropy_threshold must be given, every answer ends at once and shows no median")
    return median(seen)
