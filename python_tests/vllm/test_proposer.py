"""The proposer for vLLM, without vLLM: what it drafts for the rows of a batch, whatever happens to them."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm_batch import VOCABULARY, Batch, vllm_config

from cerberus_ext.drafting.suffix import SuffixProposer as SuffixFactory
from cerberus_ext.vllm import SuffixProposer
from cerberus_ext.vllm import texts as texts_module
from cerberus_ext.vllm.texts import Text, newest

LIST = [1, 2, 3, 4, 5] * 4
STORY = list(range(20, 60))


def standing_clock() -> float:
    """With it a proposer learns nothing about time."""
    return 0.0


def make(**settings: int) -> SuffixProposer:
    return SuffixProposer(vllm_config(**settings), standing_clock)


def expected(text: list[int], rows: int, most: int = 8) -> list[int]:
    """What a new index of the whole text drafts, where a draft costs a sixteenth of what a step costs without rows."""
    tokens, probabilities = map(np.asarray, SuffixFactory()(text).propose(most))
    return tokens[np.cumprod(probabilities) > rows / (16 + rows)].tolist()


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each `Text.follow` had to index."""
    counts: list[int] = []
    follow = Text.follow

    def counted(self: Text, *arguments: Any) -> None:
        follow(self, *arguments)
        counts.append(self.new)

    monkeypatch.setattr(Text, "follow", counted)
    return counts


# ---------------------------------------------------------------- one text


def test_drafts_what_followed() -> None:
    batch, proposer = Batch(), make()
    batch.add("a", LIST)
    assert batch.step(proposer, {"a": [1]}) == {"a": [2, 3, 4, 5, 1, 2, 3, 4]}
    assert batch.step(proposer, {"a": [2, 3, 4]}) == {"a": [5, 1, 2, 3, 4, 5, 1, 2]}


def test_drafts_nothing_where_nothing_repeats() -> None:
    batch, proposer = Batch(), make()
    batch.add("a", STORY)
    assert batch.step(proposer, {"a": [60]}) == {"a": []}


def test_the_index_grows_by_what_is_new(indexed: list[int]) -> None:
    batch, proposer = Batch(), make()
    batch.add("a", LIST)
    for new in ([1], [2, 3], [9]):
        batch.step(proposer, {"a": new})
    assert indexed == [21, 2, 1]


@pytest.mark.parametrize(("left", "drafts"), [(0, 0), (1, 0), (2, 1), (4, 3), (8, 7), (9, 8), (50, 8)])
def test_no_drafts_beyond_the_longest_text(left: int, drafts: int) -> None:
    """vLLM adds a token of its own to the accepted ones, and asserts that it fits."""
    batch, proposer = Batch(), make(max_tokens=len(LIST) + 1 + left)
    batch.add("a", LIST)
    assert len(batch.step(proposer, {"a": [1]})["a"]) == drafts


def test_no_more_drafts_than_asked_for() -> None:
    batch, proposer = Batch(), make(drafts=3)
    batch.add("a", LIST)
    assert batch.step(proposer, {"a": [1]}) == {"a": [2, 3, 4]}


@pytest.mark.parametrize("strange", [-1, VOCABULARY, 2**31 - 1, -(2**31)])
def test_what_is_no_token_is_never_drafted(strange: int) -> None:
    """Places of images may have ids beyond the vocabulary; vLLM fills up with -1. A model would look them up."""
    batch, proposer = Batch(), make()
    batch.add("a", [1, 2, strange, 4] * 5)
    assert batch.step(proposer, {"a": [1]}) == {"a": [2]}
    assert batch.step(proposer, {"a": [2]}) == {"a": []}
    assert batch.step(proposer, {"a": [strange]})["a"][:2] == [4, 1]


# ---------------------------------------------------------------- rows


def test_each_row_has_its_own_text_and_its_own_list() -> None:
    batch, proposer = Batch(), make()
    batch.add("a", LIST)
    batch.add("b", STORY)
    batch.add("c", LIST[::-1])
    batch.add("d", STORY)
    drafts = batch.step(proposer, {"a": [1], "b": [60], "c": [5], "d": [61]})
    assert drafts == {"a": expected([*LIST, 1], 4), "b": [], "c": expected([*LIST[::-1], 5], 4), "d": []}
    assert drafts["b"] is not drafts["d"]


def test_a_prompt_in_parts_is_indexed_when_it_has_been_read(indexed: list[int]) -> None:
    batch, proposer = Batch(), make()
    batch.add("a", LIST)
    assert batch.step(proposer, {}) == {"a": []}
    assert batch.step(proposer, {}) == {"a": []} and indexed == []
    assert batch.step(proposer, {"a": [1]}) == {"a": expected([*LIST, 1], 1)} and indexed == [21]


def test_rows_that_move_keep_their_texts(indexed: list[int]) -> None:
    batch, proposer = Batch(), make()
    for name, text in (("a", LIST), ("b", STORY + LIST), ("c", LIST[1:])):
        batch.add(name, text)
    batch.step(proposer, {"a": [1], "b": [1], "c": [1]})
    batch.swap("a", "c")
    batch.step(proposer, {"a": [2], "b": [2], "c": [2]})
    batch.remove("c")  # b moves into its row
    drafts = batch.step(proposer, {"a": [3], "b": [3]})
    for name in ("a", "b"):
        assert drafts[name] and drafts[name] == expected(batch.text(name), 2)[: len(drafts[name])]
    assert indexed[3:] == [1] * 5


def test_a_row_that_is_used_again_has_a_new_text(indexed: list[int]) -> None:
    batch, proposer = Batch(), make()
    batch.add("a", LIST)
    batch.step(proposer, {"a": [1]})
    batch.remove("a")
    batch.add("b", [5, 4, 3, 2, 1, 5, 4, 3])
    assert batch.step(proposer, {"b": [2]}) == {"b": expected([5, 4, 3, 2, 1, 5, 4, 3, 2], 1)}
    assert indexed == [21, 9]


def test_a_text_that_has_lost_tokens_is_indexed_again(indexed: list[int]) -> None:
    """vLLM takes tokens back where keys and values could not be loaded."""
    batch, proposer = Batch(), make()
    batch.add("a", LIST)
    batch.step(proposer, {"a": [9, 9, 9]})
    batch.counts[0] -= 3
    assert batch.step(proposer, {"a": [1]}) == {"a": expected([*LIST, 1], 1)}
    assert indexed == [23, 21]


def test_a_request_that_comes_back_finds_its_text(indexed: list[int]) -> None:
    """Preempted, it reads its whole text again, and then goes on in another row."""
    batch, proposer = Batch(), make()
    batch.add("a", LIST)
    batch.add("b", STORY)
    batch.step(proposer, {"a": [1], "b": [60]})
    text = batch.remove("a")
    for token in range(61, 70):
        batch.step(proposer, {"b": [token]})
    batch.add("a", text)
    batch.step(proposer, {"b": [70]})
    assert batch.step(proposer, {"a": [2], "b": [71]})["a"] == expected([*text, 2], 2)
    assert indexed[-2:] == [1, 1]


def test_steps_without_a_call_are_made_up_for(indexed: list[int]) -> None:
    """vLLM asks for no drafts as long as one of the texts is too long for them."""
    batch, proposer = Batch(), make()
    batch.add("a", LIST)
    batch.step(proposer, {"a": [1]})
    batch.write(0, batch.text("a") + [2, 3, 4])
    assert batch.step(proposer, {"a": [5]}) == {"a": expected([*LIST, 1, 2, 3, 4, 5], 1)}
    assert indexed == [21, 4]


def test_equal_texts_have_an_index_each(indexed: list[int]) -> None:
    """Several answers to one prompt, of which one may be ahead of the other."""
    batch, proposer = Batch(), make()
    batch.add("a", LIST)
    batch.add("b", LIST)
    batch.step(proposer, {"a": [1], "b": [1]})
    batch.step(proposer, {"a": [2, 3], "b": [2]})
    batch.swap("a", "b")
    drafts = batch.step(proposer, {"a": [4], "b": [3]})
    assert drafts == {name: expected(batch.text(name), 2) for name in ("a", "b")}
    assert sum(indexed[2:]) == 5, "no token more than once"


def test_a_chat_goes_on_with_its_last_answer(indexed: list[int]) -> None:
    batch, proposer = Batch(), make()
    batch.add("a", LIST)
    batch.step(proposer, {"a": [1]})
    text = batch.remove("a")
    batch.step(proposer, {})
    batch.add("b", [*text, *STORY])
    batch.step(proposer, {"b": [2]})
    assert indexed == [21, len(STORY) + 1]


def test_texts_that_wait_are_forgotten_when_they_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes(texts: list[Text]) -> list[int]:
        return [text.size for text in texts]

    texts = [Text() for _ in range(4)]
    for text, size in zip(texts, (5, 4, 3, 2), strict=True):
        text.size = size
    assert [sizes(newest(texts, most)) for most in (0, 1, 2, 4, 5, 9, 14, 99)] == [
        [], [], [2], [2], [3, 2], [4, 3, 2], [5, 4, 3, 2], [5, 4, 3, 2]
    ]  # fmt: skip
    monkeypatch.setattr(texts_module, "_MAX_WAITING", 50)
    batch, proposer = Batch(), make()
    for number in range(10):
        batch.add("a", [number] * 20)
        batch.step(proposer, {"a": [number]})
        batch.remove("a")
    batch.step(proposer, {})
    assert sizes(proposer._texts._waiting) == [21, 21]


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_drafts_are_those_of_the_text(seed: int) -> None:
    draw = random.Random(seed)
    batch, proposer, gone, made = Batch(6, 4096), make(), [], 0
    names = map(str, itertools.count())
    for _ in range(120):
        if len(batch.names) < 6 and draw.random() < 0.3:
            text = [draw.randrange(4) for _ in range(draw.randrange(1, 40))]
            batch.add(next(names), gone.pop() if gone and draw.random() < 0.5 else text)
        if len(batch.names) > 1 and draw.random() < 0.2:
            batch.swap(*draw.sample(batch.names, 2))
        if batch.names and draw.random() < 0.15:
            gone.append(batch.remove(draw.choice(batch.names)))
        reading = {name for name in batch.names if draw.random() < 0.2}
        sampled = {
            name: [draw.randrange(4) for _ in range(draw.randrange(1, 4))]
            for name in batch.names
            if name not in reading
        }
        drafts = batch.step(proposer, sampled)
        for name in batch.names:
            fitting = expected(batch.text(name), len(sampled)) if name in sampled else []
            assert drafts[name] == fitting[: len(drafts[name])]
        made += sum(map(len, drafts.values()))
    assert made > 50


def test_no_rows() -> None:
    assert make().propose([], np.zeros(4, np.int32), np.zeros((4, 8), np.int32)) == []
    assert make().propose([[]], np.ones(4, np.int32), np.zeros((4, 8), np.int32), slot_mappings={}) == [[]]


# ---------------------------------------------------------------- what it takes


def run_steps(seconds: Callable[[int], float], rows: int, steps: int = 150) -> float:
    """Drafts per row and step, in the later half, of texts that repeat for the most part, on such a machine."""
    clock, draw = [0.0], random.Random(0)
    batch, proposer = Batch(rows), SuffixProposer(vllm_config(), lambda: clock[0])
    for row in range(rows):
        batch.add(str(row), list(range(10)) * 3)
    drafts: dict[str, list[int]] = {name: [] for name in batch.names}
    counts = []
    for _ in range(steps):
        clock[0] += seconds(sum(1 + len(tokens) for tokens in drafts.values()))
        sampled = {}
        for name, tokens in drafts.items():
            last, sampled[name] = batch.text(name)[-1], []
            for _ in range(len(tokens) + 1):
                right = draw.random() < 0.8
                last = (last + (1 if right else 4)) % 10
                sampled[name].append(last)
                if not right:
                    break
        drafts = batch.step(proposer, sampled)
        counts.append(sum(map(len, drafts.values())) / rows)
    return sum(counts[steps // 2 :]) / len(counts[steps // 2 :])


def test_drafts_are_many_where_tokens_cost_little_and_few_where_they_cost_much() -> None:
    cheap = run_steps(lambda tokens: 1 + 0.001 * tokens, rows=4)
    usual = run_steps(lambda tokens: 16.0 + tokens, rows=4)
    dear = run_steps(lambda tokens: 0.1 + tokens, rows=4)
    assert cheap > 7 > 5 > usual > 1 > dear


def test_drafts_of_a_large_batch_are_fewer() -> None:
    few, many = (run_steps(lambda tokens: 16.0 + tokens, rows) for rows in (1, 24))
    assert few > 2 * many


def test_a_text_whose_drafts_are_not_taken_gets_fewer() -> None:
    """Whatever its record of single matches says; and as many as before when they are taken again."""
    tokens = np.array(LIST * 30, np.int32)
    text, size, counts = Text(), 20, []
    for accepted in (0,) * 12 + (8,) * 30:
        text.follow(tokens[:size], tokens[:size].tobytes())
        counts.append(len(text.draft(8, 0.5, VOCABULARY)))
        size += 1 + min(accepted, counts[-1])
    assert counts[0] > 6 and min(counts[:13]) < 3 and counts[-1] > 6


def test_importing_it_is_cheap(tmp_path: Path) -> None:
    """vLLM has its own transformers and takes long enough to start."""
    code = "import sys, cerberus_ext.vllm; print(*sorted({'transformers', 'vllm', 'matplotlib'} & set(sys.modules)))"
    # Not in the source folder, which may have no libraries.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == []
