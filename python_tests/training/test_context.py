"""The context layer with a gradient: it computes what decoding does, wherever the positions were drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_llama import VOCAB
from training_runs import options
from transformers import LlamaForCausalLM

from cerberus_ext import decode
from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.heads import CerberusHeads
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.runtime.runtime import runtime_of
from cerberus_ext.training.answers import read_answers
from cerberus_ext.training.options import SEGMENT
from cerberus_ext.training.processes import Processes
from cerberus_ext.training.train import train
from cerberus_ext.training.trainer import Trainer
from cerberus_ext.training.windows import Drawn


@pytest.fixture
def trainer(tmp_path: Path, answers: Path, llama: LlamaForCausalLM) -> Trainer:
    """With a context layer that does something."""
    made = Trainer(llama, read_answers([answers], VOCAB), run(answers, tmp_path), Processes(), {})
    generator = torch.Generator().manual_seed(3)
    assert made.heads.context is not None
    with torch.no_grad():
        for parameter in made.heads.context.parameters():
            parameter.normal_(0, 0.2, generator=generator)
    return made


def run(answers: Path, output: Path, **changes: object):  # type: ignore[no-untyped-def]
    return options(answers, output, context_layer=True, **changes)


def test_training_reads_what_decoding_reads(trainer: Trainer, llama: LlamaForCausalLM) -> None:
    data = trainer.held
    context = trainer.heads.requires_grad_(False).bind(llama).context
    assert context is not None
    context = context.like(context.tensors)  # not in eight bits
    read, compared = trainer.read_all(data), 0
    for line in data.lines.unique().tolist():
        rows = (data.lines == line).nonzero()[:, 0]
        in_answer = torch.isin(data.answers, rows)
        hidden, tokens = data.hidden[rows].float(), data.tokens[rows]
        prompt, count = len(rows) - int(in_answer.sum()), int(in_answer.sum())
        led_to = torch.cat([hidden[1:], hidden[-1:]])[None, :prompt]
        runtime = runtime_of(llama)
        with torch.inference_mode(), runtime.sole(), runtime.target(len(rows) + 8, context=True) as base:
            base.prefill(tokens[None, :prompt])
            context.keep_prompt(base.cache, led_to, tokens[None, :prompt])
            chain = StaticPolicy.chain(count - 1).tree.on(torch.device("cpu"))
            found = context.read(base.cache, hidden[None, prompt:], tokens[None, prompt:], chain)[0]
        torch.testing.assert_close(read[in_answer], found, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, hidden[prompt:], atol=0.1)
        compared += count
    assert compared == len(data.answers)


def test_a_step_reads_what_a_measurement_reads(trainer: Trainer) -> None:
    """Also where a segment begins in one answer and ends in the next, whose prompt lies between."""
    data = trainer.positions(next(trainer.windows.drawn(0)))
    starts = torch.arange(0, len(data.answers) - SEGMENT, 3)
    batch = trainer.cut(data, starts)
    assert batch.reach is not None
    places = starts[:, None] + torch.arange(SEGMENT)
    assert (data.lines[data.answers[places[:, 0]]] != data.lines[data.answers[places[:, -1]]]).any()
    with torch.no_grad():
        found = trainer.read(batch.reach)
    torch.testing.assert_close(found, trainer.read_all(data)[places.flatten()], rtol=1e-5, atol=1e-5)


def test_new_heads_draft_what_heads_without_a_context_layer_do(
    tmp_path: Path, answers: Path, llama: LlamaForCausalLM
) -> None:
    data = read_answers([answers], VOCAB)
    made = Trainer(llama, data, run(answers, tmp_path), Processes(), {})
    plain = Trainer(llama, data, options(answers, tmp_path), Processes(), {})
    assert torch.equal(made.read_all(made.held).bfloat16(), plain.read_all(plain.held))


def test_trained_heads_decode(tmp_path: Path, answers: Path, llama: LlamaForCausalLM) -> None:
    """What a run saves has learned something, is loaded again, and changes no text."""
    record = train(llama, run(answers, tmp_path, steps=60, eval_every=30))
    assert record is not None
    heads = CerberusHeads.from_pretrained(tmp_path)
    assert heads.context is not None and heads.context.output.abs().max() > 1e-3
    assert heads.context.qkv.dtype == torch.bfloat16
    ids = torch.tensor([[5, 17, 3, 40]])
    expected = llama.generate(ids, do_sample=False, max_new_tokens=60)
    for tree in (StaticPolicy.from_widths([3, 2, 1]), DynamicPolicy(12)):
        out = decode(llama, heads, ids, max_new_tokens=60, tree=tree, proposers=None)
        assert torch.equal(out.sequences, expected)
        assert out.stats.tokens_per_step > 1.2


def test_a_killed_run_ends_with_the_same_heads(
    tmp_path: Path, answers: Path, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (run(answers, tmp_path / name, steps=20, eval_every=10) for name in ("whole", "parts"))
    train(llama, whole)
    step = Trainer.train_step

    def killed(self: Trainer, drawn: Drawn) -> float:
        if self.step == 11:
            raise KeyboardInterrupt
        return step(self, drawn)

    monkeypatch.setattr(Trainer, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(llama, parts)
    monkeypatch.setattr(Trainer, "train_step", step)
    train(llama, parts)
    one, other = (CerberusHeads.from_pretrained(made.output).state_dict() for made in (whole, parts))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_cache_of_hidden_states_serves_again(tmp_path: Path, answers: Path, llama: LlamaForCausalLM) -> None:
    """And not for heads without a context layer, for which it has too many rows."""
    folder = tmp_path / "cache"
    data = read_answers([answers], VOCAB)
    first = Trainer(llama, data, run(answers, tmp_path / "1", cache=folder), Processes(), {})
    second = Trainer(llama, data, run(answers, tmp_path / "2", cache=folder), Processes(), {})
    assert first.source.computed > 0 and second.source.computed == 0
    assert torch.equal(first.held.hidden, second.held.hidden)
    with pytest.raises(ValueError, match="prompts must be True to use the hidden states in .*, got False"):
        Trainer(llama, data, options(answers, tmp_path / "3", cache=folder), Processes(), {})


def test_heads_without_a_root_have_no_context_layer(tmp_path: Path, answers: Path) -> None:
    for changes in ({"anchor": "hidden"}, {"chained": False}):
        with pytest.raises(ValueError, match="train: context_layer must be False"):
            run(answers, tmp_path, **changes)
