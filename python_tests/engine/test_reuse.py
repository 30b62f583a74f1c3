"""What a Decoder keeps of a text: the next prompt that begins with it gives the same, and reads only the rest.

The same to the bit: sequences, and keys and values of all tokens. What is kept is right, or is not used.
"""

from __future__ import annotations

import copy
import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from context_stand_ins import heads_for
from stand_ins import OracleHeads, RandomGate
from tiny_models import VOCAB, prompt, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

import cerberus_ext
from cerberus_ext import Decoder, decode
from cerberus_ext.drafting.gate import Gate, Signals
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.runtime.runtime import runtime_of
from cerberus_ext.runtime.stats import DecodeOutput
from cerberus_ext.target import model as target_model

LENGTH, NEW = 9, 16
TREE = StaticPolicy.from_widths([2, 1, 1])


@pytest.fixture
def llama() -> PreTrainedModel:
    """One that tests may change."""
    return copy.deepcopy(tiny_model("llama"))


def kept(model: PreTrainedModel) -> tuple[list[int], Tensor]:
    """The tokens, and the model's keys and values of them."""
    (past,) = runtime_of(model).pasts
    assert past.cache.tensor is not None
    planes = past.cache.tensor[: 2 * len(past.cache.layers)]
    return past.tokens, planes[:, :, :, : len(past.tokens)].clone()


def forget(model: PreTrainedModel) -> None:
    decode(model, None, prompt(length=1), max_new_tokens=1)
    assert not runtime_of(model).pasts


Text = Callable[[Tensor], DecodeOutput]


def texts(model: PreTrainedModel, heads: str, **options: Any) -> Text:
    """Texts of one Decoder, for prompts (1, S)."""
    if heads != "oracle":
        bound = heads_for(model, model.dtype) if heads == "context" else None
        decoder = Decoder(model, bound, tree=TREE if bound else 6, **options)
        return lambda ids: decoder.decode(ids, max_new_tokens=NEW)
    answers: dict[Any, Tensor] = {}

    def known(ids: Tensor) -> DecodeOutput:
        key = tuple(ids[0].tolist())
        if key not in answers:  # with a model of its own, so that this one's cache stays
            answers[key] = decode(other, None, ids, max_new_tokens=NEW).sequences
        oracle = OracleHeads(answers[key], 3, VOCAB)
        return Decoder(model, oracle, tree=TREE, **options).decode(ids, max_new_tokens=NEW, streamer=oracle)

    other = copy.deepcopy(model)
    return known


def check(model: PreTrainedModel, text: Text, ids: Tensor, reused: int | None = None) -> DecodeOutput:
    """The text of these ids is the same with what is kept now as with nothing."""
    got, (tokens, planes) = text(ids), kept(model)
    forget(model)
    want, (all_tokens, all_planes) = text(ids), kept(model)
    assert want.stats.reused_tokens == 0
    assert got.sequences.tolist() == want.sequences.tolist()
    common = min(len(tokens), len(all_tokens))
    assert common >= ids.shape[1] and tokens[:common] == all_tokens[:common]
    assert torch.equal(planes[:, :, :, :common], all_planes[:, :, :, :common])
    assert reused is None or got.stats.reused_tokens == reused
    return got


@pytest.mark.pairwise
@pytest.mark.parametrize("fuse", [None, False])
@pytest.mark.parametrize("heads", ["none", "oracle", "context"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gpt2"])
def test_prefixes_of_every_length(name: str, dtype: torch.dtype, heads: str, fuse: bool | None) -> None:
    model = tiny_model(name, "cpu", dtype)
    text = texts(model, heads, fuse=fuse)
    first = text(prompt()).sequences
    known = len(kept(model)[0])
    assert known >= LENGTH + (NEW - 1) // 2
    every = range(first.shape[1] + 1)
    for length in every if fuse is None else (*every[:2], LENGTH, LENGTH + 5, *every[-3:]):  # op by op takes longer
        last = first[:, length : length + 1] if length < first.shape[1] else first[:, :1]
        another = torch.cat([first[:, :length], (last + 1) % VOCAB, prompt(length=2)], 1)
        for ids in (first[:, :length], another) if length else (another,):
            text(prompt())
            pair = heads == "context"  # what was the token's before the first new one is computed again
            want = max(0, min(length, ids.shape[1] - 1, len(kept(model)[0])) - pair)
            assert check(model, text, ids, want).stats.fused == (fuse is None)


@pytest.mark.parametrize("heads", ["none", "context"])
def test_turns(llama: PreTrainedModel, heads: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goes on from the one before; the cache grows."""
    monkeypatch.setattr(target_model, "_MIN_LASTING", 32)
    text, ids, capacities = texts(llama, heads), prompt(), []
    for turn in range(5):
        known = len(kept(llama)[0]) if turn else 0
        out = text(ids)
        assert out.stats.reused_tokens == max(0, known - (heads == "context")) <= ids.shape[1]
        (past,) = runtime_of(llama).pasts
        capacities.append(past.cache.capacity)
        check(llama, text, ids)
        ids = torch.cat([out.sequences, prompt(length=3 + turn)], 1)
    assert capacities[0] < capacities[-1] and capacities == sorted(capacities)
    assert len(set(capacities)) < len(capacities), "not at every turn"


def change_weights(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[5:50] *= -1


def change_dtype(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16)


def hook(model: PreTrainedModel) -> None:
    model.model.layers[0].register_forward_hook(lambda module, inputs, output: output * 1.5)


CHANGES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "weights": change_weights,
    "dtype": change_dtype,
    "hooks": hook,
    "another decode": forget,
    "warm_up": lambda model: Decoder(model).warm_up(),
    "close": lambda model: Decoder(model).close(),
    "fuse": lambda model: Decoder(model, fuse=False).decode(prompt(), max_new_tokens=NEW),
    "pack": lambda model: Decoder(model, pack=False).decode(prompt(), max_new_tokens=NEW),
    "heads": lambda model: Decoder(model, heads_for(model)).decode(prompt(), max_new_tokens=NEW),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_read_again(llama: PreTrainedModel, name: str) -> None:
    decoder = Decoder(llama)
    first = decoder.decode(prompt(), max_new_tokens=NEW).sequences
    CHANGES[name](llama)
    check(llama, lambda ids: decoder.decode(ids, max_new_tokens=NEW), first, reused=0)


def test_threads(llama: PreTrainedModel) -> None:
    decoder, threads = Decoder(llama), torch.get_num_threads()
    first = decoder.decode(prompt(), max_new_tokens=NEW).sequences
    try:
        torch.set_num_threads(threads + 1)
        check(llama, lambda ids: decoder.decode(ids, max_new_tokens=NEW), first, reused=0)
    finally:
        torch.set_num_threads(threads)


def test_heads_with_a_context_that_change(llama: PreTrainedModel) -> None:
    heads = heads_for(llama)
    decoder = Decoder(llama, heads, tree=TREE)
    first = decoder.decode(prompt(), max_new_tokens=NEW).sequences
    with torch.no_grad():
        heads.context.qkv *= 2
    check(llama, lambda ids: decoder.decode(ids, max_new_tokens=NEW), first, reused=0)


def test_only_a_decoder_keeps_something(llama: PreTrainedModel) -> None:
    decode(llama, None, prompt(), max_new_tokens=NEW)
    assert not runtime_of(llama).pasts
    with Decoder(llama) as decoder:
        decoder.decode(prompt(), max_new_tokens=NEW)
        assert runtime_of(llama).pasts
    assert not runtime_of(llama).pasts


def test_prompts_with_the_models_own_attention_are_read_whole(llama: PreTrainedModel) -> None:
    """Beyond the positions that the model was made for."""
    decoder = Decoder(llama)
    short, long = prompt(length=250), prompt(length=260)
    first = decoder.decode(short, max_new_tokens=NEW).sequences  # which ends beyond them
    assert decoder.decode(first, max_new_tokens=2).stats.reused_tokens == 0
    assert not runtime_of(llama).pasts
    assert decoder.decode(long, max_new_tokens=2).stats.reused_tokens == 0
    decoder.decode(short, max_new_tokens=NEW)
    check(llama, lambda ids: decoder.decode(ids, max_new_tokens=NEW), first[:, :255], reused=254)


def test_a_model_that_is_not_exact_reads_all(llama: PreTrainedModel) -> None:
    """Its keys and values may depend on how the text is cut."""
    runtime = runtime_of(llama)
    runtime.capability()
    assert runtime._capability is not None
    key, capability = runtime._capability
    runtime._capability = (key, replace(capability, inexact_because="of this test"))
    decoder = Decoder(llama, fuse=False)
    first = decoder.decode(prompt(), max_new_tokens=NEW)
    assert not first.stats.exact
    assert decoder.decode(first.sequences, max_new_tokens=NEW).stats.reused_tokens == 0


def test_a_sample_goes_on(llama: PreTrainedModel) -> None:
    decoder = Decoder(llama)
    options: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 1.0, "seed": 3}
    ids = torch.cat([decoder.decode(prompt(), **options).sequences, prompt(length=4)], 1)
    check(llama, lambda ids: decoder.decode(ids, **options), ids, reused=LENGTH + NEW - 1)


class Interrupted(Gate):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def decide(self, signals: Signals) -> int:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return signals.max_nodes


@pytest.mark.parametrize("heads", ["none", "context"])
def test_goes_on_behind_an_interrupt(llama: PreTrainedModel, heads: str) -> None:
    text = texts(llama, heads)
    bound = heads_for(llama) if heads == "context" else None
    with pytest.raises(KeyboardInterrupt):
        Decoder(llama, bound, tree=TREE if bound else 6, gate=Interrupted(4)).decode(prompt())
    known = len(kept(llama)[0])
    assert known > LENGTH
    if not bound:  # the drafter of other heads has another context
        ids = torch.tensor([[*kept(llama)[0], 7]])
        check(llama, text, ids, reused=known)


def test_goes_on_behind_a_stream_that_is_left(llama: PreTrainedModel) -> None:
    decoder = Decoder(llama)
    stream: Any = decoder.stream(prompt(), max_new_tokens=64)
    tokens = [token for _, chunk in zip(range(4), stream, strict=False) for token in chunk.tokens]
    stream.close()
    ids = torch.cat([prompt(), torch.tensor([tokens]), prompt(length=3)], 1)
    check(llama, lambda ids: decoder.decode(ids, max_new_tokens=NEW), ids, reused=LENGTH + len(tokens) - 1)


@contextmanager
def interrupt_at(line: int) -> Iterator[list[int]]:
    """Raises KeyboardInterrupt in front of this line of the package that is run, counted from here; -> the count.

    Not at a `with`: the interpreter stops there on the way out, too, before the lock is let go, where no signal comes.
    """
    package, seen = str(Path(cerberus_ext.__file__).parent), [0]

    def trace(frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(package):
            return None
        here = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        if event != "line" or here.startswith("with "):
            return trace
        seen[0] += 1
        if seen[0] == line:
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("fuse", [None, False])
def test_an_interrupt_at_any_line(fuse: bool | None) -> None:
    """Of a turn that reuses. Whatever it leaves, the next text is right."""
    model = tiny_model("llama")
    heads = heads_for(model)

    def text(ids: Tensor, new: int) -> DecodeOutput:
        return Decoder(model, heads, tree=6, gate=RandomGate(), fuse=fuse).decode(ids, max_new_tokens=new)

    first = text(prompt(), NEW).sequences
    ids = torch.cat([first, prompt(length=3)], 1)
    with interrupt_at(0) as seen:
        want = text(ids, 8)
    assert want.stats.reused_tokens > LENGTH and seen[0] > 1000
    longer = torch.cat([want.sequences, prompt(length=2)], 1)
    answer, reused = decode(model, None, longer, max_new_tokens=4).sequences, []
    for line in range(1, seen[0], seen[0] // 60):
        text(prompt(), NEW)
        with pytest.raises(KeyboardInterrupt), interrupt_at(line):
            text(ids, 8)
        out = text(longer, 4)
        reused.append(out.stats.reused_tokens)
        assert out.sequences.tolist() == answer.tolist(), line
    assert 0 in reused and max(reused) > first.shape[1]
