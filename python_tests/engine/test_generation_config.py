"""`decode` does what model.generation_config says about the text, as `generate(do_sample=False)`, or refuses it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from stand_ins import OracleHeads, RandomHeads
from tiny_models import VOCAB, generate, generated, prompt, tiny_model
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, RepetitionPenaltyLogitsProcessor

from cerberus_ext import ops
from cerberus_ext.drafting.gate import AlwaysClosed
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.engine.decode import decode
from cerberus_ext.runtime.logit_rules import REFUSED, RULES, logit_rules
from cerberus_ext.runtime.sampling import Sampling

NEW = 24
EOS = 26  # the tiny llama writes it soon
TREE = StaticPolicy.from_widths([2, 2, 1])
# Fields of GenerationConfig that say nothing about the text of `generate(do_sample=False, max_new_tokens=...)`, for
# models without an encoder and one beam. A field of a new transformers version belongs here, to RULES or to REFUSED.
HARMLESS = {
    # how long a text may be, and where it ends: decode's own arguments
    *("max_length", "max_new_tokens", "eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id"),
    # only where tokens are drawn, as decode's own arguments say
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
    # only of beams, or of contrastive search
    *("early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups", "low_memory"),
    # how the cache and the forwards are arranged
    *("use_cache", "cache_config", "max_cache_len", "prefill_chunk_size", "compile_config", "disable_compile"),
    "continuous_batching_config",
    # what is returned beside the text
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    # who drafts in assisted generation, and how much: drafts never change a greedy text
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "use_mtp"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
    *("target_lookbehind", "speculation_type"),
    "transformers_version",
}
# (fields, length of the prompt)
APPLIED: dict[str, tuple[dict[str, Any], int]] = {
    "repetition_penalty": ({"repetition_penalty": 1.3}, 18),
    "repetition_penalty below 1": ({"repetition_penalty": 0.8}, 9),
    "encoder_repetition_penalty": ({"encoder_repetition_penalty": 1.5}, 18),
    "no_repeat_ngram_size": ({"no_repeat_ngram_size": 2}, 18),
    "encoder_no_repeat_ngram_size": ({"encoder_no_repeat_ngram_size": 2}, 18),
    "bad_words_ids": ({"bad_words_ids": [[61, 61], [40], [EOS]], "eos_token_id": EOS}, 18),
    "min_length": ({"min_length": 30, "eos_token_id": EOS}, 18),
    "min_new_tokens": ({"min_new_tokens": 12, "eos_token_id": [EOS, VOCAB + 3]}, 18),
    "both minima": ({"min_length": 40, "min_new_tokens": 12, "eos_token_id": EOS}, 18),
    "forced_bos_token_id": ({"forced_bos_token_id": 7}, 1),
    "forced_eos_token_id": ({"forced_eos_token_id": 7}, 9),
    "forced_eos_token_id, several": ({"forced_eos_token_id": [9, 7]}, 9),
    "exponential_decay_length_penalty": ({"exponential_decay_length_penalty": (3, 1.6), "eos_token_id": 7}, 9),
    "suppress_tokens": ({"suppress_tokens": [61, 97]}, 9),
    "begin_suppress_tokens": ({"begin_suppress_tokens": [97]}, 9),
    "begin_suppress_tokens behind a forced one": ({"begin_suppress_tokens": [7, 22], "forced_bos_token_id": 7}, 1),
    "sequence_bias": ({"sequence_bias": [[[61, 61], -9.0], [[40], 3.0]]}, 18),
    "several": (
        {
            "repetition_penalty": 1.2,
            "no_repeat_ngram_size": 3,
            "bad_words_ids": [[61]],
            "min_new_tokens": 15,
            "eos_token_id": [EOS, 40],
            "forced_eos_token_id": 7,
            "sequence_bias": {(26, 26): -4.0},
            "renormalize_logits": True,
        },
        18,
    ),
}


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama")


def use(monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel, **fields: Any) -> None:
    monkeypatch.setattr(model, "generation_config", GenerationConfig(**fields))


def beginning(length: int) -> Tensor:
    """Of what the model writes by itself, so that there is something to repeat."""
    return generated("llama", "cpu", NEW)[:, :length]


def decode_all(model: PreTrainedModel, ids: Tensor, want: Tensor, new: int = NEW) -> None:
    """With heads of every kind, trees of both kinds, and without drafts: the text is always `want`."""
    accepted = 0
    for heads in (RandomHeads, OracleHeads):
        for tree in (9, TREE):
            stand_in = heads(want, 3, VOCAB)
            out = decode(model, stand_in, ids, max_new_tokens=new, tree=tree, streamer=stand_in)
            assert out.sequences.tolist() == want.tolist()
            if heads is OracleHeads:
                assert out.stats.tokens_per_step > 2 or out.stats.steps < 3
                accepted += out.stats.step_tokens - out.stats.steps
    assert accepted > 3
    for options in ({"tree": 8}, {"gate": AlwaysClosed()}):
        assert decode(model, None, ids, max_new_tokens=new, **options).sequences.tolist() == want.tolist()


@pytest.mark.parametrize("case", APPLIED)
def test_applied(case: str, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    fields, length = APPLIED[case]
    ids = beginning(length)
    use(monkeypatch, llama, eos_token_id=fields.get("eos_token_id"))
    plain = generate(llama, ids, max_new_tokens=NEW)
    use(monkeypatch, llama, **fields)
    want = generate(llama, ids, max_new_tokens=NEW)
    assert want.tolist() != plain.tolist(), "the case tests nothing"
    decode_all(llama, ids, want)


def test_remove_invalid_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A logit that is no number becomes 0; the only other one that may be chosen is sometimes negative."""
    model = copy.deepcopy(tiny_model("llama"))
    with torch.no_grad():
        model.lm_head.weight[50] = math.nan
    ids = beginning(9)
    plain = decode(model, None, ids, max_new_tokens=NEW).sequences
    assert 50 not in plain[0, 9:]
    use(monkeypatch, model, remove_invalid_values=True, suppress_tokens=[t for t in range(VOCAB) if t not in (50, 3)])
    want = generate(model, ids, max_new_tokens=NEW)
    assert {50, 3} == set(want[0, 9:].tolist())
    decode_all(model, ids, want)


def test_renormalize_logits(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, llama, renormalize_logits=True)
    decode_all(llama, beginning(9), generate(llama, beginning(9), max_new_tokens=NEW))


@pytest.mark.parametrize("name", ["gpt2", "qwen2-window", "gemma2"])
def test_other_models(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name)
    use(monkeypatch, model, repetition_penalty=1.4, no_repeat_ngram_size=2)
    want = generate(model, prompt(), max_new_tokens=NEW)
    assert want.tolist() != generated(name, "cpu", NEW).tolist()
    decode_all(model, prompt(), want)


@pytest.mark.parametrize("tree", [8, TREE])
def test_bits_do_not_depend_on_drafts(tree: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama", dtype=torch.bfloat16), prompt()
    use(monkeypatch, model, repetition_penalty=1.2, renormalize_logits=True)
    want = decode(model, None, ids, max_new_tokens=48, gate=AlwaysClosed()).sequences
    for heads in (RandomHeads, OracleHeads):
        stand_in = heads(want, 3, VOCAB)
        out = decode(model, stand_in, ids, max_new_tokens=48, tree=tree, streamer=stand_in)
        assert out.sequences.tolist() == want.tolist()


@pytest.mark.parametrize("tree", [16, TREE, StaticPolicy.from_widths([8, 4])])
def test_as_many_logits_are_processed_as_tokens_gained(
    tree: Any, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of nodes, and with the text as the context, as in `generate`."""
    contexts: list[list[int]] = []
    real = RepetitionPenaltyLogitsProcessor.__call__

    def count(self: Any, ids: Tensor, scores: Tensor) -> Tensor:
        contexts.append(ids[0].tolist())
        return real(self, ids, scores)

    use(monkeypatch, llama, repetition_penalty=1.3)
    want = generate(llama, prompt(), max_new_tokens=NEW)
    monkeypatch.setattr(RepetitionPenaltyLogitsProcessor, "__call__", count)
    heads = OracleHeads(want, 3, VOCAB)
    stats = decode(llama, heads, prompt(), max_new_tokens=NEW, tree=tree, proposers=None, streamer=heads).stats
    assert stats.step_tokens == NEW - 1 and stats.nodes_per_step > 5
    # Once more before anything: whether the processor fits the model.
    assert contexts == [want[0, :9].tolist(), *(want[0, :length].tolist() for length in range(9, 9 + NEW))]


def test_equal_drafts_after_one_node(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are accepted, but only the second one is followed by what is right."""
    use(monkeypatch, llama, repetition_penalty=1.3)
    want = generate(llama, prompt(), max_new_tokens=NEW)
    heads = OracleHeads(want, 2, VOCAB)
    heads.make = lambda drafts: torch.stack(
        [heads.next_tokens()[0].expand(drafts), (heads.next_tokens()[1] + torch.arange(drafts)) % VOCAB]
    )
    tree = StaticPolicy.from_paths([(0,), (1,), (1, 0)])
    out = decode(llama, heads, prompt(), max_new_tokens=NEW, tree=tree, streamer=heads)
    assert out.sequences.equal(want) and out.stats.accepted_histogram[2] == 7


@pytest.mark.parametrize("given", [EOS, [EOS, 40]])
def test_eos_that_decode_is_given(given: Any, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the one that min_new_tokens forbids, whatever the configuration has."""
    use(monkeypatch, llama, min_new_tokens=10, eos_token_id=61)
    ids = beginning(18)
    want = generate(llama, ids, max_new_tokens=NEW, eos_token_id=given)
    assert decode(llama, None, ids, max_new_tokens=NEW, eos_token_id=given).sequences.tolist() == want.tolist()
    assert want.shape[1] - 18 >= 10 and 61 in want[0, 18:]


def test_draws_from_processed_logits(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token, with whole forwards of the model."""
    use(monkeypatch, llama, repetition_penalty=1.5, suppress_tokens=[61])
    ids = text = beginning(12)
    for position in range(12, 24):
        with torch.inference_mode():
            logits = llama(text).logits[:, -1]
            seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, text, True)
            logits = torch.where(seen, torch.where(logits < 0, logits * 1.5, logits / 1.5), logits)
            logits[:, 61] = -math.inf
            token = ops.choose_tokens(logits.contiguous(), torch.tensor([position]), 5, 1.2, 0, 0.95)
        text = torch.cat([text, token[:, None]], 1)
    heads = OracleHeads(text, 3, VOCAB)
    for tree in (9, TREE):
        out = decode(
            llama, heads, ids, max_new_tokens=12, tree=tree, streamer=heads, temperature=1.2, top_p=0.95, seed=5
        )
        assert out.sequences.tolist() == text.tolist() and out.stats.tokens_per_step > 2


def test_steps_are_not_recorded(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, llama, repetition_penalty=1.3, suppress_tokens=[1])
    reason = r"processed on the host \(repetition_penalty, suppress_tokens\)"
    stats = decode(llama, None, prompt(), max_new_tokens=2).stats
    assert stats.fallback is not None
    with pytest.raises(ValueError, match="decode: graphs must be None or False here, got True: .*" + reason):
        decode(llama, None, prompt(), max_new_tokens=2, graphs=True)


WRONG = [
    ({"num_beams": 4}, "num_beams = 4: there are no beams"),
    ({"num_beams": 2, "num_return_sequences": 2}, "num_beams = 2"),
    ({"penalty_alpha": 0.6}, "penalty_alpha = 0.6"),
    ({"dola_layers": "low"}, "dola_layers = 'low'"),
    ({"constraints": [1]}, r"constraints = \[1\]"),
    ({"force_words_ids": [[1]]}, r"force_words_ids = \[\[1\]\]"),
    ({"guidance_scale": 1.5}, "guidance_scale = 1.5"),
    ({"watermarking_config": {"bias": 2.0}}, "watermarking_config = .*watermarks are not supported"),
    ({"token_healing": True}, "token_healing = True"),
    ({"is_assistant": True}, "is_assistant = True"),
    ({"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight = 0.5"),
    ({"cache_implementation": "quantized"}, "cache_implementation = 'quantized'"),
    ({"max_time": 3.0}, r"max_time = 3.0: give stopping_criteria=\[MaxTimeCriteria"),
    ({"stop_strings": ["."]}, r"stop_strings = \['.'\]: give stopping_criteria=\[StopStringCriteria"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[str(list(fields)) for fields, _ in WRONG])
def test_refused(fields: dict[str, Any], message: str, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = RandomHeads(prompt(), 3, VOCAB)
    use(monkeypatch, llama, **fields)
    with pytest.raises(ValueError, match="^decode: model.generation_config must not have " + message):
        decode(llama, heads, prompt(), max_new_tokens=2, streamer=heads)
    assert heads.seen == 0, "the streamer has had nothing"


def test_num_return_sequences(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, llama)
    llama.generation_config.num_return_sequences = 3  # transformers does not let it be made so without beams
    with pytest.raises(ValueError, match="must not have num_return_sequences = 3: one text is returned"):
        decode(llama, None, prompt(), max_new_tokens=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"repetition_penalty": -1.0}, "repetition_penalty that fits, got -1.0"),
        ({"repetition_penalty": "high"}, "repetition_penalty that fits, got 'high'"),
        ({"sequence_bias": [[[VOCAB], 1.0]]}, "sequence_bias that fits, .* vocabulary size is 101"),
        ({"bad_words_ids": []}, r"bad_words_ids that fits, got \[\]"),
        ({"exponential_decay_length_penalty": (1, 1.5)}, r"exponential_decay_length_penalty that fits, got \(1, 1.5\)"),
        ({"forced_bos_token_id": VOCAB}, "forced_bos_token_id that fits, got 101"),
    ],
)
def test_values_that_do_not_fit(
    fields: dict[str, Any], message: str, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, llama, **fields)
    with pytest.raises(ValueError, match="^decode: model.generation_config must have a " + message):
        decode(llama, None, prompt()[:, :1], max_new_tokens=2)


def test_every_field_is_known() -> None:
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    applied = {field for field, *_ in RULES}
    unknown = fields - applied - set(REFUSED) - HARMLESS
    assert not unknown, "new in transformers: does it change the text of generate(do_sample=False)?"
    assert not (applied & set(REFUSED) or applied & HARMLESS or set(REFUSED) & HARMLESS)
    assert set(REFUSED) == {name for wrong, _ in WRONG for name in wrong}
    tested = {name for case, _ in APPLIED.values() for name in case} | {"remove_invalid_values"}
    assert applied <= tested


@pytest.mark.parametrize("config", [GenerationConfig(), GenerationConfig(repetition_penalty=1.0, min_length=3), None])
def test_nothing_to_apply(config: Any, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an end of the text there is no minimum, either."""
    monkeypatch.setattr(llama, "generation_config", config)
    assert logit_rules(llama, prompt(), 4, frozenset(), sampling := Sampling(seed=3)) is sampling


def test_harmless_fields(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that models ship."""
    use(monkeypatch, llama, do_sample=True, temperature=0.6, top_k=20, top_p=0.95, prompt_lookup_num_tokens=3)
    want = generated("llama", "cpu", NEW)
    assert decode(llama, None, prompt(), max_new_tokens=NEW).sequences.tolist() == want.tolist()
