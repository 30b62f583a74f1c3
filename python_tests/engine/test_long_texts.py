"""Long texts: nothing is read or copied again, and memory comes as it is needed. bench/micro/long_texts.py is about
time."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from context_stand_ins import heads_for
from stand_ins import OracleHeads
from tiny_families import tiny_family
from tiny_models import VOCAB, generate, prompt
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cerberus_ext import AlwaysClosed, Decoder, decode
from cerberus_ext.runtime.fused import step
from cerberus_ext.runtime.runtime import runtime_of
from cerberus_ext.target.cache import TreeCache
from cerberus_ext.target.model import lasting_capacity

POSITIONS, SIZE, NEW = 1 << 17, 16, 48


def long_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    tokens = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"))
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=SIZE, max_position_embeddings=POSITIONS, initializer_range=0.3, **tokens,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def streamed(decoder: Decoder, ids: Tensor) -> list[int]:
    return [token for chunk in decoder.stream(ids, max_new_tokens=NEW) for token in chunk.tokens]


@pytest.mark.parametrize("context", [1 << 10, POSITIONS - 2 * NEW])
def test_a_text_goes_on_where_its_cache_ends(context: int) -> None:
    """What is in the cache is not read again, by a second text neither, and the cache stays where it is; drafts change
    nothing."""
    model = long_llama()
    ids = torch.randint(VOCAB, (1, context), generator=torch.Generator().manual_seed(1))
    with Decoder(model, None, gate=AlwaysClosed()) as decoder:
        decoder.decode(ids[:, :2], max_new_tokens=1)
        put_past(model, ids[0, :-1].tolist())
        want = streamed(decoder, ids)
        assert decoder.stats is not None and decoder.stats.reused_tokens == context - 1
        place = cache_of(model).data_ptr()
        assert streamed(Decoder(model, None), ids) == want
        assert cache_of(model).data_ptr() == place


def put_past(model: LlamaForCausalLM, tokens: list[int]) -> None:
    """As if the tokens had been read, which takes half a minute of this many. Keys and values are any."""
    past = runtime_of(model).pasts[-1]
    past.cut(0, lasting_capacity(model, len(tokens)))
    past.tokens = tokens
    cache_of(model).normal_()


def cache_of(model: LlamaForCausalLM) -> Tensor:
    tensor = runtime_of(model).pasts[-1].cache.tensor
    assert tensor is not None
    return tensor


def test_room_is_not_taken_before_it_is_needed() -> None:
    """2 GiB for a million tokens, of which 100 come."""

    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    before = resident()
    cache = TreeCache(2, 1 << 20, 1, torch.device("cpu"))
    keys = torch.randn(1, 4, 100, 32)
    for layer in range(2):
        cache.update(keys, keys, layer)
    assert cache.tensor is not None and cache.tensor.nbytes == 2 << 30
    assert resident() - before < 200 << 20


@pytest.mark.parametrize("fuse", [None, False])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_oss", "phi3"])
def test_what_lies_behind_the_text_is_not_read(family: str, fuse: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has written there: it may be anything."""
    allocate = TreeCache.allocate
    monkeypatch.setattr(TreeCache, "allocate", lambda *arguments: allocate(*arguments).fill_(torch.nan))
    model = tiny_family(family)
    want = generate(model, prompt(), max_new_tokens=20)
    heads = OracleHeads(want, 3, VOCAB)
    with Decoder(model, heads, fuse=fuse, tree=9) as decoder:
        for _ in range(2):  # the second one reuses the first one's
            assert decoder.decode(prompt(), max_new_tokens=20, streamer=heads).sequences.equal(want)


@pytest.mark.parametrize("context", [False, True])
def test_tables_grow_with_the_text(context: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of positions that a text does not reach there are none, however many it may have."""
    monkeypatch.setattr(step, "_AT_ONCE", 16)
    monkeypatch.setattr(step, "_MIN_POSITIONS", 16)
    model = deepcopy(tiny_family("llama"))  # that has no program yet
    heads = heads_for(model) if context else None
    want = decode(model, None, prompt(), max_new_tokens=70, fuse=False).sequences
    with Decoder(model, heads, tree=4) as decoder:
        seen = list[int]()
        for _ in decoder.stream(prompt(), max_new_tokens=70):
            found = runtime_of(model)._fused
            assert found is not None
            seen.append(found[1].program.positions)
        assert sorted(seen) == seen and {16, 32, 64, 128} >= set(seen) and seen[0] < seen[-1] == 128
    assert decode(model, heads, prompt(), max_new_tokens=70, tree=4).sequences.equal(want)


def test_a_text_that_no_memory_could_hold() -> None:
    for tokens in (10**13, 2**62, 10**30):
        with pytest.raises((MemoryError, ValueError), match="max_new_tokens"):
            decode(tiny_family("llama"), None, prompt(), max_new_tokens=tokens)


def test_criteria_see_the_text_and_no_more() -> None:
    """Tokens are added in place behind the text."""
    seen: list[list[int]] = []

    def keep(ids: Tensor, scores: None) -> Tensor:
        seen.append(ids[0].tolist())
        return torch.tensor([False])

    ids = prompt()
    out = decode(tiny_family("llama"), None, ids, max_new_tokens=30, stopping_criteria=[keep]).sequences[0].tolist()
    assert seen == [out[:end] for end in range(10, 40)] and ids.equal(prompt())
