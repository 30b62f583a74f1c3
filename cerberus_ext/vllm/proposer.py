"""Drafts for the requests of a vLLM engine, each from its own text. Nothing of vLLM is imported."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .pace import Pace
from .texts import Texts


class SuffixProposer:
    """vLLM makes it for `{"method": "custom_class", "model": "cerberus_ext.vllm.SuffixProposer"}`.

    Every request's text is indexed as it grows, and keeps its own record of matches that were right. A token is drafted
    where it is right, with all before it, so probably that it is worth its share of a step's time, which is learnt
    from the steps: up to num_speculative_tokens in small batches, few or none in large ones.

    vllm_config: vLLM's; num_speculative_tokens, max_model_len and the vocabulary are read. clock: in seconds.
    """

    def __init__(self, vllm_config: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self._most_drafts = int(vllm_config.speculative_config.num_speculative_tokens)
        self._max_tokens = int(vllm_config.model_config.max_model_len)
        self._vocabulary = int(vllm_config.model_config.get_vocab_size())
        self._clock = clock
        self._last_call = clock()
        self._texts = Texts()
        self._pace = Pace()

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: vLLM's runner for CPUs calls it for every proposer."""

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: NDArray[np.int32],
        token_ids_cpu: NDArray[np.int32],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """What follows the text of each row: a list for each, empty where nothing pays.

        sampled_token_ids: the tokens that the step has added to each row; none where it only read a part of the prompt.
        num_tokens_no_spec (rows,), token_ids_cpu (rows, max_model_len): the texts with these tokens. Both may have more
        rows. slot_mappings: not used.
        """
        now = self._clock()
        seconds, self._last_call = now - self._last_call, now
        sampled = list(enumerate(sampled_token_ids))
        rows = {row: token_ids_cpu[row, : num_tokens_no_spec[row]] for row, new in sampled if new}
        texts, steady = self._texts.follow(rows)
        # A step that also read a prompt says little about drafts, and so does the time since the call before last.
        if steady and seconds > 0 and all(new and texts[row].new == len(new) for row, new in sampled):
            verified = sum(text.drafted for text in texts.values())
            self._pace.observe(len(texts), verified, sum(len(new) for _, new in sampled), seconds)
        least = self._pace.least_probability(len(texts))
        drafts: list[list[int]] = [[] for _ in sampled]
        for row, text in texts.items():
            room = self._max_tokens - text.size - 1  # vLLM adds a token of its own
            drafts[row] = text.draft(max(0, min(self._most_drafts, room)), least, self._vocabulary)
        return drafts
