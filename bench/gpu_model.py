"""The model that a GPU session decodes with, its heads and its prompts; and the ways to decode that it compares."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stage
import torch
from shapes import SHAPES
from torch import Tensor
from transformers import PreTrainedModel

import cerberus_ext
from cerberus_ext import AlwaysClosed, CerberusConfig, CerberusHeads, DecodeStats
from cerberus_ext.calibration.questions import OWN_QUESTIONS
from cerberus_ext.drafting.static_policy import default_tree
from cerberus_ext.io.default_model import FOLDER, cache_dir, load_model
from cerberus_ext.io.prompts import encode_chat, read_questions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python_tests" / "helpers"))
from tiny_llama import make_llama  # noqa: E402

TREES = (8, 16, 32, 64)
Way = Callable[[Tensor, int], tuple[Tensor, DecodeStats | None]]  # ids (1, S), new tokens -> text (1, S + new), stats


@dataclass
class Subject:
    """What is decoded with."""

    name: str
    has_targets: bool  # it is on a GPU, and as large as the model that targets.py is about
    model: PreTrainedModel
    heads: CerberusHeads
    medusa: CerberusHeads | None
    prompts: list[Tensor]  # (1, S) each


def load(arguments: Namespace, dtype: torch.dtype, prompts: int) -> Subject:
    """Raises stage.Skipped where there is no model: nothing is fetched here."""
    if arguments.device == "cpu" and arguments.model is None:
        return tiny(prompts)
    folder = Path(arguments.model or cache_dir() / FOLDER)
    if not folder.exists():
        raise stage.Skipped(f"there is no model in {folder.name}: give its folder as --model")
    model, tokenizer = load_model(folder, dtype, arguments.device)
    file = arguments.questions
    questions = OWN_QUESTIONS[::3][:prompts] if file is None else read_questions(file, prompts)
    return Subject(
        folder.name,
        arguments.device == "cuda" and model.config.get_text_config().hidden_size == SHAPES["135M"].hidden,
        model,
        CerberusHeads.from_pretrained(arguments.heads).to(dtype),
        None if arguments.medusa is None else CerberusHeads.from_pretrained(arguments.medusa).to(dtype),
        [encode_chat(tokenizer, question.turns[:1]).to(arguments.device) for question in questions],
    )


def tiny(prompts: int) -> Subject:
    """Random weights that only show that everything works."""
    model = make_llama()
    vocab, size = model.config.vocab_size, model.config.hidden_size
    numbers = torch.Generator().manual_seed(0)
    ids = [torch.randint(vocab, (1, 8 + i), generator=numbers) for i in range(prompts)]
    return Subject("tiny, random weights", False, model, random_heads(vocab, size), None, ids)


def random_heads(vocab: int, size: int, draft_vocab: int | None = None, **options: Any) -> CerberusHeads:
    """Heads that draft anything, nearly never what comes: what a step costs does not depend on what they draft."""
    heads = CerberusHeads(CerberusConfig("random weights", size, vocab, draft_vocab=draft_vocab, **options))
    with torch.no_grad():
        heads.weight.normal_(std=4 * (2 * size) ** -0.5)  # states that have little left of h
    return heads.eval().requires_grad_(False)


def generate(subject: Subject, **options: Any) -> Way:
    """transformers' own decoding."""

    def run(ids: Tensor, new: int) -> tuple[Tensor, None]:
        mask = torch.ones_like(ids)
        given = {"attention_mask": mask, "do_sample": False, "max_new_tokens": new, "pad_token_id": 0, **options}
        return subject.model.generate(ids, **given), None

    return run


def decode(model: PreTrainedModel, heads: CerberusHeads, device: str, nodes: int, graphs: bool) -> Way:
    """This project's loop, with a tree of so many nodes; 1: without drafts."""
    options: dict[str, Any] = {"gate": AlwaysClosed()} if nodes == 1 else {}
    if nodes > 1:
        options["tree"] = default_tree(heads, torch.device(device), nodes)
    if device == "cuda":
        options["graphs"] = graphs

    def run(ids: Tensor, new: int) -> tuple[Tensor, DecodeStats]:
        out = cerberus_ext.decode(model, heads, ids, max_new_tokens=new, **options)
        return out.sequences, out.stats

    return run


def our_ways(subject: Subject, device: str, graphs: bool, trees: tuple[int, ...] = TREES) -> dict[str, Way]:
    """Name -> our loop without drafts, and with trees of several sizes."""
    mode = "graphs" if graphs else "eager"
    everyone = {"cerberus": subject.heads, "medusa": subject.medusa}
    ways = {f"loop, {mode}": decode(subject.model, subject.heads, device, 1, graphs)}
    for nodes in trees:
        for name, heads in everyone.items():
            if heads is not None:
                ways[f"{name}, {mode}, {nodes} nodes"] = decode(subject.model, heads, device, nodes, graphs)
    return ways
