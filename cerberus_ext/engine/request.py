"""Texts that are to be generated: everything that was asked for, checked before anything is computed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from ..runtime.logit_rules import logit_rules
from ..runtime.runtime import runtime_of
from ..runtime.sampling import Chooser
from ..runtime.stats import DecodeStats
from . import checks
from .plan import Plan
from .prompts import Prompts, pad_token, read_prompts
from .text import MAX_NEW_TOKENS, SLOTS, GeneratedText


@dataclass
class Request:
    """One text. row: of the prompts. capacity: tokens, of its cache. limit: tokens for which the model has positions,
    at most as many as were asked for. error: why it ended before its first token, see `Batch.chunks`."""

    row: int
    text: GeneratedText
    chooser: Chooser
    stats: DecodeStats
    capacity: int
    limit: int
    asked: int
    error: Exception | None = None

    def warn_where_positions_ended(self, model: PreTrainedModel, stacklevel: int) -> None:
        if len(self.text.tokens) == self.limit < self.asked and not self.text.stopped:
            warnings.warn(
                f"decode: max_new_tokens is {self.asked}, but the text ends after {self.limit} tokens:"
                f" {type(model).__name__} has no more positions, or would have to read all of it again",
                stacklevel=stacklevel + 1,
            )


@dataclass
class Requests:
    """The texts of one decode. pad: what fills shorter ones up. slots: so many are decoded at once, at most."""

    plan: Plan
    prompts: Prompts
    texts: list[Request]
    pad: int
    slots: int


def make_requests(
    model: PreTrainedModel, plan: Plan, ids: Any, put_to: Any, *, attention_mask: Any = None,
    max_new_tokens: Any = MAX_NEW_TOKENS, temperature: Any = 0.0, top_k: Any = 0, top_p: Any = 1.0, min_p: Any = 0.0,
    seed: Any = 0, eos_token_id: Any = None, stopping_criteria: Any = None, generation_config: Any = None,
    logits_processor: Any = None, acceptance: Any = "exact", slots: Any = SLOTS,
) -> Requests:  # fmt: skip
    """The options of `decode`. put_to: a streamer, or None. Raises TypeError or ValueError, naming the argument."""
    prompts = read_prompts(ids, attention_mask, model)
    max_new_tokens = checks.check_integer("decode: max_new_tokens", max_new_tokens, 0)
    slots = min(checks.check_integer("decode: slots", slots, 1), len(prompts.rows))
    sampling = checks.check_sampling(temperature, top_k, top_p, min_p, seed, acceptance)
    checks.check_streamer(put_to)
    if put_to is not None and len(prompts.rows) > 1:
        raise ValueError(f"decode: streamer must be None with {len(prompts.rows)} prompts: use Decoder.stream")
    stopping = checks.stopping_criteria_list(stopping_criteria)
    checks.check_generation_config(generation_config)
    config = model.generation_config if generation_config is None else generation_config
    eos = checks.eos_token_ids(eos_token_id, config)
    own = checks.callables("logits_processor", logits_processor, "LogitsProcessorList")
    capability = runtime_of(model).capability()
    if capability.no_drafts_because:
        plan = plan.without_drafts()
    texts = []
    for row, prompt in enumerate(prompts.rows):
        drawn = replace(sampling, seed=seed_of_row(sampling.seed, row)) if sampling.temperature else sampling
        chooser = logit_rules(model, prompt, max_new_tokens, eos, drawn, generation_config, own)
        limit = checks.max_new_tokens(model, prompt, max_new_tokens)
        text = GeneratedText(prompt, limit, eos, stopping, put_to)
        capacity = prompt.shape[1] + limit + plan.policy.size
        texts.append(Request(row, text, chooser, capability.stats(), capacity, limit, max_new_tokens))
    return Requests(plan, prompts, texts, pad_token(config, eos_token_id), slots)


def seed_of_row(seed: int, row: int) -> int:
    """seed + row, as int64: prompts that are alike are answered differently."""
    return (seed + row + 2**63) % 2**64 - 2**63
