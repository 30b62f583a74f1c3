"""The model that a GPU session decodes with, its heads and its prompts; and the ways to decode that it compares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import stage
import torch
from shapes import SHAPES
from timing import tried
from tiny_llama import make_llama
from torch import Tensor
from transformers import PreTrainedModel

from cerberus_ext import AlwaysClosed, CerberusConfig, CerberusHeads, Decoder, DecodeStats
from cerberus_ext.calibration.questions import OWN_QUESTIONS
from cerberus_ext.drafting.static_policy import default_tree
from cerberus_ext.evaluation.timing import timed
from cerberus_ext.evaluation.ways import DecodeWay, GenerateWay
from cerberus_ext.io.default_model import FOLDER, cache_dir, load_model
from cerberus_ext.io.prompts import encode_chat, read_questions

TREES = (8, 16, 32, 64)
GENERATE = "generate"
AnyWay = DecodeWay | GenerateWay


@dataclass
class Subject:
    """What is decoded with."""

    name: str
    has_targets: bool  # it is on a GPU, and as large as the model that targets.py is about
    model: PreTrainedModel
    heads: CerberusHeads
    medusa: CerberusHeads | None
    prompts: list[Tensor]  # (1, S) each


def load(run: stage.Stage, dtype: torch.dtype, prompts: int) -> Subject:
    """Raises stage.Skipped where there is no model: nothing is fetched here."""
    arguments = run.arguments
    if run.on_cpu and arguments.model is None:
        return tiny(prompts, dtype)
    folder = Path(arguments.model or cache_dir() / FOLDER)
    if not folder.exists():
        raise stage.Skipped(f"there is no model in {folder.name}: give its folder as --model")
    model, tokenizer = load_model(folder, dtype, arguments.device)
    file = arguments.questions
    ours = OWN_QUESTIONS[::3] if prompts <= len(OWN_QUESTIONS) // 3 else OWN_QUESTIONS  # of each kind, or all
    questions = ours[:prompts] if file is None else read_questions(file, prompts)
    return Subject(
        folder.name,
        not run.on_cpu and model.config.get_text_config().hidden_size == SHAPES["135M"].hidden,
        model,
        CerberusHeads.from_pretrained(arguments.heads).to(dtype),
        None if arguments.medusa is None else CerberusHeads.from_pretrained(arguments.medusa).to(dtype),
        [encode_chat(tokenizer, question.turns[:1]).to(arguments.device) for question in questions],
    )


def tiny(prompts: int, dtype: torch.dtype = torch.float32) -> Subject:
    """Random weights that only show that everything works."""
    model = make_llama().to(dtype)
    vocab, size = model.config.vocab_size, model.config.hidden_size
    numbers = torch.Generator().manual_seed(0)
    ids = [torch.randint(vocab, (1, 8 + i), generator=numbers) for i in range(prompts)]
    return Subject("tiny, random weights", False, model, random_heads(vocab, size).to(dtype), None, ids)


def random_heads(vocab: int, size: int, draft_vocab: int | None = None, **options: Any) -> CerberusHeads:
    """Heads that draft anything, nearly never what comes: what a step costs does not depend on what they draft."""
    heads = CerberusHeads(CerberusConfig("random weights", size, vocab, draft_vocab=draft_vocab, **options))
    with torch.no_grad():
        heads.weight.normal_(std=4 * (2 * size) ** -0.5)  # states that have little left of h
    return heads.eval().requires_grad_(False)


def our_way(name: str, model: PreTrainedModel, heads: CerberusHeads, nodes: int, graphs: bool) -> DecodeWay:
    """This project's loop, with a tree of so many nodes; 1: without drafts."""
    options: dict[str, Any] = {"tree": default_tree(heads, model.device, nodes)} if nodes > 1 else {}
    if nodes == 1:
        options["gate"] = AlwaysClosed()
    if model.device.type == "cuda":
        options["graphs"] = graphs
    return DecodeWay(name, model, heads, options=options)


def our_ways(subject: Subject, graphs: bool, trees: tuple[int, ...] = TREES) -> list[AnyWay]:
    """Our loop without drafts, and with trees of several sizes."""
    mode = "graphs" if graphs else "eager"
    everyone = {"cerberus": subject.heads, "medusa": subject.medusa}
    ways: list[AnyWay] = [our_way(f"loop, {mode}", subject.model, subject.heads, 1, graphs)]
    for nodes in trees:
        for name, heads in everyone.items():
            if heads is not None:
                ways.append(our_way(f"{name}, {mode}, {nodes} nodes", subject.model, heads, nodes, graphs))
    return ways


def once(way: AnyWay, ids: Tensor, new: int) -> tuple[Tensor, DecodeStats | None, float]:
    """The text (1, S + new), the statistics of our loop, and tokens/s from prompt to last token."""
    (tokens, stats), seconds = timed(partial(way.run, ids, new), ids.device)
    return torch.cat([ids, ids.new_tensor([tokens])], 1), stats, len(tokens) / seconds


def try_once(way: AnyWay, ids: Tensor, new: int) -> tuple[Tensor | None, str | None]:
    """The text, or the error; after one, what is kept for the model is freed, so that the next size is tried, too."""
    made, failure = tried(partial(once, way, ids, new), ids.device.type)
    if made is None:
        Decoder(way.model).close()
        return None, failure
    return made[0], None
