"""Heads: configuration, files, what fits which model, and what they compute."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eight_bits import through_eight_bits
from safetensors.torch import load_file, save_file
from tiny_llama import SIZE, VOCAB, make_llama, tiny_llama
from transformers import LlamaForCausalLM

from cerberus_ext.drafting import heads as heads_module
from cerberus_ext.drafting.heads import CerberusConfig, CerberusHeads, fingerprint
from cerberus_ext.ops import reference


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return tiny_llama()


def config(**changes: object) -> CerberusConfig:
    values = {"base_model": "tiny", "hidden_size": SIZE, "vocab_size": VOCAB, "num_heads": 3, **changes}
    return CerberusConfig(**values)  # type: ignore[arg-type]


def random_heads(**changes: object) -> CerberusHeads:
    torch.manual_seed(1)
    heads = CerberusHeads(config(**changes)).requires_grad_(False)
    for parameter in heads.parameters():
        parameter.normal_(std=0.3)
    if heads.draft_vocab is not None:
        heads.draft_vocab.copy_(torch.randperm(VOCAB)[: len(heads.draft_vocab)].sort().values)
    return heads


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be an integer >= 1, got 0"),
        ({"vocab_size": -5}, "vocab_size must be an integer >= 1, got -5"),
        ({"num_heads": 0}, "num_heads must be an integer >= 1, got 0"),
        ({"num_layers": 1.5}, "num_layers must be an integer >= 1, got 1.5"),
        ({"anchor": "embedding"}, 'anchor must be "root" or "hidden", got \'embedding\''),
        (
            {"draft_vocab": VOCAB + 1},
            rf"draft_vocab must be None or in 1..vocab_size \({VOCAB}\), got {VOCAB + 1}",
        ),
        ({"draft_vocab": 0}, r"draft_vocab must be None or in 1..vocab_size \(101\), got 0"),
        ({"context_layer": True, "anchor": "hidden"}, 'context_layer must be False without .* anchor "root"'),
        ({"context_layer": True, "context_heads": [4, 2, 8], "chained": False}, "context_layer must be False without"),
        ({"context_layer": True}, "context_heads must be query heads, .* got None"),
        ({"context_layer": True, "context_heads": [4, 3, 8]}, r"context_heads must be .* got \[4, 3, 8\]"),
        ({"context_layer": True, "context_heads": [4, 2, 7]}, r"context_heads must be .* an even head size, got"),
        ({"conditional_rank": 0}, r"conditional_rank must be None or in 1..1024 .*, got 0 with 3"),
        ({"conditional_rank": 2000}, r"conditional_rank must be None or in 1..1024 .*, got 2000 with 3"),
        ({"conditional_rank": 8, "num_heads": 1}, r"conditional_rank must be .* num_heads >= 2, got 8 with 1"),
        ({"conditional_rank": True}, "conditional_rank must be None or an integer, got True"),
        ({"accuracy": [[0.5], [0.4]]}, r"accuracy must have one row per head \(3\), got 2"),
    ],
)
def test_config_names_the_wrong_value(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"CerberusConfig: {message}"):
        config(**changes)


def test_config_refuses_other_files() -> None:
    with pytest.raises(ValueError, match="CerberusConfig: format_version must be 1, got 2"):
        CerberusConfig.from_dict({"base_model": "x", "hidden_size": 4, "vocab_size": 9, "format_version": 2})
    with pytest.raises(ValueError, match="CerberusConfig: unknown field 'colour'"):
        CerberusConfig.from_dict({"base_model": "x", "format_version": 1, "colour": 3})


@pytest.mark.parametrize(
    ("changes", "weight", "scaled"),
    [
        ({}, (2, 3, SIZE, 2 * SIZE), True),
        ({"num_layers": 1, "num_heads": 5}, (1, 5, SIZE, 2 * SIZE), True),
        ({"anchor": "hidden"}, (2, 3, SIZE, 2 * SIZE), False),
        ({"chained": False}, (2, 3, SIZE, SIZE), False),
    ],
)
def test_parameters(changes: dict, weight: tuple, scaled: bool) -> None:
    heads = CerberusHeads(config(**changes))
    assert heads.weight.shape == weight and heads.bias.shape == weight[:3]
    assert not heads.weight.any() and not heads.bias.any()
    assert (heads.anchor_scale is not None) == scaled


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"draft_vocab": 40, "paths": [[0], [0, 1]]},
        {"chained": False},
        {"context_layer": True, "context_heads": [4, 2, 8]},
        {"conditional_rank": 5, "draft_vocab": 40},
        {"conditional_rank": 5, "chained": False},
    ],
)
def test_saved_heads_come_back(tmp_path: Path, dtype: torch.dtype, changes: dict) -> None:
    heads = random_heads(**changes).to(dtype)
    heads.save_pretrained(tmp_path)
    assert {file.suffix for file in tmp_path.iterdir()} == {".safetensors", ".json", ".md"}
    again = CerberusHeads.from_pretrained(tmp_path)
    assert again.config == heads.config
    assert again.state_dict().keys() == heads.state_dict().keys()
    for name, tensor in heads.state_dict().items():
        loaded = again.state_dict()[name]
        assert loaded.dtype == tensor.dtype and torch.equal(loaded, tensor), name


def test_saved_files_hold_nothing_of_the_model(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    heads = random_heads(draft_vocab=40)
    heads.bind(llama)
    heads.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors.keys() == {"weight", "bias", "anchor_scale", "draft_vocab"}
    assert tensors["draft_vocab"].dtype == torch.int32


def test_files_that_contradict_each_other(tmp_path: Path) -> None:
    random_heads().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "num_heads": 4}))
    with pytest.raises(ValueError, match=r"weight must be \(2, 4, 32, 64\) by config.json, got \(2, 3, 32, 64\)"):
        CerberusHeads.from_pretrained(tmp_path)

    (tmp_path / "config.json").write_text(json.dumps(settings))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has no tensor 'bias'"):
        CerberusHeads.from_pretrained(tmp_path)

    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="has no config.json"):
        CerberusHeads.from_pretrained(tmp_path)


def damage(**changes: Any) -> Callable[[Path], None]:
    """Of tensors: another one in their place, or None for none."""

    def of(folder: Path) -> None:
        tensors = {**load_file(folder / "model.safetensors"), **changes}
        save_file({name: value for name, value in tensors.items() if value is not None}, folder / "model.safetensors")

    return of


def setting(text: str | None = None, **changes: object) -> Callable[[Path], None]:
    def of(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes) if text is None else text)

    return of


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


WEIGHT, IDS = torch.zeros(2, 3, SIZE, 2 * SIZE), torch.arange(40, dtype=torch.int32)
DAMAGED: list[tuple[Callable[[Path], None], str]] = [
    (cut, "/model.safetensors is damaged or no safetensors file"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"garbage"), "/model.safetensors is damaged or no"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b""), "/model.safetensors is damaged or no"),
    (lambda folder: (folder / "model.safetensors").unlink(), "/model.safetensors is missing"),
    (damage(weight=WEIGHT.to(torch.int8)), r"weight in .*/model.safetensors must be one of float32, .* got torch.int8"),
    (damage(weight=WEIGHT.double()), r"weight in .*/model.safetensors must be one of float32, .* got torch.float64"),
    (damage(weight=WEIGHT.half()), r"in .* must be one of float32, .* the same for all, got torch.float32"),
    (damage(weight=WEIGHT + torch.nan), "weight in .*/model.safetensors must be finite numbers, got NaN or infinity"),
    (damage(bias=torch.full((2, 3, SIZE), torch.inf)), "bias in .*/model.safetensors must be finite numbers"),
    (damage(draft_vocab=IDS + VOCAB), rf"draft_vocab in .* must be token ids in 0..{VOCAB - 1}, got {VOCAB}"),
    (damage(draft_vocab=IDS - 1), rf"draft_vocab in .* must be token ids in 0..{VOCAB - 1}, got -1"),
    (damage(draft_vocab=IDS.flip(0)), "draft_vocab in .* must be ascending token ids"),
    (damage(draft_vocab=IDS.float()), "draft_vocab in .* must be int32 or int64, got torch.float32"),
    (damage(more=WEIGHT), "/model.safetensors has a tensor 'more' that config.json does not provide for"),
    (setting("[1, 2]"), "/config.json: it must be a JSON object, got list"),
    (setting("{"), "/config.json: it is not JSON"),
    (setting("[" * 100_000), "/config.json: it is not JSON"),
    (setting('{"format_version": 1}'), "/config.json: CerberusConfig: there is no base_model"),
    (setting('{"model_type": "llama"}'), r"/config.json: it is of a model \(llama\), not of heads"),
    (setting(hidden_size="32"), "/config.json: CerberusConfig: hidden_size must be an integer >= 1, got '32'"),
    (setting(num_heads=True), "CerberusConfig: num_heads must be an integer >= 1, got True"),
    (setting(draft_vocab="40"), "CerberusConfig: draft_vocab must be None or an integer, got '40'"),
    (setting(chained=None), "CerberusConfig: chained must be true or false, got None"),
    (setting(base_model=3), "CerberusConfig: base_model must be a text, got 3"),
    (setting(accuracy=[[0.5], [2], [0.1]]), "CerberusConfig: accuracy must be rows of probabilities"),
    (setting(paths=[[0], ["a"]]), r"CerberusConfig: paths must be paths of ranks >= 0, got \[\[0\], \['a'\]\]"),
    (setting(paths=[[0, 0, 0, 0]]), "CerberusConfig: paths must be paths of ranks >= 0, got"),
    (setting(hidden_size=10**6), r"weight must be \(2, 3, 1000000, 2000000\) by config.json, got"),
    (setting(hidden_size=10**18), "/config.json: "),
    (setting(context_layer=True, context_heads=["a", 1, 2]), "CerberusConfig: context_heads must be integers, got"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED)
def test_damaged_files_are_named(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    random_heads(draft_vocab=40).save_pretrained(tmp_path)
    change(tmp_path)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        CerberusHeads.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["/nonexistent", "../nonexistent", "a/b/c", "", "~/heads"])
def test_what_is_neither_a_folder_nor_a_hub_id(name: str) -> None:
    with pytest.raises(ValueError, match="is no folder, no Hub id"):
        CerberusHeads.from_pretrained(name or "nothing")


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="/file is a file, not a folder of heads"):
        CerberusHeads.from_pretrained(tmp_path / "file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_saving_writes_over_heads_only(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"model_type": "llama", "vocab_size": 3}')
    (tmp_path / "README.md").write_text("mine")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"save_pretrained: .*/{name} is there already, and is not of Cerberus heads"):
        random_heads().save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    (tmp_path / name).unlink()
    for scale in (1, 2):
        heads = random_heads()
        heads.weight.mul_(scale)
        heads.save_pretrained(tmp_path)
        assert CerberusHeads.from_pretrained(tmp_path).weight.equal(heads.weight)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_packaged_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = random_heads()
    heads.save_pretrained(tmp_path / "some-model")
    monkeypatch.setattr(heads_module, "PRETRAINED", tmp_path)
    assert torch.equal(CerberusHeads.from_pretrained("some-model").weight, heads.weight)
    with pytest.raises(ValueError, match="'some-modle' is no folder, no Hub id .* packaged heads: some-model"):
        CerberusHeads.from_pretrained("some-modle")


def test_the_heads_of_the_package() -> None:
    """They are of the kind that the documentation says, small, in bfloat16, and come with their record."""
    folder = heads_module.PRETRAINED / "smollm2-135m-instruct"
    assert (folder / "model.safetensors").stat().st_size <= 16_000_000
    assert sum(file.stat().st_size for file in folder.glob("*.json")) <= 100_000
    heads = CerberusHeads.from_pretrained("smollm2-135m-instruct")
    found = heads.config
    assert (found.num_heads, found.num_layers, found.anchor, found.chained) == (4, 2, "root", True)
    assert (found.context_layer, found.context_heads) == (True, [9, 3, 64])
    assert (found.hidden_size, found.vocab_size, found.draft_vocab) == (576, 49152, 15000)
    assert heads.weight.dtype == torch.bfloat16 and heads.weight.isfinite().all()
    assert heads.draft_vocab is not None and (heads.draft_vocab.diff() > 0).all()
    record = json.loads((folder / "training.json").read_text())
    assert record["lm_head_fingerprint"] == found.lm_head_fingerprint
    assert record["options"]["base_model"] == found.base_model
    assert found.paths is not None and {len(path) for path in found.paths} == {1, 2, 3, 4}


# ---------------------------------------------------------------- binding


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, r"the heads are for hidden_size 32 \(tiny\), the model has 64"),
        ({"vocab_size": 99}, r"the heads are for vocab_size 101 \(tiny\), the model has 99"),
    ],
)
def test_bind_names_the_number_that_differs(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"CerberusHeads.bind: {message}"):
        random_heads().bind(make_llama(**changes))


def test_bind_checks_the_lm_head(llama: LlamaForCausalLM) -> None:
    heads = random_heads(lm_head_fingerprint=fingerprint([llama.lm_head.weight]))
    heads.bind(llama)
    with pytest.raises(ValueError, match="CerberusHeads.bind: the heads were trained on the LM head [0-9a-f]{16} "):
        heads.bind(make_llama(seed=2))
    heads.bind(make_llama(seed=2), check_fingerprint=False)


def test_bind_refuses_what_has_no_plain_lm_head(llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="must be a causal LM with an LM head, got LlamaModel"):
        random_heads().bind(llama.model)
    biased = make_llama(seed=2)
    biased.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB))
    with pytest.raises(ValueError, match="LM head must have no bias"):
        random_heads().bind(biased)


def test_fingerprint_is_of_the_weights_not_of_their_dtype() -> None:
    weight = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    expected = fingerprint([weight])
    assert fingerprint([weight.bfloat16()]) == expected
    assert fingerprint([weight.half()]) == expected
    assert fingerprint([-weight]) != expected
    assert fingerprint([weight[:499]]) != expected


def test_bind_leaves_model_and_heads_alone(llama: LlamaForCausalLM) -> None:
    heads = random_heads(draft_vocab=40).bfloat16()
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    own = heads.state_dict().keys()
    drafter = heads.bind(llama)
    drafter.draft(torch.randn(1, SIZE), torch.tensor([3]), drafts=4)
    assert heads.state_dict().keys() == own
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())


# ---------------------------------------------------------------- drafting


@pytest.mark.parametrize("changes", [{}, {"anchor": "hidden"}, {"chained": False}, {"draft_vocab": 40}])
def test_new_heads_predict_what_the_base_model_does(llama: LlamaForCausalLM, changes: dict) -> None:
    heads = CerberusHeads(config(**changes))
    hidden = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(0))
    logits = hidden @ through_eight_bits(llama.lm_head.weight).T
    if heads.draft_vocab is not None:
        logits = logits[:, :40]  # new heads hold the lowest ids
    ids, logprobs = heads.bind(llama).draft(hidden, torch.tensor([5, 6]), drafts=7)
    expected = logits.log_softmax(-1).topk(7)
    for head in range(3):
        assert torch.equal(ids[:, head], expected.indices)
        torch.testing.assert_close(logprobs[:, head], expected.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("anchor", ["root", "hidden"])
def test_draft_is_the_formula_of_the_design(llama: LlamaForCausalLM, anchor: str) -> None:
    heads = random_heads(anchor=anchor, draft_vocab=40)
    hidden = torch.randn(2, SIZE, generator=torch.Generator().manual_seed(0))
    root = torch.tensor([7, 100])
    embedded = llama.model.embed_tokens.weight.detach()[root]
    start = hidden if heads.anchor_scale is None else embedded * heads.anchor_scale
    states = reference.head_stack(hidden, start, through_eight_bits(heads.weight), heads.bias)
    index, logprobs = reference.draft_topk(states, through_eight_bits(llama.lm_head.weight)[heads.draft_vocab], 5)

    ids, got = heads.bind(llama).draft(hidden, root, drafts=5)
    expected = reference.head_stack(hidden, start, heads.weight, heads.bias)
    torch.testing.assert_close(heads(hidden, start), expected, rtol=1e-4, atol=1e-4)
    assert ids.shape == (2, 3, 5) and torch.equal(ids, heads.draft_vocab[index])
    torch.testing.assert_close(got, logprobs, rtol=1e-3, atol=1e-3)  # rows are rounded, too


def test_heads_of_another_dtype_than_the_model(llama: LlamaForCausalLM) -> None:
    heads = random_heads().bfloat16()
    ids, logprobs = heads.bind(llama).draft(torch.randn(1, SIZE), torch.tensor([3]), drafts=2)
    assert ids.dtype == torch.int64 and logprobs.dtype == torch.float32


@pytest.mark.parametrize(("known", "drafts"), [(20, 0), (20, 21), (32, 33)])
def test_draft_checks_drafts(llama: LlamaForCausalLM, known: int, drafts: int) -> None:
    with pytest.raises(ValueError, match=f"tree must have 1 to {known} drafts of each head, got {drafts}"):
        heads = random_heads(draft_vocab=20 if known == 20 else 40)
        heads.bind(llama).draft(torch.randn(1, SIZE), torch.tensor([3]), drafts)
