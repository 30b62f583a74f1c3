"""A Decoder: texts one after the other, streamed or not, with the model left as it was."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins import OracleHeads
from tape import TapeRecorder
from tiny_models import VOCAB, generate, generated, prompt, tiny_model
from transformers import PreTrainedModel

from cerberus_ext import AlwaysClosed, CerberusConfig, CerberusHeads, Decoder, StaticPolicy, SuffixProposer, decode
from cerberus_ext.drafting.gate import Gate, Signals
from cerberus_ext.runtime import runtime
from cerberus_ext.runtime.recorder import RECORDERS
from cerberus_ext.runtime.runtime import runtime_of
from cerberus_ext.runtime.stepper import Chunk

NEW = 16


@pytest.fixture
def llama() -> PreTrainedModel:
    return copy.deepcopy(tiny_model("llama"))


def heads(seed: int = 0) -> CerberusHeads:
    torch.manual_seed(seed)
    return CerberusHeads(CerberusConfig("tiny", 32, VOCAB, num_heads=3))


def is_as_it_was(model: PreTrainedModel) -> None:
    assert model.config._attn_implementation == "sdpa" and not model.lm_head._forward_pre_hooks
    assert not torch.is_inference_mode_enabled()
    assert decode(model, None, prompt(), max_new_tokens=NEW).sequences.equal(generated("llama", "cpu", NEW))


def new_tokens(text: torch.Tensor) -> list[int]:
    return text[0, prompt().shape[1] :].tolist()


def test_streams_what_decode_returns(llama: PreTrainedModel) -> None:
    decoder = Decoder(llama, heads(), tree=8, proposers=[SuffixProposer()])
    out = decoder.decode(prompt(), max_new_tokens=NEW)
    chunks = list(decoder.stream(prompt(), max_new_tokens=NEW))
    assert [token for chunk in chunks for token in chunk.tokens] == new_tokens(out.sequences)
    assert new_tokens(out.sequences) == new_tokens(generated("llama", "cpu", NEW))
    assert chunks[0].proposers == [None], "the prompt's own"
    # Who drafted each token: those that the trace says, and behind them one of the target model.
    traced = [[*proposers, None] for proposers in out.stats.trace_proposers]
    assert [chunk.proposers for chunk in chunks[1:-1]] == traced[:-1]
    assert chunks[-1].proposers == traced[-1][: len(chunks[-1].tokens)]
    assert any(proposers != [None] for proposers in traced)
    assert decoder.stats is not None and decoder.stats.trace == out.stats.trace
    assert decoder.stats.new_tokens == NEW


def test_a_chunk_ends_where_the_text_does(llama: PreTrainedModel) -> None:
    """In the middle of what a step has accepted."""
    text = generated("llama", "cpu", NEW)
    eos = int(text[0, prompt().shape[1] + 6])
    want = new_tokens(generate(llama, prompt(), max_new_tokens=NEW, eos_token_id=eos))
    oracle = OracleHeads(text, 4, VOCAB)
    oracle.seen = prompt().shape[1]
    tokens: list[int] = []
    for chunk in Decoder(llama, oracle, tree=StaticPolicy.chain(4)).stream(
        prompt(), max_new_tokens=NEW, eos_token_id=eos
    ):
        assert len(chunk.tokens) == len(chunk.proposers)
        tokens += chunk.tokens
        oracle.seen += len(chunk.tokens)
    assert tokens == want and tokens[-1] == eos


def test_closed_early_the_model_is_as_it_was(llama: PreTrainedModel) -> None:
    stream = Decoder(llama, heads()).stream(prompt(), max_new_tokens=NEW)
    first = next(stream)
    assert isinstance(first, Chunk) and not torch.is_inference_mode_enabled(), "the caller's mode is his"
    with pytest.raises(RuntimeError, match="decode: model must not be decoding already"):
        decode(llama, None, prompt(), max_new_tokens=2)
    stream.close()
    is_as_it_was(llama)


def test_close_ends_a_stream(llama: PreTrainedModel) -> None:
    """And what it holds is free, its cache, too."""
    with Decoder(llama, heads()) as decoder:
        stream = decoder.stream(prompt(), max_new_tokens=NEW)
        next(stream)
    assert list(stream) == [] and runtime_of(llama).pasts == []
    is_as_it_was(llama)

    class Closing(Gate):
        def decide(self, signals: Signals) -> int:
            decoder.close()
            return 0

    decoder = Decoder(llama, heads(), gate=Closing())
    tokens = [token for chunk in decoder.stream(prompt(), max_new_tokens=NEW) for token in chunk.tokens]
    assert tokens == new_tokens(generated("llama", "cpu", NEW))


def test_forgotten_the_model_is_free(llama: PreTrainedModel) -> None:
    for _ in Decoder(llama, heads()).stream(prompt(), max_new_tokens=NEW):
        break
    is_as_it_was(llama)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_a_stream(error: type[BaseException], llama: PreTrainedModel) -> None:
    class Failing(Gate):
        def decide(self, signals: Signals) -> int:
            raise error("in the middle")

    stream = Decoder(llama, heads(), gate=Failing()).stream(prompt(), max_new_tokens=NEW)
    next(stream)
    with pytest.raises(error, match="in the middle"):
        next(stream)
    is_as_it_was(llama)


def test_no_tokens(llama: PreTrainedModel) -> None:
    decoder = Decoder(llama, heads())
    assert list(decoder.stream(prompt(), max_new_tokens=0)) == []
    assert decoder.decode(prompt(), max_new_tokens=0).sequences.equal(prompt())


def test_arguments_are_checked_where_they_are_given(llama: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="decode: tree must be in 2..1024, got 1"):
        Decoder(llama, heads(), tree=1)
    decoder = Decoder(llama, heads())
    with pytest.raises(ValueError, match="decode: max_new_tokens must be >= 0, got -1"):
        decoder.decode(prompt(), max_new_tokens=-1)
    with pytest.raises(
        TypeError, match="decode: got an unexpected option 'tree', those of a text are attention_mask, "
    ):
        decoder.decode(prompt(), tree=8)
    with pytest.raises(ValueError, match="decode: max_new_tokens must be >= 0, got -1"):
        decoder.stream(prompt(), max_new_tokens=-1)
    with pytest.raises(TypeError, match="decode: got an unexpected option 'streamer'"):
        decoder.stream(prompt(), streamer=None)
    is_as_it_was(llama)


def test_the_model_is_checked_at_every_text(llama: PreTrainedModel) -> None:
    decoder = Decoder(llama, heads())
    llama.train()
    with pytest.raises(ValueError, match="decode: model must be in evaluation mode"):
        decoder.decode(prompt())
    llama.eval()
    assert decoder.decode(prompt(), max_new_tokens=NEW).sequences.equal(generated("llama", "cpu", NEW))


def test_warm_up_makes_the_fused_step(llama: PreTrainedModel) -> None:
    decoder = Decoder(llama, heads(), tree=9)
    stats = decoder.warm_up()
    assert stats.fused and stats.fuse_seconds > 0
    out = decoder.decode(prompt(), max_new_tokens=NEW)
    assert out.stats.fused and out.stats.fuse_seconds == 0, "it is there"
    assert out.sequences.equal(generated("llama", "cpu", NEW))
    decoder.close()
    assert decoder.warm_up().fuse_seconds > 0


@pytest.mark.parametrize("tree", [StaticPolicy.from_widths([2, 1]), 9])
def test_warm_up_records_all_sizes(tree: Any, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RECORDERS, "cpu", lambda device: TapeRecorder())
    own = heads()
    with Decoder(llama, own, tree=tree, graphs=True) as decoder:
        sizes = 2 if isinstance(tree, StaticPolicy) else 4
        stats = decoder.warm_up()
        assert stats.captures == sizes and stats.capture_seconds > 0
        out = decoder.decode(prompt(), max_new_tokens=NEW)
        assert out.stats.captures == 0 and out.stats.graphed_steps == out.stats.steps
        assert out.sequences.equal(generated("llama", "cpu", NEW))
    assert runtime_of(llama)._recordings is None


def test_warm_up_without_anything_to_prepare(llama: PreTrainedModel) -> None:
    stats = Decoder(llama, heads()).warm_up()
    assert stats.captures == 0 and stats.fallback is not None
    is_as_it_was(llama)


def test_warm_up_refuses_what_decode_refuses(llama: PreTrainedModel) -> None:
    decoder = Decoder(llama, heads())
    llama.train()
    with pytest.raises(ValueError, match="decode: model must be in evaluation mode"):
        decoder.warm_up()
    llama.eval()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="decode: model must not run under"):
        decoder.warm_up()
    is_as_it_was(llama)


def test_a_model_that_decodes_without_drafts(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    none = dataclasses.replace(runtime_of(llama).capability(), no_drafts_because="it mixes tokens")
    monkeypatch.setattr(runtime.Runtime, "capability", lambda self: none)
    decoder = Decoder(llama, heads(), tree=9)
    assert decoder.warm_up().no_drafts_because is None, "nothing is drafted while it warms up"
    stats = decoder.decode(prompt(), max_new_tokens=NEW).stats
    assert stats.open_steps == 0 and stats.no_drafts_because == "it mixes tokens"


def test_decoders_of_a_model_share_what_is_kept(llama: PreTrainedModel) -> None:
    first, second = Decoder(llama, heads()), Decoder(llama, None, gate=AlwaysClosed())
    outs = [decoder.decode(prompt(), max_new_tokens=NEW).sequences for decoder in (first, second, first)]
    assert all(out.equal(generated("llama", "cpu", NEW)) for out in outs)
    assert sum(model is llama for model in runtime._runtimes) == 1


def test_heads_that_bind_something_else(llama: PreTrainedModel) -> None:
    class Odd:
        config = CerberusConfig("tiny", 32, VOCAB)

        def bind(self, model: PreTrainedModel) -> Any:
            return 3

    with pytest.raises(TypeError, match="decode: heads.bind must return a Drafter, got int"):
        decode(llama, Odd(), prompt(), max_new_tokens=4)
    is_as_it_was(llama)


@pytest.mark.parametrize("first", [True, False])
def test_what_is_kept_serves_in_both_modes(
    first: bool, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller may be in inference mode, or not."""
    monkeypatch.setitem(RECORDERS, "cpu", lambda device: TapeRecorder())
    decoder = Decoder(llama, heads(), tree=StaticPolicy.chain(2), graphs=True)
    for mode in (first, not first, first):
        with torch.inference_mode(mode):
            out = decoder.decode(prompt(), max_new_tokens=NEW)
        assert out.sequences.equal(generated("llama", "cpu", NEW))
    assert out.stats.captures == 0


@pytest.mark.parametrize("answer", [True, None, 2.0, "all"])
def test_gates_that_answer_something_else(answer: Any, llama: PreTrainedModel) -> None:
    class Odd(Gate):
        def decide(self, signals: Signals) -> int:
            return answer

    with pytest.raises(TypeError, match="decode: gate: what Odd.decide returns must be an integer, got "):
        decode(llama, heads(), prompt(), max_new_tokens=4, gate=Odd())
    is_as_it_was(llama)


@pytest.mark.parametrize("nodes", [np.int64(5), torch.tensor(5), -1, 0, 1, 99])
def test_gates_that_answer_numbers(nodes: Any, llama: PreTrainedModel) -> None:
    class Fixed:
        """No Gate, but as one."""

        needs = ("hidden",)

        def decide(self, signals: Signals) -> Any:
            assert signals.hidden is not None and signals.hidden.shape == (1, 32)
            assert (signals.entropy, signals.expected_tokens, signals.max_nodes) == (None, None, 8)
            return nodes

    out = decode(llama, heads(), prompt(), max_new_tokens=NEW, tree=8, gate=Fixed(), proposers=[])  # type: ignore[arg-type]
    assert out.sequences.equal(generated("llama", "cpu", NEW))
    assert max(size for size, _ in out.stats.trace) == min(max(int(nodes), 1), 8)


@pytest.mark.parametrize("call", ["decode", "stream"])
def test_unknown_options(call: str, llama: PreTrainedModel) -> None:
    with pytest.raises(
        TypeError, match="^decode: got an unexpected option 'temprature', those of a text are attention_"
    ):
        getattr(Decoder(llama), call)(prompt(), temprature=1.0)
    with pytest.raises(TypeError, match="'plan'"):  # a name of the inside, not of the surface
        getattr(Decoder(llama), call)(prompt(), plan=3)


def stops(*_: Any) -> Any:
    raise StopIteration("inside")


CALLBACKS: list[tuple[str, dict[str, Any]]] = [
    ("streamer.put", {"streamer": SimpleNamespace(put=stops, end=lambda: None)}),
    ("stopping_criteria", {"stopping_criteria": [stops]}),
    ("gate: SimpleNamespace.decide", {"gate": SimpleNamespace(needs=(), decide=stops)}),
    ("proposers[0]", {"proposers": [stops]}),
    ("proposers: SimpleNamespace.propose", {"proposers": [lambda _: SimpleNamespace(propose=stops, extend=len)]}),
    (
        "proposers: SimpleNamespace.extend",
        {"proposers": [lambda _: SimpleNamespace(propose=lambda _: ([], []), extend=stops)]},
    ),
]


@pytest.mark.parametrize(("name", "options"), CALLBACKS, ids=[name for name, _ in CALLBACKS])
def test_callbacks_that_raise_stop_iteration(name: str, options: dict[str, Any], llama: PreTrainedModel) -> None:
    """It would end the loop's generator, or be an error of the generator's."""
    with pytest.raises(RuntimeError) as error:
        decode(llama, None, prompt(), max_new_tokens=6, **options)
    assert str(error.value) == f"decode: {name} must not raise StopIteration"
    assert isinstance(error.value.__cause__, StopIteration)
    is_as_it_was(llama)


def test_a_static_policy_names_drafts_that_have_to_be_there(llama: PreTrainedModel) -> None:
    few = CerberusHeads(CerberusConfig("tiny", 32, VOCAB, num_heads=3, draft_vocab=5))
    with pytest.raises(ValueError, match=r"tree must have 1 to 5 drafts of each head, got 6"):
        decode(llama, few, prompt(), max_new_tokens=4, tree=StaticPolicy.from_widths([6]))
    is_as_it_was(llama)
    assert decode(llama, few, prompt(), max_new_tokens=4, tree=16).stats.new_tokens == 4, "a dynamic one takes them"
