"""Streams of several prompts, and a Decoder after one that did not come to its end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import NEW, KnowingBatch, alone, equal, prompts, texts_of
from proposer_stand_ins import right
from tiny_families import tiny_family

import cerberus_ext
from cerberus_ext import Decoder
from cerberus_ext.drafting.gate import AlwaysOpen, Gate, Signals
from cerberus_ext.runtime.runtime import runtime_of


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_chunks_say_their_row(slots: int) -> None:
    model, rows = tiny_family("llama"), prompts([5, 2, 11, 7])
    want = alone(model, rows)
    decoder = Decoder(model, tree=6, proposers=[KnowingBatch(want, right())])
    found: list[list[int]] = [[] for _ in rows]
    order = []
    for chunk in decoder.stream(rows, max_new_tokens=NEW, slots=slots):
        assert len(chunk.tokens) == len(chunk.proposers) >= 1 and not torch.is_inference_mode_enabled()
        found[chunk.row] += chunk.tokens
        order.append(chunk.row)
    assert found == [text[0, row.shape[1] :].tolist() for row, text in zip(rows, want, strict=True)]
    assert (order == sorted(order)) == (slots == 1)
    assert decoder.stats is not None and decoder.stats.new_tokens == NEW * len(rows)
    assert sum(decoder.stats.seconds.values()) == pytest.approx(sum(row.total_seconds for row in decoder.stats.rows))


def test_a_slot_that_is_free_is_taken_before_the_next_step() -> None:
    model, rows = tiny_family("llama"), prompts([5, 2, 11, 7])
    eos = int(alone(model, rows)[0][0, 5 + 3])
    seen: list[int] = []
    for chunk in Decoder(model, proposers=[]).stream(rows, max_new_tokens=NEW, slots=2, eos_token_id=eos):
        seen.append(chunk.row)
        if chunk.row == 0 and chunk.tokens[-1] == eos:
            ended = len(seen)
    later = seen[ended:]
    assert later[0] == 1, "of the same step"
    assert later[1] == 2 and set(later[2:4]) == {1, 2}


class Interrupted(Gate):
    def __init__(self) -> None:
        self.left = 5

    def decide(self, signals: Signals) -> int:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return signals.max_nodes


@pytest.mark.parametrize("how", ["closed", "interrupted", "thrown"])
def test_a_decoder_is_usable_after_a_stream_that_did_not_end(how: str) -> None:
    model, rows = tiny_family("llama"), prompts([5, 2, 11])
    decoder = Decoder(model, tree=6, gate=Interrupted() if how == "interrupted" else AlwaysOpen())
    stream: Any = decoder.stream(rows, max_new_tokens=NEW)
    if how == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    else:
        for _ in range(5):
            next(stream)
        with pytest.raises(RuntimeError, match="model must not be decoding already"):
            decoder.decode(rows, max_new_tokens=1)
        if how == "closed":
            stream.close()
        else:
            with pytest.raises(KeyError):
                stream.throw(KeyError)
    assert not model.get_output_embeddings()._forward_pre_hooks
    equal(texts_of(Decoder(model).decode(rows, max_new_tokens=NEW).sequences, rows), alone(model, rows))


class Fails:
    """A logits processor that raises at its first token, or at its second one."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self.calls:
            raise MemoryError("no memory")
        self.calls -= 1
        return scores


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_text_that_fails_before_its_first_token_ends_alone(place: int) -> None:
    model, rows = tiny_family("llama"), prompts([5, 2, 11])
    batch = Decoder(model, tree=6).batch(3)
    requests = [
        batch.add(row, max_new_tokens=NEW, **({"logits_processor": [Fails(0)]} if number == place else {}))
        for number, row in enumerate(rows)
    ]
    chunks = list(batch.chunks())
    assert [chunk.row for chunk in chunks if not chunk.tokens] == [place]
    assert isinstance(requests[place].error, MemoryError) and requests[place].text.ended
    for number, (request, text) in enumerate(zip(requests, alone(model, rows), strict=True)):
        assert request.text.tokens == ([] if number == place else text[0, rows[number].shape[1] :].tolist())
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_one_that_fails_later_ends_all() -> None:
    batch = Decoder(tiny_family("llama"), tree=6).batch(3)
    for row, options in zip(prompts([5, 2]), ({}, {"logits_processor": [Fails(1)]}), strict=True):
        batch.add(row, max_new_tokens=NEW, **options)
    with pytest.raises(MemoryError):
        list(batch.chunks())


def test_each_row_goes_on_from_what_has_most_in_common_with_it() -> None:
    """The turns of several conversations."""
    model, rows = tiny_family("llama"), prompts([5, 2, 11])
    with Decoder(model) as decoder:
        first = decoder.decode(rows, max_new_tokens=NEW)
        assert [row.reused_tokens for row in first.stats.rows] == [0, 0, 0]
        texts = texts_of(first.sequences, rows)
        longer = [torch.cat([text, row], 1) for text, row in zip(texts, rows, strict=True)][::-1]
        second = decoder.decode(longer, max_new_tokens=NEW)
        known = [text.shape[1] - row.shape[1] - 1 for text, row in zip(longer, rows[::-1], strict=True)]
        assert [row.reused_tokens for row in second.stats.rows] == known
        assert len(runtime_of(model).pasts) == 3
        decoder.decode(rows[0], max_new_tokens=2)
        assert len(runtime_of(model).pasts) == 1, "no more than were of use to the latest"
    equal(texts_of(second.sequences, longer), alone(model, longer))
    assert not runtime_of(model).pasts


def test_conversations_that_take_turns_all_go_on() -> None:
    """One after the other, with two slots: for a third, what was used longest ago is forgotten."""
    model, rows, goes_on = tiny_family("llama"), prompts([5, 9, 11]), []
    asked: list[torch.Tensor] = []
    found: list[torch.Tensor] = []
    with Decoder(model) as decoder:
        for number in (0, 1, 0, 2, 0, 1, 0, 1):
            batch, row = decoder.batch(2), rows[number]
            request = batch.add(row, max_new_tokens=NEW)
            list(batch.chunks())
            rows[number] = torch.cat([row, torch.tensor([request.text.tokens])], 1)
            asked.append(row)
            found.append(rows[number])
            goes_on.append(request.stats.reused_tokens == row.shape[1] - 1)
            assert len(runtime_of(model).pasts) <= 2
    assert goes_on == [False, False, True, False, True, False, True, True]
    equal(found, alone(model, asked))


@pytest.mark.parametrize("goes_on", [True, False])
def test_fewer_slots_than_before_free_the_rest_at_once(goes_on: bool) -> None:
    model, rows = tiny_family("llama"), prompts([5, 2, 11])
    with Decoder(model) as decoder:
        texts = texts_of(decoder.decode(rows, max_new_tokens=NEW).sequences, rows)
        row = torch.cat([texts[1] if goes_on else texts[1][:, :9], rows[0]], 1)
        batch = decoder.batch(1)
        request = batch.add(row, max_new_tokens=NEW)
        chunks = batch.chunks()
        next(chunks)
        assert not runtime_of(model).pasts and request.stats.reused_tokens == (texts[1].shape[1] - 1 if goes_on else 9)
        list(chunks)
    assert request.text.tokens == alone(model, [row])[0][0, row.shape[1] :].tolist()


def test_generate_takes_several_rows() -> None:
    model, rows = tiny_family("llama"), prompts([4, 13, 9])
    ids = torch.cat([torch.cat([row.new_zeros(1, 13 - row.shape[1]), row], 1) for row in rows])
    mask = torch.tensor([[int(place >= 13 - row.shape[1]) for place in range(13)] for row in rows])
    eos = int(alone(model, rows)[1][0, 13 + 5])
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}
    for pad in ({"pad_token_id": 3, "eos_token_id": eos}, {"pad_token_id": 0}):
        want = model.generate(ids, **options, **pad)
        found = model.generate(ids, **options, **pad, custom_generate=cerberus_ext.generate)
        assert found.tolist() == want.tolist()


def test_a_model_is_not_examined_again_for_a_text_that_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_family("llama")
    with Decoder(model) as decoder:
        decoder.warm_up()
        monkeypatch.setattr("cerberus_ext.runtime.runtime.examine", None)
        batch = decoder.batch()
        batch.add([3, 4], max_new_tokens=9)
        for number, _ in enumerate(batch.chunks()):
            if number < 3:
                batch.add([3, 4, 5 + number], max_new_tokens=9)
