"""The data stage: answers that the model writes, in shards of OUTPUT/data that a killed run goes on from.

Shard i follows from the seed and i alone, but for prompts that an earlier shard has, too: those are left out when
shards are written, one after the other. So a resumed run ends with the same files as an uninterrupted one, and so do
several processes, which write different shards' answers at the same time, and copies of the model elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerBase

from ..drafting.heads import fingerprint, output_matrix
from ..io.files import read_object, remove_partial, write_json, write_text
from ..target.model import position_limit
from .answer_writer import AnswerWriter
from .answers import Answer, Answers, parse_answers, read_answers
from .options import TrainOptions
from .output import DATA_FOLDER, check_same
from .processes import Processes

RECORD = "data.json"
OWN_TOKENS = 1_000_000  # answer tokens, where neither a number nor questions are given
BARREN = 8  # shards in a row without an answer of use, after which there is no hope


@dataclass(frozen=True)
class Elsewhere:
    """Copies of the model, so many, that write the answers instead of this process.

    shards: called, once answers are missing, with the writer, without its model, and the number of the first shard;
    gives this and all that follow, in order, until it is closed.
    """

    count: int
    shards: Callable[[AnswerWriter, int], Generator[list[Answer], None, None]]


class ShardWriter:
    """One of these copies. load: makes it, with its tokenizer, where it is. writer: without a model."""

    def __init__(self, load: Callable[[], tuple[Any, Any]], writer: AnswerWriter) -> None:
        self._writer = writer.with_model(load()[0])

    def write(self, number: int) -> list[Answer]:
        return self._writer.write(number, lambda count: None)


def load_data(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    options: TrainOptions,
    processes: Processes,
    elsewhere: Elsewhere | None = None,
) -> tuple[Answers, dict[str, Any]]:
    """The answers to train on, and how they came about. Writes those that are missing, unless options.data has them.

    Collective. elsewhere: for a single process. Raises ValueError on data that cannot be read, on a folder of other
    data, and where the model writes nothing of use.
    """
    vocab_size = output_matrix(model).shape[0]
    if options.data is not None:
        file, limit = options.data, position_limit(model)  # type: ignore[arg-type]
        try:
            answers = processes.from_main(lambda: read_answers([file], vocab_size))
        except ValueError as error:
            raise ValueError(f"train: data: {str(error).removeprefix('train: ')}") from None
        longest = max(map(len, answers.lines))
        if longest > limit:
            raise ValueError(
                f"train: data: {file.name} must have texts of at most {limit} tokens, got one of {longest}"
            )
        return answers, {}
    if tokenizer is None:
        raise ValueError("train: tokenizer must be given unless data is")
    stage = SelfDistillation(model, AnswerWriter(model, tokenizer, options), options, processes, elsewhere)
    stage.run()
    made = {"source": stage.writer.source, **stage.writer.identity(), "shards": stage.next}
    files = [stage.file(number) for number in range(stage.next)]
    return processes.from_main(lambda: read_answers(files, vocab_size)), made


class SelfDistillation:
    """The stage's progress. tokens, answers: in the shards so far; next: the first shard that is not there."""

    def __init__(
        self,
        model: nn.Module,
        writer: AnswerWriter,
        options: TrainOptions,
        processes: Processes,
        elsewhere: Elsewhere | None,
    ) -> None:
        self.model, self.writer, self.processes, self.elsewhere = model, writer, processes, elsewhere
        self.folder = options.output / DATA_FOLDER
        self.target = OWN_TOKENS if options.tokens is None and writer.questions is None else options.tokens
        self.seen: set[tuple[int, ...]] = set()  # prompts
        self.next = self.tokens = self.answers = self.barren = 0

    def file(self, number: int) -> Path:
        return self.folder / f"answers-{number:05d}.jsonl"

    def run(self) -> None:
        """Writes shards until there is enough, or until every question is answered."""
        processes = self.processes
        processes.from_main(self._count_shards)
        if not processes.from_main(self._enough):
            if self.next:
                processes.say(f"data: going on after {self.answers} answers, {self.tokens} tokens")
            writers = self.elsewhere.count if self.elsewhere else processes.count
            self.writer.state_estimate(self.target, self.tokens, processes, writers)
        with tqdm(
            total=self.target, initial=self.tokens, desc="answers", unit="tok", unit_scale=True, smoothing=0.05,
            disable=not processes.main or self._enough(),
        ) as bar, closing(self._written(bar)) as shards:  # fmt: skip
            for answers in shards:
                if not self._enough():
                    self._keep(answers)
                bar.n = self.tokens
                if not self.target and self.writer.shards and self.next:  # as many as in the shards so far
                    bar.total = self.tokens * self.writer.shards // self.next
                bar.refresh()
        self.next = processes.from_main(lambda: self.next)

    def _written(self, bar: Any) -> Generator[list[Answer], None, None]:
        """The next shards, in order, in the main process, until there is enough."""
        processes = self.processes
        if self.elsewhere and not self._enough():
            with closing(self.elsewhere.shards(self.writer.with_model(None), self.next)) as shards:
                for answers in shards:
                    yield answers
                    if self._enough():
                        return
        while not processes.from_main(self._enough):
            number = processes.from_main(lambda: self.next) + processes.index
            yield from processes.gather(self.writer.write(number, lambda count: bar.update(count * processes.count)))

    def _count_shards(self) -> None:
        """Those that an earlier run left."""
        self._check_folder()
        while not self._enough() and self.file(self.next).exists():
            self._count(parse_answers(self.file(self.next), output_matrix(self.model).shape[0]))

    def _enough(self) -> bool:
        """Of the main process, which alone counts."""
        if self.target is not None and self.tokens >= self.target:
            return True
        return self.writer.shards is not None and self.next >= self.writer.shards

    def _keep(self, answers: list[Answer]) -> None:
        """Writes the next shard, without the prompts that an earlier one has."""
        new = [line for line in answers if tuple(line.prompt) not in self.seen]
        write_text(self.file(self.next), "".join(line.json() + "\n" for line in new))
        self._count(new)

    def _count(self, answers: list[Answer]) -> None:
        self.seen.update(tuple(line.prompt) for line in answers)
        self.tokens += sum(len(line.answer) for line in answers)
        self.answers += len(answers)
        self.next += 1
        self.barren = 0 if answers else self.barren + 1
        if self.barren == BARREN:
            raise ValueError(f"train: the model must write answers of use, got none in {BARREN} shards of prompts")

    def _check_folder(self) -> None:
        """Refuses a folder of other data; writes the record into a new one."""
        identity = self.writer.identity() | {"model_fingerprint": fingerprint(self.model.parameters(), rows=16)}
        record, remedy = self.folder / RECORD, "remove the folder or choose another output folder"
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_partial(self.folder)
        if not record.exists() and not self.file(0).exists():
            write_json(record, identity)
        recorded = read_object(record)
        if recorded is None:
            raise ValueError(f"train: {DATA_FOLDER}/{RECORD} of the output is missing or damaged; {remedy}")
        check_same(recorded, identity, f"go on with the answers in {DATA_FOLDER} of the output", remedy)
