"""Several prompts at once: each row gets the text that it gets alone without drafts, whatever is around it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import NEW, KnowingBatch, alone, equal, plain_heads, prompts, proposers_of, texts_of
from context_stand_ins import heads_for
from proposer_stand_ins import right
from stand_ins import RandomGate
from tiny_families import tiny_family
from tiny_models import VOCAB
from torch import Tensor
from transformers import GenerationConfig

from cerberus_ext import decode
from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.gate import AlwaysClosed, AlwaysOpen, ConfidenceGate
from cerberus_ext.drafting.static_policy import StaticPolicy

CHOOSERS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.3, "seed": 7, "top_k": 40},
    "penalty": {"generation_config": GenerationConfig(repetition_penalty=1.4, no_repeat_ngram_size=3)},
}
LENGTHS = {"1": ([9], 8), "3 ragged": ([4, 13, 1], 8), "8 in 3 slots": ([5, 2, 11, 7, 1, 9, 3, 6], 3)}
GATES = {
    "open": AlwaysOpen,
    "closed": AlwaysClosed,
    "random": RandomGate,
    "confidence": lambda: ConfidenceGate({1: 1.0, 8: 1.1, 64: 1.3}),
}


@pytest.mark.pairwise
@pytest.mark.parametrize("proposers", ["none", "random", "oracle", "suffix"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("batch", LENGTHS)
@pytest.mark.parametrize("chooser", CHOOSERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "mixtral", "gpt_oss"])
def test_each_row_is_the_row_alone(
    family: str, dtype: torch.dtype, chooser: str, batch: str, gate: str, proposers: str
) -> None:
    model, (lengths, slots) = tiny_family(family, dtype), LENGTHS[batch]
    rows, options = prompts(lengths), CHOOSERS[chooser]
    want = alone(model, rows, **options)
    out = decode(
        model, None, rows, max_new_tokens=NEW, slots=slots, gate=GATES[gate](), proposers=proposers_of(proposers, want),
        tree=8, **options,
    )  # fmt: skip
    equal(texts_of(out.sequences, rows), want)
    assert out.stats.exact and out.stats.new_tokens == NEW * len(rows)
    if proposers == "oracle" and gate == "open":
        assert out.stats.tokens_per_step > 1.5


@pytest.mark.pairwise
@pytest.mark.parametrize("fuse", [None, False])
@pytest.mark.parametrize("tree", [StaticPolicy.from_widths([2, 2]), 6])
@pytest.mark.parametrize("kind", ["plain", "context"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_draft_for_all_rows(dtype: torch.dtype, kind: str, tree: Any, fuse: bool | None) -> None:
    """The drafts of a row are those that it gets alone, too, and so are its steps where no budget is shared."""
    model = tiny_family("llama", dtype)
    torch.manual_seed(4)
    heads = heads_for(model, dtype) if kind == "context" else plain_heads(model, dtype)
    rows = prompts([4, 13, 1, 6])
    options: dict[str, Any] = {"max_new_tokens": NEW, "tree": tree, "fuse": fuse, "proposers": []}
    one_by_one = [decode(model, heads, row, **options) for row in rows]
    out = decode(model, heads, rows, slots=3, **options)
    equal(texts_of(out.sequences, rows), [one.sequences for one in one_by_one])
    equal(texts_of(out.sequences, rows), alone(model, rows))
    if isinstance(tree, StaticPolicy):
        assert [row.trace for row in out.stats.rows] == [one.stats.trace for one in one_by_one]
        assert all(nodes > 1 for row in out.stats.rows for nodes, _ in row.trace[:-2])


def test_heads_that_are_calibrated_and_not_asked() -> None:
    """A node costs as much as the first one: with several rows no draft of the heads pays."""
    model, rows = tiny_family("llama"), prompts([4, 13, 9])
    heads = plain_heads(model, torch.float32)
    tree = DynamicPolicy(6, platt=[[1.1, -0.2]] * heads.config.num_heads)
    gate = ConfidenceGate({nodes: float(nodes) for nodes in range(1, 7)})
    out = decode(model, heads, rows, max_new_tokens=NEW, tree=tree, gate=gate)
    equal(texts_of(out.sequences, rows), alone(model, rows))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", [torch.int64, torch.bool, torch.float32])
def test_padding_at_either_side(side: str, form: torch.dtype) -> None:
    """Whatever token stands there, one that the model does not have, too."""
    model, rows = tiny_family("llama"), prompts([4, 13, 9])
    ids, mask = torch.full((3, 13), VOCAB + 5), torch.zeros(3, 13)
    for number, row in enumerate(rows):
        length = row.shape[1]
        place = slice(13 - length, 13) if side == "left" else slice(0, length)
        ids[number, place], mask[number, place] = row[0], 1
    out = decode(model, None, ids, attention_mask=mask.to(form), max_new_tokens=NEW)
    assert out.sequences[:, :13].equal(ids), "as it was given, like `generate`"
    for number, text in enumerate(alone(model, rows)):
        assert out.sequences[number, 13:].tolist() == text[0, -NEW:].tolist()
    assert decode(model, None, {"input_ids": ids, "attention_mask": mask.to(form)}, max_new_tokens=NEW).sequences.equal(
        out.sequences
    )


def test_equals_generate_with_padding() -> None:
    model, rows = tiny_family("llama"), prompts([4, 13, 9])
    ids = torch.cat([torch.cat([row.new_zeros(1, 13 - row.shape[1]), row], 1) for row in rows])
    mask = torch.tensor([[int(place >= 13 - row.shape[1]) for place in range(13)] for row in rows])
    eos = int(alone(model, rows)[1][0, 13 + 5])
    options: dict[str, Any] = {"max_new_tokens": NEW, "eos_token_id": eos}
    want = model.generate(ids, attention_mask=mask, do_sample=False, pad_token_id=3, **options)
    config = GenerationConfig(pad_token_id=3)
    assert decode(model, None, ids, attention_mask=mask, generation_config=config, **options).sequences.equal(want)


def test_rows_end_at_different_steps_and_make_room() -> None:
    """By an end-of-text token, at every place of an accepted block; what is behind it is padded."""
    model, rows = tiny_family("llama"), prompts([5, 2, 11, 7, 1, 9, 3, 6])
    whole = alone(model, rows)
    for place in range(NEW):
        eos = int(whole[2][0, 11 + place])
        want = []
        for row, text in zip(rows, whole, strict=True):
            new = text[0, row.shape[1] :].tolist()
            new = new[: new.index(eos) + 1] if eos in new else new
            want.append(new)
        out = decode(
            model, None, rows, max_new_tokens=NEW, slots=3, eos_token_id=[eos], tree=6,
            proposers=[KnowingBatch(whole, right())],
        )  # fmt: skip
        most = max(map(len, want))
        assert out.sequences[:, 11:].tolist() == [new + [eos] * (most - len(new)) for new in want]
        assert [row.new_tokens for row in out.stats.rows] == list(map(len, want))


def test_a_criterion_sees_one_text_at_a_time() -> None:
    model, rows = tiny_family("llama"), prompts([5, 2, 11])

    def long(ids: Tensor, scores: Any) -> Tensor:
        assert ids.shape[0] == 1
        return torch.tensor([ids.shape[1] == 12])

    out = decode(model, None, rows, max_new_tokens=NEW, stopping_criteria=[long])
    assert [row.new_tokens for row in out.stats.rows] == [7, 10, 1]


def test_no_token_is_asked_for() -> None:
    rows = prompts([5, 2])
    out = decode(tiny_family("llama"), None, rows, max_new_tokens=0)
    assert [text[0].tolist() for text in texts_of(out.sequences, rows)] == [row[0].tolist() for row in rows]
    assert out.stats.steps == 0


def test_each_rows_length_is_checked_before_anything_is_computed() -> None:
    model = tiny_family("gpt2")
    rows = prompts([5, 129])
    with pytest.raises(ValueError, match="decode: ids must have at most 128 tokens, .* got 129"):
        decode(model, None, rows)
    rows = prompts([5, 120])
    with pytest.warns(UserWarning, match="max_new_tokens is 14, but the text ends after 9 tokens"):
        out = decode(model, None, rows, max_new_tokens=NEW)
    assert [row.new_tokens for row in out.stats.rows] == [14, 9]


def test_graphs_are_for_one_text_at_a_time() -> None:
    with pytest.raises(ValueError, match="graphs must be None or False here, got True: several texts are decoded at"):
        decode(tiny_family("llama"), None, prompts([3, 4]), graphs=True)
