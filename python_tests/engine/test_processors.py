"""Logits processors on a tree: each place is processed with its own prefix, once, in the order of the text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generate_cases import EOS, NEW, Ban, cerberus, run
from stand_ins import OracleHeads, RandomGate, RandomHeads
from tiny_models import VOCAB, prompt, tiny_model
from torch import Tensor
from transformers import LogitsProcessor, SynthIDTextWatermarkingConfig, WatermarkingConfig

from cerberus_ext import AlwaysClosed, StaticPolicy, decode


class Grammar(LogitsProcessor):
    """Keeps a state that every token moves on, as grammars do: three kinds of tokens, in turn, and EOS at the end."""

    def __init__(self) -> None:
        self.length, self.kind, self.tokens = 0, 0, list[int]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert EOS not in self.tokens, "it is over"
        assert self.length in (0, input_ids.shape[1] - 1), "called out of order, or twice"
        if self.length:
            self.tokens.append(int(input_ids[0, -1]))
            self.kind = (self.kind + self.tokens[-1] % 2 + 1) % 3
        self.length = input_ids.shape[1]
        allowed = torch.arange(VOCAB) % 3 == self.kind
        allowed[EOS] = len(self.tokens) > 7
        return scores.masked_fill(~allowed, -torch.inf)


class Counter(LogitsProcessor):
    """Depends on nothing but how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return scores.roll(self.calls % 5, -1)


class InPlace(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter_add_(1, input_ids, torch.full_like(scores, -3.0))


SYNTH_ID = SynthIDTextWatermarkingConfig(keys=[3, 1, 4, 1, 5], ngram_len=3, context_history_size=64)
CASES: dict[str, dict[str, Any]] = {
    "grammar": {"eos_token_id": EOS, "logits_processor": Grammar},
    "counter": {"logits_processor": Counter},
    "in place": {"logits_processor": InPlace},
    "prefix": {"logits_processor": Ban, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[61, 61], [97]], "sequence_bias": {(40,): 3.0}, "suppress_tokens": [100]},
    "shortest": {"min_new_tokens": 17, "eos_token_id": EOS, "forced_eos_token_id": 7},
    "decay": {"eos_token_id": EOS, "exponential_decay_length_penalty": (3, 1.6)},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="selfhash")},
    "SynthID": {"watermarking_config": SYNTH_ID},
    "guidance": {"guidance_scale": 1.7},
    "guidance against a prompt": {"guidance_scale": 1.7, "negative_prompt_ids": prompt().flip(1)},
}  # fmt: skip
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "min_p": 0.02, "top_p": 0.98}


def fresh(case: str) -> dict[str, Any]:
    """The case's options, with a processor that has seen nothing."""
    options = dict(CASES[case])
    if "logits_processor" in options:
        options["logits_processor"] = [options["logits_processor"]()]
    return options


@pytest.mark.parametrize("case", CASES)
def test_as_in_generate(case: str) -> None:
    model = tiny_model("llama")
    want = run(model, prompt(), **fresh(case))
    assert want.tolist() != run(model, prompt()).tolist(), "the case tests nothing"
    assert case != "grammar" or 17 <= want.shape[1] < 9 + NEW
    for tree in (9, StaticPolicy.from_widths([3, 2, 1])):
        heads = OracleHeads(torch.cat([want, prompt()], 1), 3, VOCAB)  # it goes on behind the end
        got = cerberus(model, prompt(), heads=heads, tree=tree, streamer=heads, **fresh(case))
        assert got.tolist() == want.tolist()


@pytest.mark.parametrize("sampled", [{}, {**SAMPLED, "seed": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("case", CASES)
def test_bits_do_not_depend_on_drafts(case: str, sampled: dict[str, Any]) -> None:
    """In bfloat16, whose ties drafts must not decide."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    want = cerberus(model, prompt(), gate=AlwaysClosed(), **sampled, **fresh(case))
    for kind in (OracleHeads, RandomHeads):
        for gate in (None, RandomGate()):
            heads = kind(want, 3, VOCAB)
            got = cerberus(model, prompt(), heads=heads, tree=12, gate=gate, streamer=heads, **sampled, **fresh(case))
            assert got.tolist() == want.tolist()


def test_equal_drafts_are_processed_once() -> None:
    """Two nodes with one text: a counter would tell them apart."""
    model = tiny_model("llama")
    want = run(model, prompt(), logits_processor=[Counter()])
    heads = OracleHeads(want, 2, VOCAB)
    heads.make = lambda drafts: heads.next_tokens()[:, None].expand(2, drafts)  # type: ignore[method-assign]
    tree = StaticPolicy.from_paths([(0,), (1,), (2,), (1, 0), (1, 1), (2, 0)])
    out = decode(
        model, heads, prompt(), max_new_tokens=NEW, tree=tree, logits_processor=[counter := Counter()], streamer=heads
    )
    assert out.sequences.equal(want) and out.stats.tokens_per_step > 2.5
    assert counter.calls == NEW


def test_what_they_cost_is_told() -> None:
    stats = decode(tiny_model("llama"), None, prompt(), max_new_tokens=NEW, logits_processor=[Ban()]).stats
    assert 0 < stats.processor_seconds < stats.seconds["prefill"] + stats.seconds["verify"]
    assert decode(tiny_model("llama"), None, prompt(), max_new_tokens=NEW).stats.processor_seconds == 0


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2, 5])
def test_one_that_fails(at: int, error: type[BaseException]) -> None:
    """Leaves the model as it was."""

    class Failing(Counter):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            super().__call__(input_ids, scores)
            if self.calls == at:
                raise error("in a processor")
            return scores

    model = tiny_model("llama")
    want = run(model, prompt())
    heads = OracleHeads(want, 3, VOCAB)
    with pytest.raises(error, match="in a processor"):
        cerberus(model, prompt(), heads=heads, streamer=heads, tree=9, logits_processor=[Failing()])
    assert cerberus(model, prompt()).equal(want) and run(model, prompt()).equal(want)
