"""What `generate` returns beside one text, with cerberus_ext.generate: scores, logits, several texts of a prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generate_cases import CASES, EOS, NEW, Ban, cerberus, run
from stand_ins import OracleHeads
from tiny_models import VOCAB, prompt, tiny_model
from torch import Tensor
from transformers import StoppingCriteria, SynthIDTextWatermarkingConfig, WatermarkingConfig
from transformers.generation import GenerateDecoderOnlyOutput

from cerberus_ext.drafting.gate import AlwaysClosed

ALL: dict[str, Any] = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
SAMPLED: dict[str, dict[str, Any]] = {
    "temperature, top_k, top_p": {"temperature": 0.7, "top_k": 9, "top_p": 0.9},
    "min_p": {"min_p": 0.1, "temperature": 1.4, "top_k": 0},
    "typical_p": {"typical_p": 0.6, "top_k": 0},
    "epsilon_cutoff": {"epsilon_cutoff": 0.01, "top_k": 0},
    "eta_cutoff": {"eta_cutoff": 0.02, "top_k": 0},
    "all": {"repetition_penalty": 1.3, "top_p": 0.9, "typical_p": 0.9, "min_p": 0.05, "logits_processor": [Ban()]},
    "renormalized": {"top_p": 0.9, "renormalize_logits": True},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=3.0, seeding_scheme="selfhash"), "top_k": 0},
}


def close(got: Any, want: Any) -> None:
    """Tuples of (1, V) for each token, up to the rounding of other kernels."""
    assert len(got) == len(want)
    torch.testing.assert_close(torch.cat(got), torch.cat(want), rtol=1e-4, atol=1e-4)


def same(got: Any, want: Any) -> bool:
    return len(got) == len(want) and all(a.equal(b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_scores_and_logits_are_those_of_generate(case: str) -> None:
    model, options = tiny_model("llama"), {**CASES[case], **ALL}
    if "generation_config" in options:
        options = {"max_new_tokens": None, **options}
    want = run(model, prompt(), **options)
    heads = OracleHeads(want.sequences, 3, VOCAB)
    got = cerberus(model, prompt(), heads=heads, tree=9, streamer=heads, **options)
    assert type(got) is GenerateDecoderOnlyOutput and got.sequences.equal(want.sequences)
    assert {name for name in want if name in ("sequences", "scores", "logits")} == set(got)
    close(got.scores, want.scores)
    close(got.logits, want.logits)
    assert not got.scores[0].is_inference()


def test_only_what_is_asked_for() -> None:
    model = tiny_model("llama")
    assert set(cerberus(model, prompt(), return_dict_in_generate=True)) == {"sequences"}
    for what in ("scores", "logits"):
        got = cerberus(model, prompt(), return_dict_in_generate=True, **{f"output_{what}": True})
        assert set(got) == {"sequences", what}
    assert isinstance(cerberus(model, prompt(), output_scores=True), Tensor), "as generate: it has no place for them"


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "seed": 4, "min_p": 0.02, "top_p": 0.9}])
def test_bits_of_scores_do_not_depend_on_drafts(sampled: dict[str, Any]) -> None:
    model, options = tiny_model("llama", dtype=torch.bfloat16), {"repetition_penalty": 1.2, **ALL, **sampled}
    want = cerberus(model, prompt(), gate=AlwaysClosed(), **options)
    heads = OracleHeads(want.sequences, 3, VOCAB)
    for more in ({"heads": heads, "streamer": heads, "tree": 9}, {"tree": 24}, {"fuse": False}):
        got = cerberus(model, prompt(), **options, **more)
        assert got.sequences.equal(want.sequences)
        assert same(got.scores, want.scores) and same(got.logits, want.logits)


@pytest.mark.parametrize("case", SAMPLED)
def test_sampled_scores_are_those_of_generate(case: str) -> None:
    """At places of the text that was drawn: what `generate` would draw from there."""
    model, options = tiny_model("llama"), {"do_sample": True, **SAMPLED[case]}
    plain = cerberus(model, prompt(), seed=3, gate=AlwaysClosed(), **options)
    heads = OracleHeads(plain, 3, VOCAB)
    got = cerberus(model, prompt(), heads=heads, streamer=heads, seed=3, tree=9, **options, **ALL)
    assert got.sequences.equal(plain), "that scores are returned changes nothing"
    for new in (0, 1, 2, 3, 9, NEW - 1):
        want = run(model, plain[:, : 9 + new], **{**options, **ALL, "max_new_tokens": 1})
        close(got.scores[new : new + 1], want.scores)
        close(got.logits[new : new + 1], want.logits)


def test_stopping_criteria_get_the_scores() -> None:
    """Of every token so far, also in the middle of what a step has accepted, as from `generate`."""

    class Sure(StoppingCriteria):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            self.seen.append(scores)
            return torch.tensor([len(scores) > 6 and bool(scores[-1].max() > scores[0].max())])

    model, theirs, ours = tiny_model("llama"), Sure(), Sure()
    want = run(model, prompt(), stopping_criteria=[theirs], **ALL)
    assert 5 < len(want.scores) < NEW, "the case tests nothing"
    text = run(model, prompt())
    heads = OracleHeads(text, 3, VOCAB)
    got = cerberus(model, prompt(), stopping_criteria=[ours], heads=heads, streamer=heads, tree=9, **ALL)
    assert got.sequences.equal(want.sequences) and len(ours.seen) == len(theirs.seen)
    for mine, their in zip(ours.seen, theirs.seen, strict=True):
        close(mine, their)
    close(got.scores, want.scores)


def test_several_texts() -> None:
    """Each that of its own seed; those that have ended are padded, and have no scores any more."""
    model, options = (
        tiny_model("llama"),
        {"do_sample": True, "eos_token_id": EOS, "pad_token_id": 5, "temperature": 1.2},
    )
    rows = [cerberus(model, prompt(), seed=7 + row, **options, **ALL) for row in range(4)]
    lengths = [row.sequences.shape[1] for row in rows]
    assert len(set(lengths)) > 1, "the case tests nothing"
    got = cerberus(model, prompt(), seed=7, num_return_sequences=4, **options, **ALL)
    assert got.sequences.shape == (4, max(lengths)) and len(got.scores) == len(got.logits) == max(lengths) - 9
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        assert got.sequences[number, :length].equal(row.sequences[0]) and (got.sequences[number, length:] == 5).all()
        for name in ("scores", "logits"):
            kept = [part[number] for part in got[name]]
            assert same(kept[: length - 9], [part[0] for part in row[name]])
            assert not any(part.any() for part in kept[length - 9 :])
    assert cerberus(model, prompt(), seed=7, num_return_sequences=4, **options).equal(got.sequences)
    torch.manual_seed(0)
    first = cerberus(model, prompt(), num_return_sequences=2, **options)
    torch.manual_seed(0)
    assert cerberus(model, prompt(), num_return_sequences=2, **options).equal(first)


def test_several_texts_of_several_prompts() -> None:
    """Row r of all has the seed `seed + r`, with what is kept of it or without."""
    model, prompts = tiny_model("llama"), torch.cat([prompt(), prompt().flip(1)])
    options = {"do_sample": True, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    got = cerberus(model, prompts, seed=7, num_return_sequences=2, **options)
    kept = cerberus(
        model, prompts, seed=7, num_return_sequences=2, return_dict_in_generate=True, output_scores=True, **options
    )
    alone = [cerberus(model, prompts[row // 2][None], seed=7 + row, **options) for row in range(4)]
    assert got.equal(torch.cat(alone)) and kept.sequences.equal(got)
    assert [tuple(part.shape) for part in kept.scores] == [(4, model.config.vocab_size)] * 6
    last = {"seed": 2**63 - 1, **options}
    assert cerberus(model, prompts, **last, return_dict_in_generate=True, output_scores=True).sequences.equal(
        cerberus(model, prompts, **last)
    )


def test_scores_of_several_prompts_without_a_seed() -> None:
    model, prompts = tiny_model("llama"), torch.cat([prompt(), prompt().flip(1)])
    options = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    got = cerberus(model, prompts, **options, **ALL)
    want = run(model, prompts, **options, **ALL)
    assert got.sequences.equal(want.sequences)
    close(got.scores, want.scores)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidance"),
        ({"watermarking_config": SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2])}, "SynthIDTextWatermark"),
    ],
)
def test_what_remembers_one_text_is_refused_for_several(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"generate: {name}.* ids must have one row"):
        cerberus(tiny_model("llama"), torch.cat([prompt(), prompt()]), max_new_tokens=4, pad_token_id=0, **changes)
