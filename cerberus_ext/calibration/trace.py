"""Texts that the model writes itself, and what the heads think of every place in them.

What heads draft at a place depends on that place alone: on its hidden state and pending token. So what every step of
every tree and gate would have done can be told from one pass over the finished text, without decoding it again.

Letters: n places of a text, K heads, P drafts per head, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .. import ops
from ..drafting.conditional import BoundConditional
from ..drafting.dynamic_policy import MAX_DRAFTS
from ..drafting.heads import CerberusHeads, input_matrix
from ..drafting.heads_drafter import HeadsDrafter
from ..drafting.simulate import ABSENT
from ..drafting.static_policy import StaticPolicy
from ..drafting.tree import TreeTensors
from ..engine.decode import decode
from ..engine.plan import default_policy
from ..io.prompts import Question, encode_chat
from ..runtime.runtime import runtime_of
from ..runtime.stepper import prefill
from ..target.cache import TreeCache
from ..target.model import TargetModel, position_limit

_PIECE = 64  # tokens a forward


@dataclass(frozen=True)
class Answer:
    """ids (1, S): prompt and answer. prompt: tokens of the prompt. most: tokens that the answer might have had."""

    question: int
    ids: Tensor
    prompt: int
    most: int

    @property
    def new(self) -> int:
        """Tokens of the answer."""
        return self.ids.shape[1] - self.prompt


@dataclass(frozen=True, eq=False)
class TracedText:
    """An answer of n + 1 tokens has n places at which a step may begin: place i has the token i as its
    pending token.

    question     number of the question: the turns of one belong together
    prompt       tokens before place 0
    deepest      per place, how deep a tree may be there, as `decode` has it
    ranks        (n, K): where the right token stands among every head's drafts, see simulate.py
    hidden       (n, D); entropy (n,): in nats, of softmax(hidden)
    next_entropy (n,): in nats, of the target model's distribution from which the pending token was chosen
    ids          (n, K, P) int64: of the drafts; logprobs (n, K, P) float32
    conditional  what weighs them by the token before, on the CPU; None: nothing does
    tokens       (prompt + n + 1,): of prompt and answer
    vocabulary   of the model, in tokens
    agreeing     share of the places whose pending token the pass over the text would have chosen, too
    """

    question: int
    prompt: int
    deepest: list[int]
    ranks: list[list[int]]
    hidden: Tensor
    entropy: list[float]
    next_entropy: list[float]
    ids: Tensor
    logprobs: Tensor
    conditional: BoundConditional | None
    tokens: list[int]
    vocabulary: int
    agreeing: float

    def __len__(self) -> int:
        return len(self.ranks)


def write_answers(
    model: PreTrainedModel, heads: CerberusHeads, tokenizer: Any, questions: Sequence[Question], new_tokens: int
) -> Iterator[Answer]:
    """The model's greedy answers of at most `new_tokens` tokens; the first answer is part of a second turn's prompt.

    What goes beyond the model's positions is not asked for.
    """
    tree, positions = default_policy(model.device), position_limit(model)
    for number, question in enumerate(questions):
        turns: list[str] = []
        for turn in question.turns:
            turns.append(turn)
            ids = encode_chat(tokenizer, turns).to(model.device)
            length = ids.shape[1]
            most = min(new_tokens, positions - length + 1)  # the last token is never put in
            if most < 1:
                break
            text = decode(model, heads, ids, max_new_tokens=most, tree=tree).sequences
            yield Answer(number, text, length, most)
            turns.append(tokenizer.decode(text[0, length:], skip_special_tokens=True))


def trace(model: PreTrainedModel, heads: CerberusHeads, answer: Answer) -> TracedText:
    """One pass over an answer, which has at least 2 tokens.

    The answer goes through the same forwards as a draft tree that is one long path. On a CPU, where nodes do not depend
    on each other, everything here has the bits that `decode` sees.
    """
    tokens = answer.ids[0, answer.prompt :]
    drafter, runtime = heads.bind(model), runtime_of(model)
    with (
        torch.inference_mode(),
        runtime.sole(),
        runtime.target(answer.ids.shape[1], context=drafter.has_context) as target,
    ):
        hidden, chosen, next_entropy = _forward(target, drafter, answer)  # (n, D), (n,) twice
        ids, logprobs = _drafts(drafter, target.cache, hidden, tokens[:-1], answer.prompt)  # (n, K, P) each
        entropy = ops.hidden_entropy(hidden)
    limit = min(answer.most - 2, position_limit(model) - 1 - answer.prompt)
    return TracedText(
        question=answer.question,
        prompt=answer.prompt,
        deepest=[max(0, limit - place) for place in range(answer.new - 1)],
        ranks=_ranks(ids.cpu(), tokens.cpu()),
        hidden=hidden,
        entropy=entropy.tolist(),
        next_entropy=next_entropy.tolist(),
        ids=ids.cpu(),
        logprobs=logprobs.cpu(),
        conditional=None if drafter.conditional is None else drafter.conditional.host,
        tokens=answer.ids[0].tolist(),
        vocabulary=input_matrix(model).shape[0],
        agreeing=(chosen == tokens[:-1]).double().mean().item(),
    )


def _forward(target: TargetModel, drafter: HeadsDrafter, answer: Answer) -> tuple[Tensor, Tensor, Tensor]:
    """At every place: hidden (n, D), the token chosen from it (n,) and the entropy of what it was chosen from (n,)."""
    rows: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(states: Tensor, logits: Tensor) -> None:
        """states (m, D), logits (m, V)"""
        logs = logits.float().log_softmax(-1)
        rows.append((states, logits.argmax(-1), -(logs.exp() * logs).nan_to_num(0.0).sum(-1)))

    keep(*prefill(target, drafter, answer.ids[:, : answer.prompt]))
    for piece in answer.ids[:, answer.prompt : -2].split(_PIECE, 1) if answer.new > 2 else ():
        states, logits = target.step(piece, _chain(piece))
        target.cache.extend(piece.shape[1])
        keep(states[0], logits[0])
    hidden, chosen, entropy = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return hidden, chosen, entropy


def _chain(tokens: Tensor) -> TreeTensors:
    """tokens (1, m) as the nodes of one path."""
    return StaticPolicy.chain(tokens.shape[1] - 1).tree.on(tokens.device)


def _drafts(
    drafter: HeadsDrafter, cache: TreeCache, hidden: Tensor, pending: Tensor, prompt: int
) -> tuple[Tensor, Tensor]:
    """hidden (n, D), pending (n,) behind `prompt` tokens, all of which are in the cache -> ids, logprobs (n, K, P)."""
    drafts = min(MAX_DRAFTS, drafter.projection.shape[0])
    begin, found = torch.full_like(cache.length, prompt), []
    for states, tokens in zip(hidden.split(_PIECE), pending.split(_PIECE), strict=True):
        if drafter.context is not None:
            states = drafter.context.read(cache, states[None], tokens[None], _chain(tokens[None]), begin)[0]
            begin = begin + len(tokens)
        found.append(drafter.draft(states, tokens, drafts))
    ids, logprobs = (torch.cat(parts) for parts in zip(*found, strict=True))
    return ids, logprobs


def _ranks(ids: Tensor, tokens: Tensor) -> list[list[int]]:
    """ids (n, K, P) of the drafts, tokens (n + 1,) of the text -> (n, K)"""
    places, heads, _ = ids.shape
    ahead = torch.arange(places)[:, None] + torch.arange(1, heads + 1)  # (n, K)
    right = torch.where(ahead <= places, tokens[ahead.clamp(max=places)], -1)
    hits = ids == right[:, :, None]
    return torch.where(hits.any(-1), hits.int().argmax(-1), ABSENT).tolist()
