"""All of families, ways of choosing, batches, gates and proposers: each row is the row alone, without drafts."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from batches import NEW, alone, prompts, proposers_of, texts_of
from stand_ins import RandomGate
from tiny_families import tiny_family
from tiny_models import generate
from transformers import GenerationConfig

from cerberus_ext import AlwaysClosed, AlwaysOpen, decode

FAMILIES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "gpt_neox", "gpt2",
    "gpt_oss",
)  # fmt: skip
PENALTIES = GenerationConfig(repetition_penalty=1.4, no_repeat_ngram_size=3)
CHOOSERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.3, "seed": 7, "top_k": 40, "top_p": 0.95},
    "processed": {"temperature": 1.1, "seed": 3, "min_p": 0.05, "generation_config": PENALTIES},
}
BATCHES = {"1": ([9], 8), "3 ragged": ([4, 13, 1], 8), "8 in 3 slots": ([5, 2, 11, 7, 1, 9, 3, 6], 3)}
GATES = {"open": AlwaysOpen, "closed": AlwaysClosed, "random": RandomGate}
PROPOSERS = ("none", "random", "oracle")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_is_the_row_alone(family: str, dtype: torch.dtype) -> None:
    model = tiny_family(family, dtype)
    for (chooser, options), (batch, (lengths, slots)) in product(CHOOSERS.items(), BATCHES.items()):
        rows = prompts(lengths)
        texts = alone(model, rows, **options)
        want = [text[0].tolist() for text in texts]
        if chooser == "greedy" and dtype is torch.float32:
            assert want == [generate(model, row, max_new_tokens=NEW)[0].tolist() for row in rows], batch
        for gate, proposers in product(GATES, PROPOSERS):
            out = decode(
                model, None, rows, max_new_tokens=NEW, slots=slots, gate=GATES[gate](), tree=8,
                proposers=proposers_of(proposers, texts), **options,
            )  # fmt: skip
            case = chooser, batch, gate, proposers
            assert [text[0].tolist() for text in texts_of(out.sequences, rows)] == want, case
            drafted = gate != "closed" and proposers != "none"
            assert out.stats.exact and (out.stats.open_steps > 0) == drafted, case
            assert out.stats.tokens_per_step > 1.2 or proposers != "oracle" or not drafted, case
