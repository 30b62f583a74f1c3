"""Conditional drafts: what they learn from, with heads and for heads that stay as they are."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_llama import VOCAB, make_llama
from training_runs import options
from transformers import LlamaForCausalLM

from cerberus_ext.drafting.conditional import ConditionalDrafts, rms
from cerberus_ext.drafting.heads import CerberusConfig, CerberusHeads
from cerberus_ext.training import positions
from cerberus_ext.training.answers import read_answers
from cerberus_ext.training.conditional import ConditionalTrainer
from cerberus_ext.training.distill import counted, offer_of
from cerberus_ext.training.options import TrainOptions
from cerberus_ext.training.places import Places, conditional_loss, conditional_quality, places_of, row_bytes, weighed
from cerberus_ext.training.processes import Processes
from cerberus_ext.training.run import KEY_SHARES
from cerberus_ext.training.start import frequent_tokens, of_init
from cerberus_ext.training.train import train
from cerberus_ext.training.windows import Drawn

HEADS, SIZE, DRAFTS = 3, 8, 4


def a_segment_of_each_kind() -> tuple[torch.Tensor, ...]:
    """teacher (S, G + K - 1, Vd), tokens (S, G + K), left (S, G), draft_index (V,): texts that are mostly the
    teacher's own choice, some of their tokens unknown to the drafts."""
    draw = torch.Generator().manual_seed(1)
    segments, width, known = 6, 5, 11
    teacher = torch.randn(segments, width + HEADS - 1, known, generator=draw)
    draft_index = torch.full((20,), -1)
    draft_index[torch.arange(known) * 2 - (torch.arange(known) > 9).long()] = torch.arange(known)
    tokens = torch.randint(20, (segments, width + HEADS), generator=draw)
    vocabulary = (draft_index >= 0).nonzero()[:, 0]
    greedy = torch.rand(segments, width + HEADS - 1, generator=draw) < 0.8
    tokens[:, 1:] = torch.where(greedy, vocabulary[teacher.argmax(-1)], tokens[:, 1:])
    left = torch.randint(4, (segments, width), generator=draw)
    return teacher, tokens, left, draft_index


def test_the_loss_is_the_plain_formula() -> None:
    teacher, tokens, left, draft_index = a_segment_of_each_kind()
    segments, width = left.shape
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(HEADS - 1, segments * width, teacher.shape[-1], generator=draw)
    rows, embeddings = torch.randn(11, SIZE, generator=draw), torch.randn(20, SIZE, generator=draw) * 3
    drafts = ConditionalDrafts(SIZE, HEADS, 2)
    for parameter in drafts.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw)
    offers = [offer_of(one, one.logsumexp(-1), DRAFTS) for one in logits]
    places = places_of(offers, teacher, tokens, left, draft_index)
    found = conditional_loss(
        weighed(drafts, places, rows, embeddings, (rms(rows), rms(embeddings)))[0], places, counted(left, HEADS)[1:]
    )

    expected, used = torch.zeros(()), 0
    for head in (1, 2):  # numbered from 0: the second and the third
        for segment in range(segments):
            for place in range(width):
                path = [int(token) for token in tokens[segment, place + 1 : place + head + 1]]
                best = [teacher[segment, place + depth].argmax() for depth in range(head)]
                if left[segment, place] <= head or [int(draft_index[token]) for token in path] != best:
                    continue
                log_p = logits[head - 1, segment * width + place].log_softmax(-1)
                values, ids = log_p.topk(DRAFTS)
                parent = drafts.queries[head - 1] @ (embeddings[path[-1]] / embeddings.square().mean().sqrt())
                scores = (
                    drafts.slopes[head - 1] * values
                    + (rows[ids] / rows.square().mean().sqrt()) @ drafts.keys.T @ parent
                )
                rest = drafts.slopes[head - 1] * torch.log(1 - values.exp().sum()) + drafts.rest[head - 1]
                model = teacher[segment, place + head].softmax(-1)[ids]
                model = torch.cat([model, 1 - model.sum(0, keepdim=True)])
                entropy = -(model * torch.cat([scores, rest[None]]).log_softmax(0)).sum()
                expected = expected + entropy / (left > head).sum()
                used += 1
    assert 10 < used < 2 * segments * width - 10 and used == places.usable.sum()
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, list(drafts.parameters())) for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_shares_of_a_step_add_up() -> None:
    teacher, tokens, left, draft_index = a_segment_of_each_kind()
    draw = torch.Generator().manual_seed(2)
    offers = [(torch.randint(11, (30, DRAFTS), generator=draw), torch.randn(30, DRAFTS, generator=draw) - 4)] * 2
    places, counts = places_of(offers, teacher, tokens, left, draft_index), torch.tensor([7, 3])
    logprobs = torch.randn(30, 2, DRAFTS + 1, generator=draw).log_softmax(-1)
    whole = conditional_loss(logprobs, places, counts)
    parts = [conditional_loss(logprobs[rows], places.rows(rows), counts) for rows in torch.arange(30).split(11)]
    torch.testing.assert_close(sum(parts), whole)


def test_the_right_class_is_the_models_best_token() -> None:
    """Of a head's drafts, else the rest."""
    teacher = torch.tensor([[[0.0, 9, 0, 0], [0, 0, 9, 0], [0, 0, 0, 9]]])
    offers = [(torch.tensor([[2, 1], [0, 1]]), torch.tensor([[-1.0, -2], [-1, -2]]))]
    places = places_of(offers, teacher, torch.tensor([[3, 1, 2, 3]]), torch.tensor([[2, 2]]), torch.arange(4))
    assert places.right.tolist() == [[0], [2]] and places.usable.all()
    logprobs = torch.tensor([[[0.6, 0.1, 0.3]], [[0.2, 0.5, 0.3]]]).log()
    loss, top1 = conditional_quality(logprobs, places)
    assert top1 == [0.5] and loss == pytest.approx(-(places.model * logprobs).sum(-1).mean().item(), abs=1e-4)
    assert sum(part.nbytes for part in places) == 2 * row_bytes(2, 2)


@pytest.fixture(scope="module")
def chain() -> LlamaForCausalLM:
    """A model whose next token is decided by the one before it, and by nothing else."""
    model = make_llama().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    return model


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory, chain: LlamaForCausalLM) -> Path:
    """Its greedy answers, each a few tokens long, after every token there is."""
    file, lines = tmp_path_factory.mktemp("chain") / "answers.jsonl", []
    for token in torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0)).tolist():
        ids = chain.generate(torch.tensor([[1, token]]), do_sample=False, max_new_tokens=14)[0].tolist()
        lines.append(json.dumps({"p": ids[:2], "r": ids[2:], "t": 0}))
    file.write_text("\n".join(lines) + "\n")
    return file


def saved_heads(folder: Path, texts: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Heads that draft what the model says next, at every depth, of the texts' most frequent tokens."""
    values = {"hidden_size": 32, "vocab_size": VOCAB, "num_heads": 3, "num_layers": 2, "draft_vocab": 36, **changes}
    heads = CerberusHeads(CerberusConfig("tiny", **values))
    if heads.draft_vocab is not None:
        tokens = torch.tensor([token for line in texts.read_text().splitlines() for token in json.loads(line)["r"]])
        heads.draft_vocab.copy_(frequent_tokens(tokens, len(heads.draft_vocab), VOCAB))
    heads.bias.data.normal_(0, 1e-3, generator=torch.Generator().manual_seed(4))
    heads.config.accuracy, heads.config.paths = [[0.5], [0.25], [0.125]], [[0], [0, 0]]
    heads.to(dtype).save_pretrained(folder)
    return folder


def stage(heads: Path, data: Path, output: Path, **changes: Any) -> TrainOptions:
    values = {"steps": 120, "batch": 64, "warmup": 4, "lr": 2e-2, "held_out": 0.2, "eval_every": 40, **changes}
    return TrainOptions(output, data=data, init=str(heads), conditional_rank=8, only="conditional", **values)


def run(model: LlamaForCausalLM, asked: TrainOptions) -> dict[str, Any]:
    record = train(model, asked)
    assert record is not None
    return record


@pytest.mark.parametrize("changes", [{}, {"chained": False, "dtype": torch.float32}, {"anchor": "hidden"}])
def test_what_the_token_before_decides_is_learned(
    chain: LlamaForCausalLM, texts: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Heads that know no more than the hidden state cannot tell it; the heads themselves keep every bit."""
    heads = saved_heads(tmp_path / "heads", texts, **changes)
    record = run(chain, stage(heads, texts, tmp_path / "out"))
    first, last = record["curve"][0], record["curve"][-1]
    assert first["step"] == 0 and first["loss"] is None
    gains = [after - before for before, after in zip(*(p["conditional_top1"] for p in (first, last)), strict=True)]
    assert min(gains) > 0.25 and last["conditional_loss"] < 0.6 * first["conditional_loss"]
    assert record["lowest_conditional_loss"] == min(point["conditional_loss"] for point in record["curve"])
    drafts = ConditionalDrafts(32, 3, 8)
    assert record["trained_parameters"] == sum(parameter.numel() for parameter in drafts.parameters())

    before, after = (load_file(folder / "model.safetensors") for folder in (heads, tmp_path / "out"))
    new = {name for name in after if name.startswith("conditional.")}
    assert after.keys() - new == before.keys() and len(new) == 4
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {tensor.dtype for name, tensor in after.items() if name != "draft_vocab"} == {before["weight"].dtype}
    learned = load_file(tmp_path / "out" / "checkpoint.safetensors")["conditional.keys"] * last["key_share"]
    assert record["kept_step"] == last["step"] and last["key_share"] in KEY_SHARES
    assert torch.equal(after["conditional.keys"], learned.to(before["weight"].dtype))
    configs = [asdict(CerberusHeads.from_pretrained(folder).config) for folder in (heads, tmp_path / "out")]
    differing = {name for name in configs[0] if configs[0][name] != configs[1][name]}
    assert differing == {"conditional_rank", "lm_head_fingerprint", "base_model"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "stay as they are" in card and f"| {last['conditional_top1'][1]:.3f} |" in card


def test_a_stage_that_makes_nothing_better_changes_no_draft(
    chain: LlamaForCausalLM, texts: Path, tmp_path: Path
) -> None:
    record = run(chain, stage(saved_heads(tmp_path / "heads", texts), texts, tmp_path / "out", lr=1.0, steps=40))
    assert record["kept_step"] == 0
    kept = CerberusHeads.from_pretrained(tmp_path / "out").conditional
    assert kept is not None and not kept.keys.any() and not kept.rest.any() and (kept.slopes == 1).all()


def test_a_resumed_stage_ends_like_an_uninterrupted_one(
    chain: LlamaForCausalLM, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = saved_heads(tmp_path / "heads", texts)
    whole = run(chain, stage(heads, texts, tmp_path / "whole"))
    step = ConditionalTrainer.train_step

    def killed(self: ConditionalTrainer, drawn: Drawn) -> float:
        if self.step == 60:
            raise KeyboardInterrupt
        return step(self, drawn)

    monkeypatch.setattr(ConditionalTrainer, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(chain, stage(heads, texts, tmp_path / "parts"))
    monkeypatch.setattr(ConditionalTrainer, "train_step", step)
    parts = run(chain, stage(heads, texts, tmp_path / "parts"))
    curves = [[{**point, "seconds": 0} for point in record["curve"]] for record in (whole, parts)]
    assert curves[0] == curves[1] and len(curves[0]) == 4
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_windows_of_the_data_learn_as_well(
    chain: LlamaForCausalLM, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Where not all of what heads offer fits into memory."""
    monkeypatch.setattr(positions, "CHUNK_LINES", 8)
    asked = stage(saved_heads(tmp_path / "heads", texts), texts, tmp_path / "out", memory=300 * row_bytes(3, 32) / 1e9)
    record = run(chain, asked)
    assert record["curve"][-1]["conditional_loss"] < 0.8 * record["curve"][0]["conditional_loss"]
    assert "for what the heads offer" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{}, {"chained": False}])
def test_heads_learn_the_same_beside_conditional_drafts(
    llama: LlamaForCausalLM, answers: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    alone = run(llama, options(answers, tmp_path / "alone", **changes))
    both = run(llama, options(answers, tmp_path / "both", conditional_rank=4, **changes))
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("alone", "both")]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[0].items())
    assert weights[1]["conditional.keys"].any()
    for point, other in zip(alone["curve"], both["curve"], strict=True):
        assert point["top1"] == other["top1"] and point["tokens_per_step"] == other["tokens_per_step"]
        assert other["loss"] > point["loss"] and len(other["conditional_top1"]) == 2
    assert both["curve"][-1]["conditional_loss"] < both["curve"][0]["conditional_loss"]
    more = run(llama, options(answers, tmp_path / "more", conditional_rank=4, init=str(tmp_path / "both"), **changes))
    assert more["curve"][-1]["conditional_loss"] < both["curve"][-1]["conditional_loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"only": "heads"}, "only must be conditional or None, got 'heads'"),
        ({"init": None}, "only needs init"),
        ({"conditional_rank": None}, "only needs conditional_rank"),
        ({"conditional_rank": 0}, "conditional_rank must be >= 1, got 0"),
    ],
)
def test_options_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    values = {"data": tmp_path, "init": "heads", "only": "conditional", "conditional_rank": 4, **changes}
    with pytest.raises(ValueError, match=f"train: {message}"):
        TrainOptions(tmp_path, **values)


def test_what_is_usual_depends_on_what_is_trained(tmp_path: Path) -> None:
    heads, only = TrainOptions(tmp_path), TrainOptions(tmp_path, init="x", only="conditional", conditional_rank=4)
    assert (heads.steps, heads.batch, heads.lr, heads.warmup) == (4000, 256, 5e-4, 100)
    assert (only.steps, only.batch, only.lr, only.warmup) == (1600, 768, 2e-3, 50)


def test_heads_that_do_not_fit_the_options(chain: LlamaForCausalLM, texts: Path, tmp_path: Path) -> None:
    heads = saved_heads(tmp_path / "heads", texts)
    with pytest.raises(ValueError, match="train: layers must be that of init with only, 2, got 3"):
        train(chain, stage(heads, texts, tmp_path / "out", layers=3))
    run(chain, stage(heads, texts, tmp_path / "ranked", steps=1))
    asked = replace(stage(tmp_path / "ranked", texts, tmp_path / "out"), conditional_rank=4)
    with pytest.raises(ValueError, match="train: conditional_rank of init must be 4, got 8"):
        train(chain, asked)
    assert not (tmp_path / "out").exists()


def test_places_are_rows_of_one_kind() -> None:
    teacher, tokens, left, draft_index = a_segment_of_each_kind()
    offers = [(torch.zeros(30, 2, dtype=torch.int64), torch.full((30, 2), -1.0))] * 2
    places = places_of(offers, teacher, tokens, left, draft_index)
    some = places.rows(torch.tensor([4, 2]))
    assert isinstance(some, Places) and torch.equal(some.parents, places.parents[[4, 2]])


def test_keys_count_as_much_as_is_best_for_held_out_answers(
    chain: LlamaForCausalLM, texts: Path, tmp_path: Path
) -> None:
    """Twice as certain keys count half as much."""
    data, heads = read_answers([texts], VOCAB), saved_heads(tmp_path / "heads", texts)
    trainer = ConditionalTrainer(chain, data, of_init(stage(heads, texts, tmp_path / "out")), Processes(), {})
    keys, held = trainer.heads.conditional.keys, trainer.held_places
    keys.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    losses = [conditional_quality(logprobs, held)[0] for logprobs in trainer.weighed(held, KEY_SHARES)]
    found = trainer.conditional_quality(held)
    assert found["conditional_loss"] == min(losses) and found["key_share"] == KEY_SHARES[losses.index(min(losses))]
    assert found["key_share"] < 1.0
    half = trainer.weighed(held, (0.5,))[0]
    keys.data *= 0.5
    torch.testing.assert_close(trainer.weighed(held)[0], half)
