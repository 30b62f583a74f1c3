"""Answers, their hidden states, the cache of those, and windows over what does not fit into memory."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_llama import SIZE, VOCAB
from transformers import LlamaForCausalLM

from cerberus_ext.training import hidden, positions
from cerberus_ext.training.answers import Answer, Answers, read_answers
from cerberus_ext.training.options import SEGMENT
from cerberus_ext.training.positions import Chunk, Corpus, Positions
from cerberus_ext.training.processes import Processes
from cerberus_ext.training.states import StateSource
from cerberus_ext.training.windows import Drawn, Windows, segments

CHUNK_BYTES = 2 * SIZE  # of one position


@pytest.fixture
def chunks_of_16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "CHUNK_LINES", 16)
    monkeypatch.setattr(hidden, "FORWARD_TOKENS", 90)  # several lines a forward, several forwards a chunk


def source(llama: LlamaForCausalLM, answers: Answers, folder: Path | None, limit: float | None = None) -> StateSource:
    return StateSource(llama, Corpus(answers), Processes(), folder, limit)


def load(llama: LlamaForCausalLM, answers: Answers, folder: Path | None, limit: float | None = None) -> Positions:
    states = source(llama, answers, folder, limit)
    return states.together(states.corpus.training)


@pytest.fixture
def data(answers: Path) -> Answers:
    return read_answers([answers], VOCAB)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: must be JSON, got '{'"),
        ("[1]", "line 2: must be an object, got list"),
        ('{"p": [1]}', 'line 2: "r" must be a list of at least one token id, got None'),
        ('{"p": [], "r": [1]}', r'line 2: "p" must be a list of at least one token id, got \[\]'),
        ('{"p": [1], "r": [101]}', r'line 2: "r" must hold ids in 0..100, got 101'),
        ('{"p": [1, true], "r": [1]}', r'line 2: "p" must hold ids in 0..100, got True'),
        ('{"p": [1], "r": [1], "t": -1}', 'line 2: "t" must be a temperature >= 0, got -1'),
        ('{"p": [1], "r": [1], "t": NaN}', 'line 2: "t" must be a temperature >= 0, got nan'),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(f'{{"p": [1], "r": [2]}}\n{line}\n')
    with pytest.raises(ValueError, match=f"train: data.jsonl {message}"):
        read_answers([file], VOCAB)


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="train: data.jsonl must have at least one line, got none"):
        read_answers([tmp_path / "data.jsonl"], VOCAB)


def test_answers_are_read_as_they_were_written(tmp_path: Path) -> None:
    lines = [Answer([1, 2], [3], 0.7), Answer([4], [5, 6], None)]
    for number, line in enumerate(lines):
        (tmp_path / f"{number}.jsonl").write_text(line.json() + "\n")
    read = read_answers([tmp_path / "0.jsonl", tmp_path / "1.jsonl"], VOCAB)
    assert [(list(line.prompt), list(line.answer), line.temperature) for line in read.lines] == [
        ([1, 2], [3], 0.7), ([4], [5, 6], None)
    ]  # fmt: skip
    assert read.describe() | {"sha256": ""} == {"sha256": "", "lines": 2, "prompt_tokens": 3, "answer_tokens": 3}


def test_hidden_states_are_the_ones_that_produce_the_answer(
    data: Answers, llama: LlamaForCausalLM, chunks_of_16: None
) -> None:
    found, lines = load(llama, data, None), data.lines
    assert found.tokens.tolist() == [token for line in lines for token in line.answer]
    assert found.left.tolist() == [left for line in lines for left in reversed(range(len(line.answer)))]
    assert found.lines.tolist() == [number for number, line in enumerate(lines) for _ in line.answer]
    for number in (0, 17, 39):
        ids = torch.tensor([[*lines[number].prompt, *lines[number].answer]])
        first = len(lines[number].prompt) - 1
        with torch.no_grad():
            expected = llama.model(ids).last_hidden_state[0, first:-1]
        torch.testing.assert_close(found.hidden[found.lines == number].float(), expected, rtol=0.02, atol=0.02)


def test_held_out_lines_have_chunks_of_their_own(data: Answers, llama: LlamaForCausalLM, chunks_of_16: None) -> None:
    whole, corpus = load(llama, data, None), Corpus(data, held=11)
    assert [(chunk.number, chunk.first, chunk.end) for chunk in corpus.training] == [(0, 0, 16), (1, 16, 29)]
    assert [(chunk.number, chunk.first, chunk.end) for chunk in corpus.held] == [(2, 29, 40)]
    found = StateSource(llama, corpus, Processes(), None, None).together(corpus.held)
    inside = whole.lines >= 29
    for name in ("tokens", "left", "lines", "offsets"):
        assert torch.equal(getattr(found, name), getattr(whole, name)[inside]), name
    torch.testing.assert_close(found.hidden, whole.hidden[inside], rtol=0.02, atol=0.02)


def test_cached_states_are_used_and_missing_ones_computed(
    tmp_path: Path, data: Answers, llama: LlamaForCausalLM, chunks_of_16: None
) -> None:
    fresh = load(llama, data, None)
    assert torch.equal(load(llama, data, tmp_path).hidden, fresh.hidden)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "cache.json", *(f"hidden-{number:05d}.safetensors" for number in range(3))
    ]  # fmt: skip
    kept = (tmp_path / "hidden-00000.safetensors").stat().st_mtime_ns
    (tmp_path / "hidden-00001.safetensors").unlink()
    states = source(llama, data, tmp_path)
    everything = Corpus(data).training
    assert states.missing(everything) == everything[1].rows
    assert torch.equal(states.together(everything).hidden, fresh.hidden)
    assert (tmp_path / "hidden-00000.safetensors").stat().st_mtime_ns == kept
    assert states.computed == everything[1].rows and states.missing(everything) == 0


def test_the_cache_is_bounded(tmp_path: Path, data: Answers, llama: LlamaForCausalLM, chunks_of_16: None) -> None:
    everything = Corpus(data).training
    limit = (everything[0].rows + everything[1].rows) * CHUNK_BYTES
    fresh = load(llama, data, None)
    for bound, files in ((limit - 1, 1), (limit, 2)):
        found = load(llama, data, tmp_path / str(files), bound)
        assert torch.equal(found.hidden, fresh.hidden)
        assert len(list((tmp_path / str(files)).glob("*.safetensors"))) == files
    states = source(llama, data, tmp_path / "2", limit)
    states.together(everything)
    assert states.computed == everything[2].rows  # the one beyond the bound, every time


def test_a_cache_of_something_else_is_refused(
    tmp_path: Path, answers: Path, data: Answers, llama: LlamaForCausalLM
) -> None:
    load(llama, data, tmp_path / "cache")
    other = tmp_path / "other.jsonl"
    other.write_text(answers.read_text() + '{"p": [1], "r": [2]}\n')
    with pytest.raises(ValueError, match="train: data_sha256 must be .* to use the hidden states in "):
        load(llama, read_answers([other], VOCAB), tmp_path / "cache")
    for text in ("{", "[]"):
        (tmp_path / "cache" / "cache.json").write_text(text)
        with pytest.raises(ValueError, match="train: cache: .*/cache.json is not of cached hidden states"):
            load(llama, data, tmp_path / "cache")


def test_states_without_a_record_are_refused(tmp_path: Path, data: Answers, llama: LlamaForCausalLM) -> None:
    load(llama, data, tmp_path)
    (tmp_path / "cache.json").unlink()
    with pytest.raises(ValueError, match="train: cache: .*/cache.json is not of cached hidden states"):
        load(llama, data, tmp_path)


def test_a_cached_chunk_of_another_shape_is_refused(tmp_path: Path, data: Answers, llama: LlamaForCausalLM) -> None:
    load(llama, data, tmp_path)
    save_file({"hidden": torch.zeros(3, SIZE)}, tmp_path / "hidden-00000.safetensors")
    with pytest.raises(
        ValueError, match=r"train: hidden in hidden-00000.safetensors must be \(\d+, 32\), got \(3, 32\)"
    ):
        load(llama, data, tmp_path)


# Ten chunks of 100 to 190 rows, 1450 in all.
CHUNKS = [Chunk(number, number, number + 1, 100 + 10 * number, 100 + 10 * number) for number in range(10)]


def plan(memory: float = 1e9, per_step: int = 4, seed: int = 0) -> Windows:
    return Windows(CHUNKS, memory, 1, per_step, seed)


def test_data_that_fits_is_one_window_in_the_order_of_the_file() -> None:
    whole = plan()
    assert whole.whole and whole.epoch(0) == whole.epoch(7) == [CHUNKS]
    per_epoch = (1450 // SEGMENT - 1) // 4
    steps = list(islice(whole.drawn(0), per_epoch + 1))
    assert [(step.epoch, step.number) for step in steps] == [(0, 0)] * per_epoch + [(1, 0)]
    assert all(step.window == CHUNKS for step in steps)


def test_windows_are_bounded_and_an_epoch_visits_every_chunk_once() -> None:
    cut = plan(memory=400)
    assert not cut.whole
    for epoch in range(5):
        window = cut.epoch(epoch)
        assert all(sum(chunk.rows for chunk in part) <= 400 for part in window)
        assert sorted(chunk.number for part in window for chunk in part) == list(range(10))
    assert cut.epoch(0) != cut.epoch(1) and cut.epoch(0) == plan(memory=400).epoch(0) != plan(memory=400, seed=1).epoch(
        0
    )


@pytest.mark.parametrize("memory", [1e9, 400])
def test_an_epoch_draws_every_segment_at_most_once(memory: float) -> None:
    whole = plan(memory)
    first, second = ([step for step in islice(whole.drawn(0), 200) if step.epoch == epoch] for epoch in (0, 1))
    assert len(first) == sum(whole.steps(window) for window in whole.epoch(0))
    for number, window in enumerate(whole.epoch(0)):
        rows = torch.cat([step.starts for step in first if step.number == number])
        assert rows.unique().numel() == rows.numel() == segments(window) // 4 * 4
        assert len((rows % SEGMENT).unique()) == 1  # one offset
        assert rows.min() >= 0 and rows.max() + SEGMENT <= sum(chunk.rows for chunk in window)
    assert not torch.equal(first[0].starts, second[0].starts)


def test_a_plan_can_be_entered_anywhere() -> None:
    def same(one: Drawn, other: Drawn) -> bool:
        return one[:3] == other[:3] and torch.equal(one.starts, other.starts)

    expected = list(islice(plan(memory=400).drawn(0), 123))
    for step in (119, 3, 60, 61, 0):
        assert all(map(same, islice(plan(memory=400).drawn(step), 3), expected[step:]))
    assert expected[-1].epoch > 1 and not same(expected[0], expected[1])


def test_too_little_memory_or_data() -> None:
    with pytest.raises(ValueError, match="train: memory must be at least 1.9e-07 GB, got 1.5e-07"):
        plan(memory=150)
    with pytest.raises(ValueError, match="train: memory must be at least 4.16e-07 GB, got 4e-07"):
        plan(memory=400, per_step=50)
    with pytest.raises(
        ValueError, match="data must have at least 1616 answer tokens before the held-out lines, got 1450"
    ):
        plan(per_step=200)
