"""Heads whose drafts depend on the path: in `decode`, on their own, and trained."""

from __future__ import annotations

import copy
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from stand_ins import RandomGate
from tape import TapeRecorder
from tiny_llama import make_llama, tiny_llama
from tiny_models import generate, tiny_model

from cerberus_ext import AlwaysOpen, CerberusConfig, ConfidenceGate, StaticPolicy, decode
from cerberus_ext.runtime import graphs
from cerberus_ext.training.options import TrainOptions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "bench"))

import train_hydra  # noqa: E402
from hydra import HydraHeads  # noqa: E402

VOCAB = 101
NEW = 24
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
TREES = {
    "chain": StaticPolicy.chain(3),
    "one": StaticPolicy.chain(1),
    "best first": StaticPolicy.from_accuracies([[0.6, 0.3], [0.5, 0.2], [0.9, 0.1]], 12),  # not in the order of depth
    "wide": StaticPolicy.from_widths([4, 3, 2]),
}


def hydra(draft_vocab: int | None = None, std: float = 0.05) -> HydraHeads:
    torch.manual_seed(1)
    heads = HydraHeads(CerberusConfig("tiny", 32, VOCAB, num_heads=3, num_layers=2, draft_vocab=draft_vocab))
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.normal_(std=std)
    return heads.requires_grad_(False)


@pytest.mark.parametrize("draft_vocab", [None, 70])
@pytest.mark.parametrize("gate", [AlwaysOpen, RandomGate])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
def test_the_text_is_that_of_generate(name: str, tree: str, gate: type, draft_vocab: int | None) -> None:
    model = tiny_model(name)
    out = decode(model, hydra(draft_vocab), IDS, max_new_tokens=NEW, tree=TREES[tree], gate=gate())
    assert out.sequences.tolist() == generate(model, IDS, max_new_tokens=NEW).tolist()
    assert out.stats.open_steps > 0


def test_drafts_are_accepted() -> None:
    """Zero heads draft again what the target model has just said, which a model that repeats itself does say."""
    model = copy.deepcopy(tiny_llama())
    with torch.no_grad():
        for layer in model.model.layers:  # without them the next token depends on the last one only
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)  # and is the same one
    config = CerberusConfig("tiny", 32, VOCAB, num_heads=3)
    out = decode(model, HydraHeads(config), IDS, max_new_tokens=NEW, tree=StaticPolicy.chain(3))
    assert out.sequences.tolist() == generate(model, IDS, max_new_tokens=NEW).tolist()
    assert out.stats.tokens_per_step > 3


@pytest.mark.parametrize("draft_vocab", [None, 70])
@pytest.mark.parametrize("tree", TREES)
def test_every_node_follows_from_its_own_path(tree: str, draft_vocab: int | None) -> None:
    model, heads = tiny_llama(), hydra(draft_vocab, std=0.3)
    shape = TREES[tree]
    hidden, root = torch.randn(2, 32), torch.tensor([5, 77])
    tokens = heads.bind(model).draft_tree(hidden, root, shape)
    embeddings, projection = model.get_input_embeddings().weight, model.lm_head.weight[: draft_vocab or VOCAB]
    for row in range(2):
        found = [[int(root[row])]]  # the tokens along the path to each node
        for node in range(1, shape.size):
            path = found[shape.parents[node]]
            state = heads.state(len(path) - 1, hidden[row], embeddings[path], torch.float32)
            found.append([*path, int((projection @ state).argsort(descending=True)[shape.ranks[node]])])
        assert tokens[row].tolist() == [path[-1] for path in found]


def test_a_gate_that_wants_probabilities_is_refused() -> None:
    gate = ConfidenceGate({1: 1.0, 65: 2.0})
    with pytest.raises(ValueError, match="gate must not choose by the drafts' probabilities with these heads"):
        decode(tiny_llama(), hydra(), IDS, max_new_tokens=NEW, tree=TREES["wide"], gate=gate)
    assert decode(tiny_llama(), hydra(), IDS, max_new_tokens=NEW).stats.open_steps > 0  # the model is as it was


def test_steps_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(graphs.RECORDERS, "cpu", lambda device: TapeRecorder())
    model = make_llama()
    out = decode(model, hydra(), IDS, max_new_tokens=NEW)
    assert out.sequences.tolist() == generate(model, IDS, max_new_tokens=NEW).tolist()
    assert out.stats.graphed_steps == 0 and "draft along the paths" in (out.stats.fallback or "")
    with pytest.raises(ValueError, match="graphs must be None or False here, got True: the heads draft along the"):
        decode(model, hydra(), IDS, max_new_tokens=NEW, graphs=True)


def test_saved_and_loaded(tmp_path: Path) -> None:
    heads = hydra(70).to(torch.bfloat16)
    heads.save(tmp_path)
    loaded = HydraHeads.load(tmp_path)
    assert loaded.config == heads.config and loaded.first_bias.dtype == torch.bfloat16
    for name, tensor in heads.state_dict().items():
        assert loaded.state_dict()[name].equal(tensor)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a folder with Hydra-like heads"):
        HydraHeads.load(tmp_path)


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="HydraHeads.bind: the heads are for hidden_size 32, the model has 48"):
        hydra().bind(make_llama(hidden_size=48))


def test_following_tokens() -> None:
    expected = [[1, 2, 3], [2, 3, 4], [3, 4, 4], [4, 4, 4]]
    assert train_hydra.following(torch.tensor([1, 2, 3, 4]), 3).tolist() == expected


def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a token decides the next one, heads that see the path learn to draft it; and a run goes on."""
    draw = random.Random(0)
    lines = []
    for _ in range(60):
        answer = [draw.randrange(VOCAB)]
        while len(answer) < 16:
            answer.append((answer[-1] * 3 + 1) % VOCAB)
        lines.append(json.dumps({"p": [1, 2], "r": answer}) + "\n")
    (tmp_path / "data.jsonl").write_text("".join(lines))
    monkeypatch.setattr(train_hydra, "load_model", lambda *arguments: (make_llama(), None))
    command = ["train_hydra.py", "--data", str(tmp_path / "data.jsonl"), "--model", "tiny"]
    command += ["--heads", "3", "--draft-vocab", "0", "--batch", "64", "--lr", "0.01", "--device", "cpu"]
    command += ["--steps", "40", "--eval-every", "20"]
    for name, killed in (("whole", False), ("parts", True), ("parts", False)):
        monkeypatch.setattr(sys, "argv", [*command, "--output", str(tmp_path / name)])
        if killed:
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(train_hydra.HydraTrainer, "train_step", until(30))
                train_hydra.main()
        else:
            train_hydra.main()
    whole, parts = (HydraHeads.load(tmp_path / name) for name in ("whole", "parts"))
    for name, tensor in whole.state_dict().items():
        assert parts.state_dict()[name].equal(tensor), name
    curve = json.loads((tmp_path / "whole" / "training.json").read_text())["curve"]
    assert curve[-1]["loss"] < 0.8 * curve[0]["loss"]
    assert not (tmp_path / "whole" / "README.md").exists() and whole.config.paths
    model = make_llama()
    out = decode(model, whole, IDS, max_new_tokens=NEW)
    assert out.sequences.tolist() == generate(model, IDS, max_new_tokens=NEW).tolist()


def until(steps: int):
    """A train_step that is interrupted after so many."""
    original = train_hydra.HydraTrainer.train_step

    def train_step(self: train_hydra.HydraTrainer) -> float:
        if self.step == steps:
            raise KeyboardInterrupt
        return original(self)

    return train_step


def test_states_in_training_are_those_of_the_draft(tmp_path: Path) -> None:
    """Head k sees the text's tokens, as it sees the drafts of a path that is right."""
    model, heads = tiny_llama(), hydra(std=0.3)
    trainer = train_hydra.HydraTrainer.__new__(train_hydra.HydraTrainer)
    trainer.options, trainer.device, trainer.dtype = TrainOptions(tmp_path, heads=3), torch.device("cpu"), torch.float32
    trainer.heads, trainer.embeddings = heads, model.get_input_embeddings().weight.detach()
    hidden, root = torch.randn(1, 32), torch.tensor([5])
    path = heads.bind(model).draft_tree(hidden, root, StaticPolicy.chain(3))[0]  # root and three drafts
    states = trainer.states(hidden, path[None, :3])
    drafted = (states[:, 0] @ model.lm_head.weight.T).argmax(-1)
    assert drafted.tolist() == path[1:].tolist()
