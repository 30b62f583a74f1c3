"""What `generate` takes, `decode` takes, too, in whatever form it comes; and the text is the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from stand_ins import OracleHeads
from tiny_models import VOCAB, generate, generated, prompt, tiny_model
from transformers import BatchEncoding, PreTrainedModel

from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.engine.decode import decode

NEW = 12
IDS = prompt()
ONES = torch.ones_like(IDS)
ROW = IDS[0].tolist()


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama")


FORMS: dict[str, Any] = {
    "int32": IDS.int(),
    "uint8": IDS.to(torch.uint8),
    "a row": IDS[0],
    "a list": ROW,
    "a tuple": tuple(ROW),
    "a list of a list": [ROW],
    "a list of numpy integers": [np.int32(token) for token in ROW],
    "an array": IDS.numpy(),
    "an array of int32, a row": IDS[0].numpy().astype(np.int32),
    "not contiguous": torch.stack([IDS[0], IDS[0]], 1).T[:1],
    "a dictionary": {"input_ids": IDS},
    "a dictionary with a mask": {"input_ids": IDS, "attention_mask": ONES},
    "a tokenizer's": BatchEncoding({"input_ids": IDS, "attention_mask": ONES, "token_type_ids": ONES * 0}),
    "a tokenizer's lists": BatchEncoding({"input_ids": ROW, "attention_mask": [1] * len(ROW)}),
}


@pytest.mark.parametrize("form", FORMS)
def test_ids(form: str, llama: PreTrainedModel) -> None:
    out = decode(llama, None, FORMS[form], max_new_tokens=NEW).sequences
    assert out.dtype == torch.int64 and out.device == llama.device
    assert out.tolist() == generated("llama", "cpu", NEW).tolist()


@pytest.mark.parametrize("mask", [ONES, ONES[0], ONES.bool(), ONES.int(), [[1] * 9], np.ones((1, 9), np.int64)])
@pytest.mark.parametrize("ids", [IDS, IDS[0], {"input_ids": IDS, "attention_mask": ONES * 0}])
def test_attention_mask(mask: Any, ids: Any, llama: PreTrainedModel) -> None:
    """The one that `decode` gets counts."""
    out = decode(llama, None, ids, attention_mask=mask, max_new_tokens=2)
    assert out.sequences.tolist() == generated("llama", "cpu", NEW)[:, :11].tolist()
    if isinstance(ids, Mapping):
        with pytest.raises(ValueError, match="decode: attention_mask must have a one in every row"):
            decode(llama, None, ids, max_new_tokens=2)


@pytest.mark.parametrize("number", [5, np.int64(5), np.uint8(5), np.array(5), torch.tensor(5), torch.tensor(5).int()])
def test_integers(number: Any, llama: PreTrainedModel) -> None:
    want = generated("llama", "cpu", NEW)[:, :14]
    heads = OracleHeads(want, 3, VOCAB)
    assert decode(llama, heads, IDS, max_new_tokens=number, tree=number, streamer=heads).sequences.equal(want)
    drawn = [
        decode(llama, None, IDS, max_new_tokens=8, temperature=1.5, top_k=five, seed=five).sequences
        for five in (5, number)
    ]
    assert drawn[0].equal(drawn[1])


def test_a_number_of_nodes_is_a_tree(llama: PreTrainedModel) -> None:
    stats = []
    for tree in (6, DynamicPolicy(6)):
        heads = OracleHeads(generated("llama", "cpu", NEW), 3, VOCAB)
        stats.append(decode(llama, heads, IDS, max_new_tokens=NEW, tree=tree, proposers=[], streamer=heads).stats)
    assert stats[0].trace == stats[1].trace and stats[0].trace[0][0] == 6


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.tensor, np.array])
def test_numbers(kind: Any, llama: PreTrainedModel) -> None:
    """0.5 and 0.75 are the same in all of them."""
    drawn = [
        decode(llama, None, IDS, max_new_tokens=8, temperature=of(0.5), top_p=of(0.75), seed=3).sequences
        for of in (float, kind)
    ]
    assert drawn[0].equal(drawn[1])
    greedy = decode(llama, None, IDS, max_new_tokens=8, temperature=kind(0.0), top_p=np.int64(1)).sequences
    assert greedy.equal(generated("llama", "cpu", NEW)[:, :17])


EOS = int(generated("llama", "cpu", NEW)[0, 15])


@pytest.mark.parametrize(
    "given",
    [
        EOS,
        np.int64(EOS),
        [EOS, VOCAB + 5],
        (EOS,),
        {EOS},
        [np.int32(EOS)],
        np.array([1000, EOS]),
        torch.tensor(EOS),
        torch.tensor([EOS, VOCAB + 5]),
        [torch.tensor(EOS)],
    ],
)
def test_eos_token_id(given: Any, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    want = generate(llama, IDS, max_new_tokens=NEW, eos_token_id=EOS)
    assert want.shape[1] < 9 + NEW
    assert decode(llama, None, IDS, max_new_tokens=NEW, eos_token_id=given).sequences.equal(want)
    monkeypatch.setattr(llama.generation_config, "eos_token_id", given)
    assert decode(llama, None, IDS, max_new_tokens=NEW).sequences.equal(want)


def test_criteria_get_what_generate_gives_them(llama: PreTrainedModel) -> None:
    seen: dict[str, list[Any]] = {"generate": [], "decode": []}

    def criterion(of: str) -> Any:
        def ask(ids: torch.Tensor, scores: Any, **others: Any) -> torch.Tensor:
            seen[of].append((ids.tolist(), ids.dtype, scores, others))
            return torch.zeros(1, dtype=torch.bool)

        return ask

    generate(llama, IDS, max_new_tokens=NEW, stopping_criteria=[criterion("generate")])
    decode(llama, None, IDS, max_new_tokens=NEW, stopping_criteria=[criterion("decode")])
    assert seen["decode"] == seen["generate"] and seen["decode"][0][2] is None
