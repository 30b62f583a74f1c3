"""Heads that know a text in part: some steps accept nothing, some everything."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cerberus_ext import AlwaysClosed, CerberusConfig, CerberusHeads, decode
from cerberus_ext.calibration.trace import Answer, TracedText, trace
from cerberus_ext.drafting.heads import input_matrix, output_matrix
from cerberus_ext.ops import reference


def untrained(model: PreTrainedModel, num_heads: int = 3) -> CerberusHeads:
    size, vocab = output_matrix(model).shape[1], output_matrix(model).shape[0]
    config = CerberusConfig("tiny", size, vocab, num_heads=num_heads, num_layers=2)
    return CerberusHeads(config).to(model.dtype)


def answer(model: PreTrainedModel, ids: Tensor, new: int, question: int = 0) -> Answer:
    """Greedily, at most `new` tokens, without drafts."""
    text = decode(model, untrained(model), ids, max_new_tokens=new, gate=AlwaysClosed()).sequences
    return Answer(question, text, ids.shape[1], new)


def memorize(model: PreTrainedModel, answers: list[Answer], steps: int = 60) -> CerberusHeads:
    """Heads after a short training on what follows in the answers."""
    heads = untrained(model).float()
    rows = [trace(model, heads, one) for one in answers]
    hidden = torch.cat([row.hidden for row in rows]).clone().float()
    roots = torch.cat([one.ids[0, one.prompt : -1] for one in answers])
    ahead = [one.ids[0, one.prompt + 1 :].unfold(0, 1, 1)[:, 0] for one in answers]
    targets = torch.stack([torch.cat([torch.cat([a[k:], a[:k]]) for a in ahead]) for k in range(3)], 1)  # (n, K)
    anchor = input_matrix(model).detach().float()[roots]
    projection = output_matrix(model).detach().float()
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.03)
    for _ in range(steps):
        states = reference.head_stack(hidden, anchor * heads.anchor_scale, heads.weight, heads.bias)  # (n, K, D)
        loss = torch.nn.functional.cross_entropy((states @ projection.T).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return heads.to(model.dtype).eval().requires_grad_(False)


def hand_made(ranks: list[list[int]], *, prompt: int = 10, question: int = 0, **signals: object) -> TracedText:
    """A text of which only the ranks matter, and the signals that are given. All of its tokens differ."""
    places, heads, drafts = len(ranks), len(ranks[0]), 4
    tokens = list(range(prompt + places + 1))
    wrong = len(tokens) + torch.arange(drafts)
    ids = wrong.repeat(places, heads, 1)
    for place, row in enumerate(ranks):
        for head, rank in enumerate(row):
            if rank < drafts and prompt + place + head + 1 < len(tokens):
                ids[place, head, rank] = tokens[prompt + place + head + 1]
    values: dict = {
        "hidden": torch.zeros(places, 4),
        "entropy": [0.0] * places,
        "next_entropy": [0.0] * places,
        "ids": ids,
        "logprobs": torch.full((places, heads, drafts), 0.25).log(),
        "conditional": None,
        "tokens": tokens,
        "vocabulary": len(tokens) + drafts,
        "deepest": [places] * places,
        "agreeing": 1.0,
        **signals,
    }
    return TracedText(question=question, prompt=prompt, ranks=ranks, **values)
