"""The trainer: its data, its loss, its measurements, and runs on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_llama import VOCAB, make_llama
from transformers import LlamaForCausalLM

from cerberus_ext import reference
from cerberus_ext.heads import CerberusHeads
from cerberus_ext.simulate import ABSENT, best_paths, conditional_accuracy, tokens_per_step
from cerberus_ext.train import train
from cerberus_ext.training import data as data_module
from cerberus_ext.training.data import load_training_data, read_answers
from cerberus_ext.training.distill import distillation, frequent_tokens, head_states, learning_rate
from cerberus_ext.training.trainer import Trainer, TrainOptions


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    """A model whose next token depends mostly on the current one, so that there is something to learn."""
    model = make_llama().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.03)
        layer.mlp.down_proj.weight.mul_(0.03)
    return model


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, llama: LlamaForCausalLM) -> Path:
    """40 greedy answers of the tiny llama, of 6 to 45 tokens."""
    file = tmp_path_factory.mktemp("answers") / "answers.jsonl"
    draw = torch.Generator().manual_seed(0)
    lines = []
    for number in range(40):
        prompt = torch.randint(VOCAB, (1, 3 + number % 4), generator=draw)
        ids = llama.generate(prompt, do_sample=False, max_new_tokens=6 + number)[0].tolist()
        lines.append({"p": ids[: prompt.shape[1]], "r": ids[prompt.shape[1] :], "t": 0})
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    return file


def options(answers: Path, output: Path, **changes: object) -> TrainOptions:
    values = {
        "draft_vocab": 60,
        "heads": 3,
        "steps": 40,
        "batch": 64,
        "warmup": 4,
        "lr": 3e-3,
        "held_out": 0.1,
    }
    return TrainOptions(answers, output, **{**values, "eval_every": 20, **changes})  # type: ignore[arg-type]


# ---------------------------------------------------------------- the step


@pytest.mark.parametrize("chained", [True, False])
def test_head_states_equal_the_reference(chained: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, 16, 32 if chained else 16, generator=draw) * 0.3
    bias = torch.randn(3, 4, 16, generator=draw)
    hidden, anchor = torch.randn(2, 5, 16, generator=draw)
    expected = reference.head_stack(hidden, anchor, weight, bias).transpose(0, 1)
    torch.testing.assert_close(head_states(hidden, anchor, weight, bias), expected, rtol=1e-4, atol=1e-4)


def test_distillation_is_the_kl_divergence_and_its_gradient() -> None:
    draw = torch.Generator().manual_seed(0)
    heads, segments, width, size, vocab = 3, 2, 4, 8, 11
    states = torch.randn(
        heads, segments * width, size, generator=draw, dtype=torch.float64, requires_grad=True
    )
    projection = torch.randn(vocab, size, generator=draw, dtype=torch.float64)
    teacher = torch.randn(segments, width + heads - 1, vocab, generator=draw, dtype=torch.float64)
    left = torch.tensor([[9, 8, 7, 6], [2, 1, 0, 5]])
    expected = torch.zeros((), dtype=torch.float64)
    for k in range(heads):
        student = (states[k] @ projection.T).log_softmax(-1).view(segments, width, vocab)
        target = teacher[:, k : k + width].log_softmax(-1)
        divergence = F.kl_div(student, target, reduction="none", log_target=True).sum(-1)
        expected = expected + 0.8**k * divergence[left > k].mean()
    expected.backward()
    loss, gradient = distillation(states.detach(), projection, teacher, left, 0.8)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, states.grad)


def test_distillation_without_any_position_is_zero() -> None:
    loss, gradient = distillation(
        torch.ones(2, 4, 3), torch.ones(5, 3), torch.ones(1, 5, 5), torch.zeros(1, 4, dtype=torch.int64), 0.8
    )
    assert loss == 0 and not gradient.any()


def test_learning_rate() -> None:
    rates = [learning_rate(step, steps=100, warmup=10, peak=2.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0) and rates[100] == pytest.approx(0.0)


def test_frequent_tokens() -> None:
    tokens = torch.tensor([5, 5, 5, 2, 2, 7, 7, 9])
    assert frequent_tokens(tokens, 3, 12).tolist() == [2, 5, 7]
    assert frequent_tokens(tokens, 6, 12).tolist() == [0, 1, 2, 5, 7, 9]  # never seen: the lowest ids


# ---------------------------------------------------------------- measurements

# Guess ranks of two heads at seven positions of one text; A: absent.
A = ABSENT
RANKS = [[0, 0], [0, 1], [1, A], [0, 0], [A, 0], [2, 0], [0, A]]


def test_best_paths() -> None:
    assert best_paths(RANKS, 9, guesses=2) == [(0,), (0, 0), (1,), (0, 1)]
    assert best_paths(RANKS, 9, guesses=3) == [(0,), (0, 0), (1,), (2,), (0, 1), (2, 0)]
    assert best_paths(RANKS, 2, guesses=3) == [(0,), (0, 0)]


def test_tokens_per_step() -> None:
    # Step at 0 accepts both and goes on at 3, which accepts both and ends at 6, the last: 6 tokens, 2 steps.
    assert tokens_per_step([RANKS], [(0,), (0, 0)]) == 3.0
    # A chain of one: 0 -> 2, 2 -> 3, 3 -> 5, 5 -> 6.
    assert tokens_per_step([RANKS], [(0,)]) == 1.5
    assert tokens_per_step([RANKS], []) == 1.0
    assert tokens_per_step([RANKS, RANKS[:3]], [(0,), (0, 0)]) == 8 / 3


def test_conditional_accuracy() -> None:
    table = conditional_accuracy(RANKS, [(0,)], guesses=2)
    assert table[0] == [round(4 / 7, 6), round(1 / 7, 6)]
    assert table[1] == [0.5, 0.25]  # of the four positions where head 1's best guess was right


# ---------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: must be JSON, got '{'"),
        ("[1]", "line 2: must be an object, got list"),
        ('{"p": [1]}', 'line 2: "r" must be a list of at least one token id, got None'),
        ('{"p": [], "r": [1]}', r'line 2: "p" must be a list of at least one token id, got \[\]'),
        ('{"p": [1], "r": [101]}', r'line 2: "r" must hold ids in 0..100, got 101'),
        ('{"p": [1, true], "r": [1]}', r'line 2: "p" must hold ids in 0..100, got True'),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(f'{{"p": [1], "r": [2]}}\n{line}\n')
    with pytest.raises(ValueError, match=f"train: data.jsonl {message}"):
        read_answers(file, VOCAB)


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="train: data.jsonl must have at least one line, got none"):
        read_answers(tmp_path / "data.jsonl", VOCAB)


def test_hidden_states_are_the_ones_that_produce_the_answer(
    tmp_path: Path, answers: Path, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "SHARD_LINES", 16)
    monkeypatch.setattr(
        data_module, "FORWARD_TOKENS", 90
    )  # several lines a forward, several forwards a shard
    data = load_training_data(llama, answers, tmp_path)
    assert sorted(file.name for file in tmp_path.glob("*.safetensors")) == [
        f"hidden-{number:05d}.safetensors" for number in range(3)
    ]
    lines = read_answers(answers, VOCAB)
    assert data.tokens.tolist() == [token for line in lines for token in line.answer]
    assert data.left.tolist() == [left for line in lines for left in reversed(range(len(line.answer)))]
    assert data.lines.tolist() == [number for number, line in enumerate(lines) for _ in line.answer]
    for number in (0, 17, 39):
        ids = torch.tensor([lines[number].prompt + lines[number].answer])
        first = len(lines[number].prompt) - 1
        with torch.no_grad():
            expected = llama.model(ids).last_hidden_state[0, first:-1]
        torch.testing.assert_close(data.hidden[data.lines == number].float(), expected, rtol=0.02, atol=0.02)


def test_cached_states_are_used_and_missing_ones_computed(
    tmp_path: Path, answers: Path, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "SHARD_LINES", 16)
    data = load_training_data(llama, answers, tmp_path)
    kept = (tmp_path / "hidden-00000.safetensors").stat().st_mtime_ns
    (tmp_path / "hidden-00001.safetensors").unlink()
    again = load_training_data(llama, answers, tmp_path)
    assert torch.equal(again.hidden, data.hidden)
    assert (tmp_path / "hidden-00000.safetensors").stat().st_mtime_ns == kept


def test_a_cache_of_something_else_is_refused(tmp_path: Path, answers: Path, llama: LlamaForCausalLM) -> None:
    load_training_data(llama, answers, tmp_path / "cache")
    other = tmp_path / "other.jsonl"
    other.write_text(answers.read_text() + '{"p": [1], "r": [2]}\n')
    with pytest.raises(ValueError, match="train: data_sha256 of the cached hidden states must be "):
        load_training_data(llama, other, tmp_path / "cache")


def test_states_without_a_record_are_checked(tmp_path: Path, answers: Path, llama: LlamaForCausalLM) -> None:
    load_training_data(llama, answers, tmp_path)
    (tmp_path / "cache.json").unlink()
    load_training_data(llama, answers, tmp_path)
    assert (tmp_path / "cache.json").exists()

    (tmp_path / "cache.json").unlink()
    shard = tmp_path / "hidden-00000.safetensors"
    hidden = data_module.load_file(shard)["hidden"]
    data_module.write_shard(shard, hidden.flip(0).contiguous())
    with pytest.raises(ValueError, match="hidden-00000.safetensors has no cache.json and does not hold"):
        load_training_data(llama, answers, tmp_path)


# ---------------------------------------------------------------- runs


def test_training_learns_and_is_recorded(tmp_path: Path, answers: Path, llama: LlamaForCausalLM) -> None:
    before = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    record = train(llama, options(answers, tmp_path, steps=100, lr=1e-2))
    first, last = record["curve"][0], record["curve"][-1]
    assert last["loss"] < 0.8 * first["loss"]
    untrained = Trainer(
        llama, load_training_data(llama, answers, tmp_path / "hidden"), options(answers, tmp_path)
    )
    start = untrained.held_out.measure(untrained.states, 3)
    assert last["top1"][0] > start.top1[0] + 0.1
    assert record["best_tokens_per_step"] > start.tokens_per_step["32"]
    kept = [point for point in record["curve"] if point["step"] == record["kept_step"]]
    assert [point["tokens_per_step"]["32"] for point in kept] == [record["best_tokens_per_step"]]

    assert json.loads((tmp_path / "training.json").read_text()) == json.loads(json.dumps(record))
    assert str(tmp_path) not in (tmp_path / "training.json").read_text()
    heads = CerberusHeads.from_pretrained(tmp_path)
    assert heads.weight.dtype == torch.bfloat16 and heads.config.lm_head_fingerprint is not None
    assert heads.config.accuracy is not None and len(heads.config.accuracy) == 3
    assert heads.config.paths is not None and heads.config.paths[0] == [0]
    ids, _ = heads.bind(llama).draft(torch.randn(1, 32), torch.tensor([3]), guesses=4)
    assert ids.shape == (1, 3, 4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama.state_dict().items())


@pytest.mark.parametrize("changes", [{"chained": False}, {"anchor": "hidden", "draft_vocab": 0}])
def test_the_other_kinds_of_heads_learn(
    tmp_path: Path, answers: Path, llama: LlamaForCausalLM, changes: dict
) -> None:
    curve = train(llama, options(answers, tmp_path, **changes))["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_a_resumed_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, answers: Path, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hidden"
    whole = train(llama, options(answers, tmp_path / "whole", cache=cache))

    step = Trainer.train_step

    def killed(self: Trainer) -> float:
        if self.step == 30:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Trainer, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(llama, options(answers, tmp_path / "parts", cache=cache))
    monkeypatch.setattr(Trainer, "train_step", step)
    parts = train(llama, options(answers, tmp_path / "parts", cache=cache))

    without_time = [[{**point, "seconds": 0} for point in run["curve"]] for run in (whole, parts)]
    assert without_time[0] == without_time[1]
    files = [tmp_path / run / "model.safetensors" for run in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_checkpoint_of_another_run_is_refused(
    tmp_path: Path, answers: Path, llama: LlamaForCausalLM
) -> None:
    train(llama, options(answers, tmp_path, steps=2, eval_every=1))
    with pytest.raises(
        ValueError, match="train: lr must be 0.003 to continue checkpoint.safetensors .* got 0.001"
    ):
        train(llama, options(answers, tmp_path, steps=2, eval_every=1, lr=1e-3))


def test_a_loss_that_is_no_number_ends_the_run(
    tmp_path: Path, answers: Path, llama: LlamaForCausalLM
) -> None:
    data = load_training_data(llama, answers, tmp_path / "hidden")
    trainer = Trainer(llama, data, options(answers, tmp_path))
    trainer.heads.bias.data[0, 0, 0] = float("nan")
    with pytest.raises(
        FloatingPointError, match="train: loss must be finite, got nan at step 0; a lower lr than 0.003"
    ):
        trainer.run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 0}, "heads must be >= 1, got 0"),
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"warmup": -1}, "warmup must be >= 0, got -1"),
        ({"batch": 12}, "batch must be a positive multiple of 8, got 12"),
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
        ({"head_decay": -0.5}, "head_decay must be > 0, got -0.5"),
        ({"held_out": 1.0}, "held_out must be between 0 and 1, got 1.0"),
    ],
)
def test_options_are_checked(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"train: {message}"):
        options(tmp_path / "data.jsonl", tmp_path, **changes)


def test_a_model_in_training_mode_is_refused(tmp_path: Path, answers: Path) -> None:
    with pytest.raises(ValueError, match="train: model must be in evaluation mode, got one in training mode"):
        train(make_llama().train(), options(answers, tmp_path))


def test_what_does_not_fit_the_model_or_the_data(
    tmp_path: Path, answers: Path, llama: LlamaForCausalLM
) -> None:
    with pytest.raises(ValueError, match="train: draft_vocab must be at most the vocabulary, 101, got 500"):
        train(llama, options(answers, tmp_path, draft_vocab=500))
    with pytest.raises(
        ValueError, match="train: data must have at least 2016 answer tokens before the held-out lines"
    ):
        train(llama, options(answers, tmp_path, batch=2000))
