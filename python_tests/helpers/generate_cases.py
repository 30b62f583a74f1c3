"""Arguments of `model.generate`, and the two ways of calling it: as it is, and with cerberus_ext.generate."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from tiny_models import VOCAB
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
)

import cerberus_ext

NEW = 24
EOS = 26  # the tiny llama writes it soon


class Ban(LogitsProcessor):
    """Forbids the token two places back: depends on the prefix."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.scatter(1, input_ids[:, -2:-1], -torch.inf)


class EndsWith(StoppingCriteria):
    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        assert scores is None or len(scores) >= 1
        return input_ids[:, -1] == self.token


CASES: dict[str, dict[str, Any]] = {
    "max_new_tokens": {"max_new_tokens": NEW},
    "one token": {"max_new_tokens": 1},
    "max_length": {"max_length": 20, "max_new_tokens": None},
    "eos_token_id": {"eos_token_id": EOS},
    "several eos_token_id": {"eos_token_id": [EOS, 61, 97]},
    "eos_token_id that the model lacks": {"eos_token_id": [EOS, VOCAB + 3]},
    "attention_mask": {"attention_mask": torch.ones(1, 9, dtype=torch.int64)},
    "max_time": {"max_time": 1000.0},
    "max_time is over": {"max_time": -1.0},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 2},
    "bad_words_ids": {"bad_words_ids": [[61, 61], [97]]},
    "suppress_tokens": {"suppress_tokens": [61, 97]},
    "begin_suppress_tokens": {"begin_suppress_tokens": [97]},
    "sequence_bias": {"sequence_bias": {(61, 61): -9.0, (40,): 3.0}},
    "min_new_tokens": {"min_new_tokens": 22, "eos_token_id": EOS},
    "min_length": {"min_length": 31, "eos_token_id": EOS},
    "forced_eos_token_id": {"forced_eos_token_id": 7},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (3, 1.6), "eos_token_id": 7},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.5},
    "renormalize_logits": {"renormalize_logits": True, "repetition_penalty": 1.2},
    "generation_config": {"generation_config": GenerationConfig(max_new_tokens=11, repetition_penalty=1.4)},
    "logits_processor": {"logits_processor": [Ban()]},
    "logits_processor in the place of a field's": {
        "logits_processor": [RepetitionPenaltyLogitsProcessor(1.5), Ban()],
        "repetition_penalty": 1.1,
    },
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda _, ids: [int(ids[-1]) * 3 % VOCAB, 7, 61]},
    "stopping_criteria": {"stopping_criteria": [EndsWith(61)]},
    "MaxLengthCriteria": {"stopping_criteria": [MaxLengthCriteria(14)]},
    "MaxLengthCriteria within the prompt": {"stopping_criteria": [MaxLengthCriteria(5)]},
    "EosTokenCriteria": {"stopping_criteria": [EosTokenCriteria(EOS)], "eos_token_id": 61},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "use_cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "sampling options without do_sample": {"temperature": 0.3, "top_k": 3, "top_p": 0.5},
    "logits_to_keep": {"logits_to_keep": 1},
    "several": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "logits_processor": [Ban()],
        "stopping_criteria": [EndsWith(40)],
        "eos_token_id": [EOS, 7],
        "min_new_tokens": 12,
        "return_dict_in_generate": True,
    },
}  # fmt: skip


def run(model: PreTrainedModel, ids: Tensor, **options: Any) -> Any:
    """`generate`, greedily where nothing else is said. Warnings about what is set beside do_sample=False, and about
    processors that stand in the place of a field's, are transformers' own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(ids, **{"do_sample": False, "pad_token_id": 0, "max_new_tokens": NEW} | options)


def cerberus(model: PreTrainedModel, ids: Tensor, **options: Any) -> Any:
    return run(model, ids, custom_generate=cerberus_ext.generate, **options)
