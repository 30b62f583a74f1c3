"""One shard of the data stage: prompts, and the model's answers to them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch
from transformers import PreTrainedTokenizerBase

from ..drafting.context_layer import attention_sizes
from ..drafting.heads import output_matrix
from ..engine.checks import eos_token_ids
from ..io.files import sha256
from ..io.prompts import Question, encode_chat, read_questions
from ..target.model import position_limit
from .answers import Answer
from .estimate import duration, memory_line, model_bytes
from .options import TrainOptions
from .own_prompts import PromptWriter, prompt_writer
from .processes import Processes
from .sampler import Text, write_texts

TEMPERATURES, TOP_P = (0.0, 0.3, 0.7), 0.95  # answers take turns
SHARD_BATCHES = 2  # full batches in a shard: what a kill costs at most
REPETITIVE = (32, 0.1)  # a text of so many tokens is not used where fewer than this share of them are different
PROBE_STEPS = 8


class AnswerWriter:
    """Writes any shard of the data, from its number alone.

    questions: those of options.prompts; None: the model writes its own. shards: how many there are; None: no end.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, options: TrainOptions) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.prompts_in_shard = SHARD_BATCHES * options.rows
        self.context = position_limit(model)
        ends = eos_token_ids(None, model.generation_config)
        self.stop = frozenset({*ends, tokenizer.eos_token_id} - {None})  # an answer's ends
        self.questions: list[Question] | None = None
        self.shards: int | None = None
        self.own: PromptWriter | None = None
        self.source = "prompts written by the model"
        if options.prompts is not None:
            try:
                self.questions = read_questions(options.prompts)
            except ValueError as error:
                raise ValueError(f"train: prompts: {error}") from None
            self.shards = -(-len(self.questions) // self.prompts_in_shard)
            self.source = f"{len(self.questions)} questions of a file"
        else:
            begin = tokenizer.bos_token_id
            begin = begin if begin is not None else tokenizer.eos_token_id
            self.own = prompt_writer(tokenizer, self.stop, begin, self.context // 2)

    def with_model(self, model: Any) -> AnswerWriter:
        """The same for a copy of the model; None: to be sent to where one is."""
        other = copy.copy(self)
        other.model = model
        return other

    def identity(self) -> dict[str, Any]:
        """What must be the same for shards to belong together."""
        return {
            "seed": self.options.seed,
            "max_new_tokens": self.options.max_new_tokens,
            "rows": self.options.rows,
            "temperatures": list(TEMPERATURES),
            "top_p": TOP_P,
            "dtype": str(output_matrix(self.model).dtype).removeprefix("torch."),
            "prompts_sha256": sha256([self.options.prompts]) if self.options.prompts else None,
        }

    def write(self, number: int, progress: Callable[[int], object]) -> list[Answer]:
        """Shard `number`, without answers of no use and without prompts that it has twice.

        progress: called with the number of new tokens at every step of the answers.
        """
        if self.shards is not None and number >= self.shards:
            return []
        draw = numpy.random.default_rng([self.options.seed, 3, number])
        answers: list[Answer] = []
        if self.questions is None:
            self._answer(self._own_prompts(draw), draw, answers, progress)
            return answers
        start = number * self.prompts_in_shard
        turns = [question.turns for question in self.questions[start : start + self.prompts_in_shard]]
        conversations: list[list[str]] = [[] for _ in turns]  # user and assistant taking turns, so far
        for turn in range(max(map(len, turns))):
            prompts = {}
            for row, texts in enumerate(turns):
                if len(texts) > turn and len(conversations[row]) == 2 * turn:
                    conversations[row].append(texts[turn])
                    prompts[row] = encode_chat(self.tokenizer, conversations[row])[0].tolist()
            for row, new in self._answer(prompts, draw, answers, progress).items():
                text: Any = self.tokenizer.decode(new, skip_special_tokens=True)
                if text.strip():
                    conversations[row].append(text)
        return answers

    def _own_prompts(self, draw: numpy.random.Generator) -> dict[int, list[int]]:
        """The model's own prompts, by their number in the shard."""
        assert self.own is not None  # there are no questions
        texts = self.own.texts(self.prompts_in_shard, draw)
        write_texts(self.model, texts, self.own.stop, self.options.rows, lambda count: None)
        prompts = {row: self.own.prompt(text) for row, text in enumerate(texts) if not degenerate(text.new)}
        return {row: prompt for row, prompt in prompts.items() if prompt}

    def _answer(
        self,
        prompts: dict[int, list[int]],
        draw: numpy.random.Generator,
        answers: list[Answer],
        progress: Callable[[int], object],
    ) -> dict[int, list[int]]:
        """Adds the answers of use; returns the tokens of all that were written, under the prompts' numbers."""
        noise = torch.from_numpy(draw.random((self.prompts_in_shard, self.options.max_new_tokens), dtype=numpy.float32))
        known = {tuple(answer.prompt) for answer in answers}
        texts: dict[int, Text] = {}
        for row, prompt in prompts.items():
            if len(prompt) + 1 < self.context and tuple(prompt) not in known:
                known.add(tuple(prompt))
                texts[row] = Text(prompt, TEMPERATURES[row % len(TEMPERATURES)], TOP_P, noise[row])
        write_texts(self.model, list(texts.values()), self.stop, self.options.rows, progress)
        answers += [
            Answer(text.prompt, text.new, text.temperature) for text in texts.values() if not degenerate(text.new)
        ]
        return {row: text.new for row, text in texts.items()}

    def state_estimate(self, target: int | None, done: int, processes: Processes, writers: int) -> None:
        """Prints, in the main process, the memory and the time that the stage will take with so many writers."""
        if not processes.main:
            return
        rows, longest, questions = self.options.rows, self.options.max_new_tokens, self.questions or []
        prompt, steps = self._example_prompt(), list[float]()
        texts = [Text(prompt, TEMPERATURES[-1], TOP_P, torch.full((PROBE_STEPS,), 0.5)) for _ in range(rows)]
        write_texts(self.model, texts, frozenset(), rows, lambda count: steps.append(time.perf_counter()))
        seconds = sorted(numpy.diff(steps))[len(steps) // 2 - 1]  # the prompt is before the first
        rate = rows * writers / seconds
        lm_head, config = output_matrix(self.model), self.model.config.get_text_config()
        _, kv_heads, size = attention_sizes(self.model)
        cached = 2 * config.num_hidden_layers * kv_heads * size * lm_head.element_size()  # of a token
        parts = {
            "model": model_bytes(self.model),
            "keys and values": rows * (len(prompt) + longest) * cached,
            "logits": 3 * 4 * rows * len(lm_head),
        }
        goal = f"{target} answer tokens" if target else f"answers to {len(questions)} questions"
        left = target - done if target else longest * sum(len(question.turns) for question in questions)
        bound = "about" if target else "at most"
        processes.say(f"data: {goal}, {rows} answers at once, {self.source}")
        processes.say(memory_line(parts))
        processes.say(
            f"  time {bound} {duration(left / rate)} at {rate:.3g} tokens/s, a full batch's, without the prompts"
        )

    def _example_prompt(self) -> list[int]:
        """One about as long as they get."""
        if self.own is not None:
            return [self.own.prefix[0]] * min(self.own.longest, max(1, self.context - PROBE_STEPS))
        longest = max(self.questions or [], key=lambda question: len(question.turns[0]))
        return encode_chat(self.tokenizer, [longest.turns[0]])[0].tolist()[: self.context - PROBE_STEPS]


def degenerate(tokens: Sequence[int]) -> bool:
    """Whether there is nothing in a text to learn from: a single token, or hardly a new one among many."""
    long, share = REPETITIVE
    return len(tokens) < 2 or (len(tokens) >= long and len(set(tokens)) < share * len(tokens))
