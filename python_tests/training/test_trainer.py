"""Runs of the trainer on a tiny model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny_llama import VOCAB, make_llama
from training_runs import options
from transformers import LlamaForCausalLM

from cerberus_ext.drafting.heads import CerberusConfig, CerberusHeads
from cerberus_ext.training import positions
from cerberus_ext.training.answers import read_answers
from cerberus_ext.training.curves import draw_curves
from cerberus_ext.training.options import TrainOptions
from cerberus_ext.training.processes import Processes
from cerberus_ext.training.train import train
from cerberus_ext.training.trainer import Trainer
from cerberus_ext.training.windows import Drawn

GB = 1e9


def trainer(llama: LlamaForCausalLM, answers: Path, output: Path, **changes: Any) -> Trainer:
    data = read_answers([answers], VOCAB)
    return Trainer(llama, data, options(answers, output, **changes), Processes(), {})


def curve(run: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Without the time it took."""
    assert run is not None
    return [{**point, "seconds": 0} for point in run["curve"]]


def run(llama: LlamaForCausalLM, answers: Path, output: Path, **changes: Any) -> dict[str, Any]:
    record = train(llama, options(answers, output, **changes))
    assert record is not None
    return record


def test_training_learns_and_is_recorded(
    tmp_path: Path, answers: Path, llama: LlamaForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    record = run(llama, answers, tmp_path, steps=100, lr=1e-2, base_model="someone/tiny")
    first, last = record["curve"][0], record["curve"][-1]
    assert last["loss"] < 0.8 * first["loss"]
    untrained = trainer(llama, answers, tmp_path)
    start = untrained.held_out.measure(untrained.read_all(untrained.held), untrained.states, 3)
    assert last["top1"][0] > start.top1[0] + 0.1
    assert record["best_tokens_per_step"] > start.tokens_per_step["32"]
    kept = [point for point in record["curve"] if point["step"] == record["kept_step"]]
    assert [point["tokens_per_step"]["32"] for point in kept] == [record["best_tokens_per_step"]]

    assert json.loads((tmp_path / "training.json").read_text()) == json.loads(json.dumps(record))
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json", "model.safetensors", "checkpoint.safetensors", "training.json", "curves.png", "README.md"
    }  # fmt: skip
    for name in ("training.json", "README.md", "config.json"):
        assert str(tmp_path) not in (tmp_path / name).read_text()
    heads = CerberusHeads.from_pretrained(tmp_path)
    assert heads.weight.dtype == torch.bfloat16 and heads.config.lm_head_fingerprint is not None
    assert heads.config.accuracy is not None and len(heads.config.accuracy) == 3
    assert heads.config.paths is not None and heads.config.paths[0] == [0]
    ids, _ = heads.bind(llama).draft(torch.randn(1, 32), torch.tensor([3]), drafts=4)
    assert ids.shape == (1, 3, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())

    stated = capsys.readouterr().out
    coverage = record["data"]["draft_vocab_coverage"]
    assert 0.5 < coverage["training"] < 1
    assert f"60 tokens cover {coverage['training']:.2%} of the training answers" in stated
    assert re.search(r"memory about [\d.]+ MB: model .*\n  time about \d+ s \([\d.e-]+ s per step", stated)
    assert re.search(r"and \d+ s for the hidden states of \d+ tokens", stated)


def test_the_model_card_is_one_for_the_hub(tmp_path: Path, answers: Path, llama: LlamaForCausalLM) -> None:
    record = run(llama, answers, tmp_path, steps=20, base_model="someone/tiny", chained=False)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "base_model": "someone/tiny", "library_name": "cerberus_ext", "pipeline_tag": "text-generation",
        "tags": ["speculative-decoding", "cerberus"],
    }  # fmt: skip
    assert "# Medusa-style heads for someone/tiny" in card.text
    assert "| tokens per step |" in card.text
    assert f" {record['curve'][-1]['top1'][0]:.3f} |" in card.text


def test_curves(tmp_path: Path) -> None:
    points = [
        {"step": step, "loss": 1 / step, "top1": [0.2, 0.1], "tokens_per_step": {"16": 1.5, "32": 1.6}}
        for step in (20, 40)
    ]
    for name, curve in (("two", points), ("one", points[:1]), ("none", [])):
        file = tmp_path / name / "curves.png"
        file.parent.mkdir()
        draw_curves(curve, file)
        assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("changes", [{"chained": False}, {"anchor": "hidden", "draft_vocab": 0}])
def test_the_other_kinds_of_heads_learn(
    tmp_path: Path, answers: Path, llama: LlamaForCausalLM, changes: dict[str, Any]
) -> None:
    points = run(llama, answers, tmp_path, **changes)["curve"]
    assert points[-1]["loss"] < points[0]["loss"]


def test_bfloat16_products_learn_the_same(tmp_path: Path, answers: Path, llama: LlamaForCausalLM) -> None:
    exact = run(llama, answers, tmp_path / "float32", lr=1e-2)
    half = make_llama().requires_grad_(False).bfloat16()
    half.load_state_dict(llama.state_dict())
    rounded = run(half, answers, tmp_path / "bfloat16", lr=1e-2)
    assert rounded["dtype"] == "bfloat16"
    for one, other in zip(curve(exact), curve(rounded), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05) and one["loss"] != other["loss"]
    stored = load_file(tmp_path / "bfloat16" / "checkpoint.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_a_resumed_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, answers: Path, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(llama, answers, tmp_path / "whole")
    step = Trainer.train_step

    def killed(self: Trainer, drawn: Drawn) -> float:
        if self.step == 30:
            raise KeyboardInterrupt
        return step(self, drawn)

    monkeypatch.setattr(Trainer, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(llama, answers, tmp_path / "parts")
    monkeypatch.setattr(Trainer, "train_step", step)
    assert curve(run(llama, answers, tmp_path / "parts")) == curve(whole)
    assert curve(run(llama, answers, tmp_path / "parts")) == curve(whole)  # nothing is left to do
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_rate_rises_and_follows_a_cosine(
    tmp_path: Path, answers: Path, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a killed run goes on. No step is made at a rate of zero."""
    rates: dict[int, float] = {}
    step = Trainer.train_step

    def watched(self: Trainer, drawn: Drawn) -> float:
        if self.step == 3 and 3 not in rates:
            rates[3] = 0.0
            raise KeyboardInterrupt
        rates[self.step] = self.optimizer.param_groups[0]["lr"]
        return step(self, drawn)

    monkeypatch.setattr(Trainer, "train_step", watched)
    changes = {"steps": 4, "warmup": 2, "eval_every": 3, "lr": 2e-3}
    with pytest.raises(KeyboardInterrupt):
        run(llama, answers, tmp_path, **changes)
    run(llama, answers, tmp_path, **changes)
    assert list(rates.values()) == pytest.approx([1e-3, 2e-3, 1.5e-3, 0.5e-3])


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "CHUNK_LINES", 4)


def test_windows_of_cached_and_of_recomputed_states_train_the_same_heads(
    tmp_path: Path, answers: Path, llama: LlamaForCausalLM, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    row_bytes = trainer(llama, answers, tmp_path).windows.row_bytes
    memory, held = 400 * row_bytes / GB, []
    together = Trainer.positions

    def watched(self: Trainer, drawn: Drawn) -> positions.Positions:
        data = together(self, drawn)
        held.append((drawn.epoch, drawn.number, len(data.tokens)))
        return data

    monkeypatch.setattr(Trainer, "positions", watched)
    fresh = run(llama, answers, tmp_path / "fresh", memory=memory)
    windows = [at for i, at in enumerate(held) if i == 0 or at != held[i - 1]]
    assert max(rows for *_, rows in held) <= 400 and len(windows) > 6 and windows[-1][0] > 1  # several epochs
    cached = run(llama, answers, tmp_path / "cached", memory=memory, cache=tmp_path / "states", cache_size=4e-5)
    assert 0 < sum(file.stat().st_size for file in (tmp_path / "states").glob("*.safetensors")) < 5e4
    assert curve(cached) == curve(fresh)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("fresh", "cached")]
    assert weights[0] == weights[1]


def test_nothing_is_computed_twice_where_all_fits(
    tmp_path: Path, answers: Path, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer(llama, answers, tmp_path, steps=200)
    assert made.source.computed == len(made.held_tokens)
    made.run()
    assert next(made.windows.drawn(199)).epoch > 3
    assert made.source.computed == len(made.tokens) + len(made.held_tokens)


def test_the_estimate_of_states_to_compute_is_what_is_computed(
    tmp_path: Path, answers: Path, llama: LlamaForCausalLM, small_chunks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    row_bytes = trainer(llama, answers, tmp_path).windows.row_bytes
    for memory, cache in ((1.0, None), (400 * row_bytes / GB, None), (400 * row_bytes / GB, 4e-5)):
        folder = tmp_path / f"{memory}{cache}"
        made = trainer(
            llama, answers, folder, memory=memory, cache=folder / "states" if cache else None, cache_size=cache
        )
        before = made.source.computed
        made.run()
        stated = re.search(r"for the hidden states of (\d+) tokens", capsys.readouterr().out)
        assert stated is not None and int(stated[1]) == made.source.computed - before > 0


def test_a_run_stops_when_it_gets_no_better(
    tmp_path: Path, answers: Path, llama: LlamaForCausalLM, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run(llama, answers, tmp_path, lr=1e-12, eval_every=2, patience=3)  # stays what it is
    assert [point["step"] for point in record["curve"]] == [2, 4, 6, 8]
    assert record["kept_step"] == 2 and record["steps"] == 8
    assert "stopped at step 8: no better heads in 3 measurements" in capsys.readouterr().out
    assert run(llama, answers, tmp_path, lr=1e-12, eval_every=2, patience=3)["steps"] == 8  # and stays stopped


@pytest.mark.parametrize("changes", [{}, {"layers": 3}, {"layers": 3, "draft_vocab": 30}, {"draft_vocab": 0}])
def test_trained_heads_can_be_trained_on(
    tmp_path: Path, answers: Path, llama: LlamaForCausalLM, changes: dict[str, int]
) -> None:
    """New layers change nothing at first, and so does another draft vocabulary."""
    run(llama, answers, tmp_path / "first", lr=1e-2)
    heads = CerberusHeads.from_pretrained(tmp_path / "first").float()
    more = trainer(llama, answers, tmp_path / "more", init=str(tmp_path / "first"), **changes)
    hidden, tokens = torch.randn(5, 32), torch.arange(5)
    assert heads.anchor_scale is not None
    anchor = llama.get_input_embeddings().weight[tokens] * heads.anchor_scale
    expected = heads(hidden, anchor).transpose(0, 1)
    torch.testing.assert_close(more.states(hidden, tokens).detach(), expected, rtol=1e-5, atol=1e-5)
    kept = more.heads.draft_vocab
    assert (len(kept) if kept is not None else 0) == changes.get("draft_vocab", 60)
    assert len(more.projection) == changes.get("draft_vocab", 60) or len(more.projection) == VOCAB
    more.run()
    assert more.curve[-1]["loss"] < run(llama, answers, tmp_path / "new", **changes)["curve"][-1]["loss"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_heads": 4}, "num_heads of init must be 3, got 4"),
        ({"anchor": "hidden"}, "anchor of init must be root, got hidden"),
        ({"chained": False}, "chained of init must be True, got False"),
        ({"num_layers": 3}, "num_layers of init must be at most 2, got 3"),
        ({"hidden_size": 16}, "hidden_size of init must be 32, got 16"),
        ({"vocab_size": 99}, "vocab_size of init must be 101, got 99"),
    ],
)
def test_heads_that_cannot_be_trained_on(
    tmp_path: Path, answers: Path, llama: LlamaForCausalLM, config: dict[str, Any], message: str
) -> None:
    values = {"hidden_size": 32, "vocab_size": VOCAB, "num_heads": 3, **config}
    CerberusHeads(CerberusConfig("tiny", **values)).save_pretrained(tmp_path / "heads")
    with pytest.raises(ValueError, match=f"train: {message}"):
        trainer(llama, answers, tmp_path, init=str(tmp_path / "heads"))


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, answers: Path, llama: LlamaForCausalLM) -> None:
    run(llama, answers, tmp_path, steps=2, eval_every=1)
    shutil.copytree(tmp_path, tmp_path / "trained")
    for changes, message in (
        ({"lr": 1e-3}, "lr must be 0.003 to continue checkpoint.safetensors .* got 0.001"),
        ({"init": str(tmp_path / "trained")}, "start must be .* to continue checkpoint.safetensors"),
    ):
        with pytest.raises(ValueError, match=f"train: {message}"):
            run(llama, answers, tmp_path, **{"steps": 2, "eval_every": 1, **changes})
    run(llama, answers, tmp_path, steps=2, eval_every=1, memory=2.0)  # all of it fits in any case


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, answers: Path, llama: LlamaForCausalLM) -> None:
    broken = trainer(llama, answers, tmp_path)
    broken.heads.bias.data[0, 0, 0] = float("nan")
    message = "train: loss must be finite, got nan at step 0; a lower lr than 0.003 may help"
    with pytest.raises(FloatingPointError, match=message):
        broken.run()
    assert torch.isnan(broken.heads.bias).sum() == 1 and not broken.heads.weight.any()  # not touched any more
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_a_gradient_that_is_no_number_ends_the_run(tmp_path: Path, answers: Path, llama: LlamaForCausalLM) -> None:
    broken = trainer(llama, answers, tmp_path)
    broken.heads.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match="train: the gradient's norm must be finite, got (inf|nan) at step 0"):
        broken.run()
    assert not broken.heads.weight.any()  # not touched any more


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 0}, "heads must be >= 1, got 0"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"rows": 0}, "rows must be >= 1, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"warmup": -1}, "warmup must be >= 0, got -1"),
        ({"patience": -1}, "patience must be >= 0, got -1"),
        ({"seed": -1}, "seed must be >= 0, got -1"),
        ({"batch": 12}, "batch must be a positive multiple of 8, got 12"),
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
        ({"clip": float("inf")}, "clip must be finite, got inf"),
        ({"lr": float("nan")}, "lr must be > 0, got nan"),
        ({"memory": 0}, "memory must be > 0, got 0"),
        ({"head_decay": -0.5}, "head_decay must be > 0, got -0.5"),
        ({"held_out": 1.0}, "held_out must be between 0 and 1, got 1.0"),
        ({"cache_size": 1.0}, "cache_size needs cache, the folder that it bounds"),
        ({"cache": Path("x"), "cache_size": 0.0}, "cache_size must be > 0, got 0.0"),
        ({"prompts": Path("x")}, "prompts must not be given together with data"),
        ({"tokens": 5}, "tokens must not be given together with data"),
        ({"data": None, "tokens": 0}, "tokens must be >= 1, got 0"),
    ],
)
def test_options_are_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"train: {message}"):
        TrainOptions(**{"output": tmp_path, "data": tmp_path / "data.jsonl", **changes})


def test_models_that_are_refused(tmp_path: Path, answers: Path) -> None:
    with pytest.raises(ValueError, match="train: model must be in evaluation mode, got one in training mode"):
        train(make_llama().train(), options(answers, tmp_path))
    with pytest.raises(ValueError, match="train: model must be float32 or bfloat16, got float16"):
        train(make_llama().half(), options(answers, tmp_path))


def test_what_does_not_fit_the_model_or_the_data(tmp_path: Path, answers: Path, llama: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="train: draft_vocab must be at most the vocabulary, 101, got 500"):
        train(llama, options(answers, tmp_path, draft_vocab=500))
    with pytest.raises(ValueError, match="train: data must have at least 2016 answer tokens before the held-out lines"):
        train(llama, options(answers, tmp_path, batch=2000))
    with pytest.raises(ValueError, match="train: memory must be at least .* GB, got 1e-06"):
        train(llama, options(answers, tmp_path, memory=1e-6))


def test_tiny_data_trains(tmp_path: Path, llama: LlamaForCausalLM) -> None:
    """Two lines, the held-out one of a single token: nothing to measure, and no reason to fail."""
    lines = [{"p": [1], "r": list(range(2, 30))}, {"p": [3], "r": [4]}]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = run(llama, file, tmp_path / "out", batch=8, steps=3, eval_every=2)
    assert [point["step"] for point in record["curve"]] == [2, 3]


def test_one_held_out_line_is_enough_to_tell_heads_apart(
    tmp_path: Path, answers: Path, llama: LlamaForCausalLM
) -> None:
    record = run(llama, answers, tmp_path, held_out=0.001, lr=1e-2)
    assert record["data"]["held_out_positions"] == 45 and record["best_tokens_per_step"] > 1


def test_processes_need_a_segment_each(tmp_path: Path, answers: Path, llama: LlamaForCausalLM) -> None:
    many = Processes()
    many.count = 9
    with pytest.raises(ValueError, match="train: batch must be >= 72 for 9 processes, got 64"):
        Trainer(llama, read_answers([answers], VOCAB), options(answers, tmp_path), many, {})
