"""README's table of families: with whatever drafts, the text is the one without drafts; or there is one sentence.

By default a share of the combinations, in which every family meets all heads, gates and trees, and every two of these
meet each other. CERBERUS_FULL_MATRIX=1 runs all of them, in about two minutes.
"""

from __future__ import annotations

import math
import os
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from stand_ins import OracleHeads, RandomGate, RandomHeads
from tiny_families import EXACT, REFUSED, tiny_family
from tiny_models import VOCAB, generate, prompt
from torch import Tensor
from transformers import DynamicCache

from cerberus_ext import SuffixProposer
from cerberus_ext.drafting.gate import AlwaysClosed, AlwaysOpen
from cerberus_ext.engine.decode import decode
from cerberus_ext.target.attention import names_attention

NEW = 24
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class NaNHeads(OracleHeads):
    def draft(self, hidden: Tensor, root: Tensor, drafts: int) -> tuple[Tensor, Tensor]:
        ids, logprobs = super().draft(hidden, root, drafts)
        return ids, logprobs.fill_(math.nan)


HEADS: dict[str, Any] = {"random": RandomHeads, "oracle": OracleHeads, "nan": NaNHeads, "suffix": None}
GATES = {"open": AlwaysOpen, "closed": AlwaysClosed, "random": RandomGate}
TREES = (8, 32)


def cases() -> list[tuple[str, str, str, str, int]]:
    """(family, dtype, heads, gate, nodes)"""
    if os.environ.get("CERBERUS_FULL_MATRIX", "0") not in ("", "0"):
        return list(product(EXACT, DTYPES, HEADS, GATES, TREES))
    share = []
    for index, (family, dtype) in enumerate(product(EXACT, DTYPES)):
        turn = index // 2 + index % 2
        share.append((family, dtype, "oracle", "open", TREES[turn % 2]))
        for place, heads in enumerate(HEADS, start=turn):
            share.append((family, dtype, heads, list(GATES)[place % 3], TREES[place // 3 % 2]))
    return list(dict.fromkeys(share))


def skip_where_it_is_older(family: str) -> None:
    """With the oldest transformers that setup.py admits, some families are not yet what they are now."""
    model = tiny_family(family)
    if family == "gptj" and not names_attention(model):
        pytest.skip("this transformers' gptj computes its attention itself")
    if not DynamicCache(config=model.config).layers:
        pytest.skip(f"this transformers has no cache for {family}")


@cache
def without_drafts(family: str, dtype: str) -> Tensor:
    """(1, 9 + NEW)"""
    model = tiny_family(family, DTYPES[dtype])
    out = decode(model, None, prompt(), max_new_tokens=NEW, gate=AlwaysClosed())
    assert out.stats.exact is True and out.stats.inexact_because is None and out.stats.no_drafts_because is None
    assert out.stats.steps == NEW - 1
    return out.sequences


@pytest.mark.parametrize("family", EXACT)
def test_without_drafts_it_is_what_generate_writes(family: str) -> None:
    skip_where_it_is_older(family)
    want = generate(tiny_family(family), prompt(), max_new_tokens=NEW)
    assert without_drafts(family, "float32").equal(want)


@pytest.mark.parametrize(("family", "dtype", "heads", "gate", "nodes"), cases())
def test_drafts_change_nothing(family: str, dtype: str, heads: str, gate: str, nodes: int) -> None:
    skip_where_it_is_older(family)
    text = without_drafts(family, dtype)
    drafter = None if heads == "suffix" else HEADS[heads](text, 4, VOCAB)
    out = decode(
        tiny_family(family, DTYPES[dtype]), drafter, prompt(), max_new_tokens=NEW, tree=nodes, gate=GATES[gate](),
        proposers=[SuffixProposer()] if heads == "suffix" else [], streamer=drafter,
    )  # fmt: skip
    assert out.sequences.equal(text)
    assert out.stats.exact is True
    if heads == "nan" or gate == "closed":
        assert out.stats.steps == NEW - 1 and out.stats.open_steps == 0
    elif heads == "oracle":
        assert out.stats.tokens_per_step > (1.5 if gate == "open" else 1.2)
    elif heads == "random":
        assert out.stats.open_steps > 5


SENTENCES = {
    "bloom": "have an attention that is known here, BloomForCausalLM has not: it calls neither .*",
    "mpt": "have an attention that is known here, MptForCausalLM has not: it calls neither .*",
    "falcon-alibi": "have an attention that is known here, FalconForCausalLM has not: it uses ALiBi, .*",
    "gpt_neo": "have an attention that is known here, GPTNeoForCausalLM has not: it calls neither .*",
    "deepseek_v2": "have keys and values of one shape in all layers, DeepseekV2ForCausalLM has not: values of .*",
    "deepseek_v3": "have keys and values of one shape in all layers, DeepseekV3ForCausalLM has not: values of .*",
    "rwkv": "have an attention that is known here, RwkvForCausalLM has not: it calls neither .*",
    "mamba": "have a key/value cache in every layer, .*, layer 0 of mamba has a LinearAttentionLayer",
    "jamba": "have a key/value cache in every layer, .*, layer 0 of jamba has a LinearAttentionLayer",
    "lfm2": "have a key/value cache in every layer, .*, layer 0 of lfm2 has a LinearAttentionLayer",
    "qwen3_next": "have a key/value cache in every layer, .*, layer 0 of qwen3_next has a LinearAttentionLayer",
    "llama4_text": "have full or sliding attention, llama4_text has chunked attention",
    "t5": "be decoder-only, T5ForConditionalGeneration is an encoder-decoder",
    "bert": "have an attention that is known here, BertLMHeadModel has not: BertSelfAttention is not causal",
}


class Silent:
    """A streamer that is to get nothing."""

    def put(self, tokens: Tensor) -> None:
        pytest.fail(f"the streamer got {tokens.tolist()}")

    def end(self) -> None:
        pass


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", REFUSED)
def test_refused_in_one_sentence(family: str, dtype: str) -> None:
    model = tiny_family(family, DTYPES[dtype])
    with pytest.raises(ValueError, match=f"^decode: model must {SENTENCES[family]}$") as refused:
        decode(model, None, prompt(), max_new_tokens=NEW, streamer=Silent())
    assert "\n" not in str(refused.value)
