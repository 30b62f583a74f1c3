"""Every argument of `decode`, given something wrong: the message names it, what it must be and what it is."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins import RandomHeads
from tiny_models import VOCAB, prompt, tiny_model
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from cerberus_ext import CerberusConfig, CerberusHeads
from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.gate import ConfidenceGate, Gate
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.drafting.suffix import SuffixProposer
from cerberus_ext.engine.decode import decode


class ReadingGate(Gate):
    needs: Any = frozenset({"entropy", "weather"})

    def __init__(self, needs: Any = needs) -> None:
        self.needs = needs


def encoder_decoder() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    ).eval()


def call(**changes: Any) -> None:
    arguments: dict[str, Any] = {
        "model": tiny_model("llama"),
        "heads": RandomHeads(prompt(), 4, VOCAB),
        "ids": prompt(),
        "max_new_tokens": 2,
        **changes,
    }
    decode(arguments.pop("model"), arguments.pop("heads"), arguments.pop("ids"), **arguments)


IDS = prompt()
HEADS = CerberusHeads(CerberusConfig("tiny", 32, VOCAB))
WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": torch.nn.Linear(2, 2)}, TypeError, "model must be a transformers PreTrainedModel, got Linear"),
    ({"heads": 4}, TypeError, "heads must be CerberusHeads, got int"),
    ({"heads": SimpleNamespace(bind=1)}, TypeError, "heads must be CerberusHeads, got SimpleNamespace"),
    (
        {"heads": "smollm2"},
        TypeError,
        r"got the str 'smollm2': load them with CerberusHeads.from_pretrained\('smollm2'",
    ),
    (
        {"heads": Path("my-heads")},
        TypeError,
        r"got the PosixPath 'my-heads': load them with .*pretrained\('my-heads'\)",
    ),
    ({"ids": "1 2"}, TypeError, "ids must be a tensor or a list of integers, or have them as input_ids, got str"),
    ({"ids": [1, 2.5]}, TypeError, "ids must be a tensor or a list of integers, .* got list"),
    ({"ids": [[1, 2], [3.5]]}, TypeError, "ids must be a tensor or a list of integers, .* got list"),
    ({"ids": [[1, 2], []]}, ValueError, r"ids must be \(B, S\) or \(S,\) with B, S >= 1, got shape \(0,\)"),
    ({"ids": [IDS, IDS.expand(3, -1)]}, ValueError, "ids must be a list of prompts of one row each, got one of 3 rows"),
    ({"ids": [[1, 2], [3, VOCAB, 4]]}, ValueError, r"ids must be in 0\.\.100, got 101"),
    ({"ids": [[1, 2], [3]], "attention_mask": [[1, 1]]}, ValueError, "attention_mask must be None or a list like ids"),
    (
        {"ids": IDS.expand(2, -1), "streamer": RandomHeads(IDS, 1, VOCAB)},
        ValueError,
        "streamer must be None with 2 prompts: use Decoder",
    ),
    ({"slots": 0}, ValueError, "slots must be >= 1, got 0"),
    ({"slots": "2"}, TypeError, "slots must be an integer, got '2'"),
    ({"ids": [True, False]}, TypeError, "ids must be a tensor or a list of integers, .* got list"),
    ({"ids": IDS.float()}, TypeError, "ids must be a tensor or a list of integers, .* got torch.float32"),
    ({"ids": IDS > 3}, TypeError, "ids must be a tensor or a list of integers, .* got torch.bool"),
    ({"ids": {"ids": IDS}}, ValueError, r"ids must have input_ids, and attention_mask at most, got \['ids'\]"),
    (
        {"ids": {"input_ids": IDS, "pixel_values": IDS}},
        ValueError,
        r"ids must have input_ids, and attention_mask at most, got \['input_ids', 'pixel_values'\]",
    ),
    ({"ids": {"input_ids": IDS, "token_type_ids": IDS}}, ValueError, "ids must have input_ids, and attention_mask at"),
    (
        {"ids": {"input_ids": IDS, "attention_mask": IDS * 0}},
        ValueError,
        "attention_mask must have a one in every row, got none in row 0",
    ),
    ({"ids": IDS[0, 0]}, ValueError, r"ids must be \(B, S\) or \(S,\) with B, S >= 1, got shape \(\)"),
    ({"ids": []}, ValueError, r"ids must be \(B, S\) or \(S,\) with B, S >= 1, got shape \(0,\)"),
    ({"ids": IDS[:, :0]}, ValueError, r"ids must be \(B, S\) or \(S,\) with B, S >= 1, got shape \(1, 0\)"),
    ({"ids": IDS[None]}, ValueError, r"ids must be \(B, S\) or \(S,\) with B, S >= 1, got shape \(1, 1, 9\)"),
    ({"ids": IDS.to("meta")}, ValueError, "ids must be on the model's device, cpu, got meta"),
    ({"ids": IDS + VOCAB}, ValueError, r"ids must be in 0\.\.100, got \d+"),
    ({"ids": IDS - 200}, ValueError, r"ids must be in 0\.\.100, got -\d+"),
    (
        {"attention_mask": IDS[:, 1:]},
        ValueError,
        r"attention_mask must be a tensor of ids' shape, \(1, 9\), got \(1, 8\)",
    ),
    ({"attention_mask": [1] * 8}, ValueError, r"attention_mask must be a tensor of ids' shape, .* got \(8,\)"),
    ({"attention_mask": "ones"}, ValueError, "attention_mask must be a tensor of ids' shape, .* got str"),
    (
        {"attention_mask": torch.arange(9)[None] % 4},
        ValueError,
        "zeros only left or right of a row's ones",
    ),
    ({"max_new_tokens": -1}, ValueError, "max_new_tokens must be >= 0, got -1"),
    ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens must be an integer, got 2.0"),
    ({"max_new_tokens": torch.tensor([2])}, TypeError, r"max_new_tokens must be an integer, got tensor\(\[2\]\)"),
    ({"max_new_tokens": torch.tensor(True)}, TypeError, r"max_new_tokens must be an integer, got tensor\(True\)"),
    ({"max_new_tokens": np.float32(2)}, TypeError, "max_new_tokens must be an integer, got .*2.0"),
    ({"max_new_tokens": True}, TypeError, "max_new_tokens must be an integer, got True"),
    ({"tree": [[0]]}, TypeError, "tree must be a number of nodes, a StaticPolicy, a DynamicPolicy or None, got list"),
    ({"tree": True}, TypeError, "tree must be a number of nodes, a StaticPolicy, a DynamicPolicy or None, got bool"),
    ({"tree": 16.0}, TypeError, "tree must be a number of nodes, a StaticPolicy, a DynamicPolicy or None, got float"),
    ({"tree": 1}, ValueError, "tree must be in 2..1024, got 1"),
    ({"tree": 10**12}, ValueError, "tree must be in 2..1024, got 1000000000000"),
    ({"tree": StaticPolicy.chain(5)}, ValueError, "tree must not be deeper than the heads, 4, got a depth of 5"),
    ({"gate": 0.5}, TypeError, "gate must be a Gate or None, got float"),
    ({"gate": Gate}, TypeError, "gate must be a Gate or None, got type"),
    ({"gate": ReadingGate()}, ValueError, r"gate must need no other signals than .*, got \['weather'\]"),
    ({"gate": ReadingGate((["x"],))}, ValueError, r"gate must need no other signals than .*, got \[\['x'\]\]"),
    ({"gate": ReadingGate({None, "x"})}, ValueError, r"gate must need no other signals than .*, got \[.*None"),
    (
        {"gate": ReadingGate(["entropy"])},
        TypeError,
        r"gate must have a set of names as its needs, got \['entropy'\] of ReadingGate",
    ),
    # Found without a step.
    ({"gate": ConfidenceGate({1: 1.0}), "tree": StaticPolicy.chain(2), "max_new_tokens": 0}, ValueError, "has 3 nodes"),
    (
        {"heads": None, "tree": StaticPolicy.chain(1)},
        ValueError,
        "tree must not be deeper than the heads, 0, got a depth of",
    ),
    ({"tree": DynamicPolicy(8, platt=((1, 0),))}, ValueError, "a correction for each of the 4 heads, .* got 1"),
    (
        {"gate": ConfidenceGate({1: 1.0, 8: 2.0}), "tree": DynamicPolicy(9), "max_new_tokens": 0, "heads": None},
        ValueError,
        "a tree has 9 nodes, .* is 8",
    ),
    (
        {"proposers": SuffixProposer()},
        TypeError,
        "proposers must be None or a sequence of callables .* got SuffixProposer",
    ),
    ({"proposers": [SuffixProposer(), 3]}, TypeError, "proposers must be None or a sequence of callables .* got list"),
    ({"proposers": iter([])}, TypeError, "proposers must be None or a sequence of callables .* got list_iterator"),
    (
        {"proposers": [SuffixProposer], "tree": DynamicPolicy(8)},
        TypeError,
        r"proposers\[0\] must make .* got SuffixProposer",
    ),
    (
        {"proposers": [SuffixProposer()], "tree": StaticPolicy.chain(1)},
        ValueError,
        "proposers must be None .* with a StaticPolicy",
    ),
    ({"temperature": -0.5}, ValueError, "temperature must be >= 0 and finite, got -0.5"),
    ({"temperature": float("inf")}, ValueError, "temperature must be >= 0 and finite, got inf"),
    ({"temperature": float("nan")}, ValueError, "temperature must be >= 0 and finite, got nan"),
    ({"temperature": "hot"}, TypeError, "temperature must be a number, got 'hot'"),
    ({"top_k": -1}, ValueError, rf"top_k must be in 0\.\.{2**63 - 1}, got -1"),
    ({"top_k": 2**63}, ValueError, rf"top_k must be in 0\.\.{2**63 - 1}, got {2**63}"),
    ({"temperature": torch.ones(1)}, TypeError, r"temperature must be a number, got tensor\(\[1.\]\)"),
    ({"temperature": np.True_}, TypeError, "temperature must be a number, got .*True"),
    ({"top_k": 1.5}, TypeError, "top_k must be an integer, got 1.5"),
    ({"top_p": 0.0}, ValueError, "top_p must be > 0 and <= 1, got 0.0"),
    ({"top_p": 1.1}, ValueError, "top_p must be > 0 and <= 1, got 1.1"),
    ({"min_p": -0.1}, ValueError, "min_p must be >= 0 and <= 1, got -0.1"),
    ({"top_p": None}, TypeError, "top_p must be a number, got None"),
    ({"seed": 2**63}, ValueError, rf"seed must be in -{2**63}\.\.{2**63 - 1}, got {2**63}"),
    ({"seed": "1"}, TypeError, "seed must be an integer, got '1'"),
    ({"acceptance": "lossy", "temperature": 1.0}, ValueError, "acceptance must be one of .*, got 'lossy'"),
    ({"acceptance": None}, ValueError, "acceptance must be one of .*exact.*typical.*, got None"),
    ({"acceptance": "typical"}, ValueError, "acceptance must be 'exact' where temperature is 0, got 'typical'"),
    ({"eos_token_id": "</s>"}, TypeError, "eos_token_id must be None, an integer or a list of integers, got '</s>'"),
    ({"eos_token_id": [1, 2.5]}, TypeError, r"eos_token_id must be .* got \[1, 2.5\]"),
    ({"eos_token_id": torch.tensor(2.0)}, TypeError, r"eos_token_id must be .* got tensor\(2.\)"),
    ({"eos_token_id": torch.ones(1, 1)}, TypeError, r"eos_token_id must be .* got tensor\(\[\[1.\]\]\)"),
    ({"stopping_criteria": print}, TypeError, "stopping_criteria must be None or a StoppingCriteriaList, got builtin_"),
    ({"stopping_criteria": [3]}, TypeError, "stopping_criteria must be None or a StoppingCriteriaList, got list"),
    ({"generation_config": {}}, TypeError, "generation_config must be None or a GenerationConfig, got dict"),
    ({"generation_config": GenerationConfig(num_beams=2)}, ValueError, "decode: generation_config must not have num_b"),
    (
        {"generation_config": GenerationConfig(repetition_penalty=-1.0)},
        ValueError,
        "decode: generation_config must have a repetition_penalty that fits",
    ),
    ({"logits_processor": print}, TypeError, "logits_processor must be None or a LogitsProcessorList, got builtin_"),
    ({"logits_processor": [3]}, TypeError, "logits_processor must be None or a LogitsProcessorList, got list"),
    ({"graphs": "yes"}, TypeError, "graphs must be None, True or False, got 'yes'"),
    ({"graphs": 1}, TypeError, "graphs must be None, True or False, got 1"),
    ({"fuse": 1}, TypeError, "fuse must be None, True or False, got 1"),
    ({"pack": "no"}, TypeError, "pack must be None, True or False, got 'no'"),
    ({"streamer": print}, TypeError, "streamer must have put and end, as transformers' have, got builtin_function"),
]


@pytest.mark.parametrize(("changes", "error", "message"), WRONG, ids=[message for _, _, message in WRONG])
def test_wrong_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="decode: |ConfidenceGate: ") as caught:
        call(**changes)
    caught.match(message)


def test_every_argument_is_covered() -> None:
    assert set(inspect.signature(decode).parameters) == {name for changes, _, _ in WRONG for name in changes}


def test_encoder_decoder() -> None:
    with pytest.raises(
        ValueError, match="decode: model must be decoder-only, T5ForConditionalGeneration is an encoder"
    ):
        call(model=encoder_decoder())


def test_an_embedding_as_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its input are tokens: the hidden states are seen by nobody."""
    model = copy.copy(tiny_model("llama"))
    monkeypatch.setattr(model, "get_output_embeddings", model.get_input_embeddings)
    with pytest.raises(
        ValueError, match="decode: model must call its LM head, of LlamaForCausalLM it is the embedding"
    ):
        decode(model, None, prompt())


def test_model_without_lm_head() -> None:
    with pytest.raises(ValueError, match="decode: model must have an LM head, LlamaModel has none"):
        call(model=tiny_model("llama").model)


def test_model_in_training_mode() -> None:
    model = tiny_model("llama")
    model.train()
    try:
        with pytest.raises(ValueError, match=r"decode: model must be in evaluation mode.* call model.eval\(\)"):
            call(model=model)
        assert model.training, "it was not changed"
    finally:
        model.eval()


def test_model_of_another_dtype() -> None:
    with pytest.raises(ValueError, match="decode: model must be float32, bfloat16 or float16, got torch.float64"):
        call(model=tiny_model("llama", dtype=torch.float64))


def test_model_on_another_device() -> None:
    with pytest.raises(ValueError, match="decode: model must have its weights in memory, some of Llama.* are on meta"):
        call(model=tiny_model("llama", device="meta"))
