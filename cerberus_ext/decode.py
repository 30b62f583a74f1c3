"""Decoding with drafts: design.md, "One decoding step", in code.

Letters: B rows (1 so far), N nodes of the step's tree, K heads, P guesses per head, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from . import ops
from .gate import AlwaysOpen, Gate
from .stats import DecodeOutput, DecodeStats
from .text import GeneratedText
from .tree import DraftTree, default_tree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .base_model import BaseModel


class Drafter(Protocol):
    """Heads bound to a model."""

    def draft(self, hidden: Tensor, root: Tensor, guesses: int) -> tuple[Tensor, Tensor]:
        """hidden (B, D), root (B,) -> token ids (B, K, P) int64 and log-probabilities (B, K, P) float32, best first."""


class HeadsLike(Protocol):
    """What `decode` needs of heads; CerberusHeads is one. config.num_heads is K."""

    config: Any

    def bind(self, model: PreTrainedModel) -> Drafter: ...


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits, see `ops.choose_tokens`."""

    seed: int
    temperature: float
    top_k: int
    top_p: float

    def choose(self, logits: Tensor, positions: Tensor) -> Tensor:
        """logits (..., V), positions (...) of the tokens to choose -> tokens (...)."""
        flat = logits.reshape(-1, logits.shape[-1]).contiguous()
        chosen = ops.choose_tokens(
            flat, positions.reshape(-1).contiguous(), self.seed, self.temperature, self.top_k, self.top_p
        )
        return chosen.view(positions.shape)


@dataclass
class State:
    """Between two steps."""

    hidden: Tensor  # (B, D): what the root was chosen from
    root: Tensor  # (B,): chosen, not yet in the cache


def decode(
    model: PreTrainedModel,
    heads: HeadsLike,
    ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 256,
    tree: DraftTree | None = None,
    gate: Gate | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | list[int] | None = None,
    stopping_criteria: list[Any] | None = None,
    streamer: Any = None,
) -> DecodeOutput:
    """Generates what `model` alone would, in fewer forwards.

    model: a decoder-only transformers model with a key/value cache (full or sliding attention), in evaluation mode, on
        one device. It is left as it was, also when this raises.
    heads: CerberusHeads, or anything else that guesses. They never change the text.
    ids: (1, S) int64 on the model's device: the prompt. attention_mask: None or all ones.
    max_new_tokens: at most so many tokens are generated, >= 0.
    tree: which guesses a step checks; None: `default_tree(heads, device)`. gate: when; None: at every step.
    temperature: 0 takes the most likely token, as `model.generate(do_sample=False)` does without logits processors.
        Above 0, tokens are drawn, with noise determined by seed and position, so that for a seed the text is the same
        whatever the heads, the tree and the gate; top_k and top_p are those of `ops.choose_tokens`.
    eos_token_id: token or tokens that end the text, included in it; None: those of model.generation_config.
    stopping_criteria, streamer: transformers' own, see `generate`.

    Returns sequences (1, S + new) and stats. Raises TypeError or ValueError, naming the argument, where one is wrong.
    Source: arXiv 2410.13344.
    """
    # Here, and not above: they import transformers, which takes seconds and is not needed to look at a tree.
    from . import checks
    from .base_model import BaseModel

    checks.check_model(model)
    checks.check_heads(heads)
    checks.check_ids(ids, model)
    checks.check_attention_mask(attention_mask, ids)
    checks.check_integer("max_new_tokens", max_new_tokens, 0)
    checks.check_sampling(temperature, top_k, top_p, seed)
    checks.check_streamer(streamer)
    sampling = Sampling(seed, float(temperature), top_k, float(top_p))
    tree = default_tree(heads, ids.device) if tree is None else tree
    tree = checks.check_tree(tree, heads.config.num_heads)
    gate = AlwaysOpen() if gate is None else checks.check_gate(gate)
    trees = [checks.check_tree(one, heads.config.num_heads) for one in gate.trees(tree)]
    stopping = checks.stopping_criteria_list(stopping_criteria)
    text = GeneratedText(ids, max_new_tokens, checks.eos_token_ids(eos_token_id, model), stopping, streamer)
    stats = DecodeStats()
    if not text.ended:
        drafter = heads.bind(model)
        guesses = max(one.guesses for one in trees)
        capacity = ids.shape[1] + max_new_tokens + max(one.size for one in trees)
        with torch.inference_mode(), BaseModel(model, capacity, ids.shape[0]) as base:
            state = _prefill(base, ids, sampling, text, stats)
            while not text.ended:
                # A step gains one token more than it accepts guesses.
                deepest = min(text.remaining - 1, base.deepest())
                with stats.phase("draft"):
                    step_tree, draft = _draft(state, drafter, guesses, tree, gate, deepest)
                state = _step(base, state, step_tree, draft, sampling, text, stats)
    stats.new_tokens = len(text.tokens)
    return DecodeOutput(text.finish(), stats)


def _prefill(base: BaseModel, ids: Tensor, sampling: Sampling, text: GeneratedText, stats: DecodeStats) -> State:
    """ids (B, S) -> the state before the first step; the first new token comes with it."""
    with stats.phase("prefill"):
        hidden, logits = base.prefill(ids)  # (B, D), (B, V)
        root = sampling.choose(logits, base.cache.length)  # (B,); the cache's length is the root's position
        text.add(root.tolist())
    return State(hidden, root)


def _draft(
    state: State, drafter: Drafter, guesses: int, tree: DraftTree, gate: Gate, deepest: int
) -> tuple[DraftTree, Tensor]:
    """What to check at this step: the tree the gate gives, no deeper than `deepest`, and its nodes' tokens (B, N)."""
    root = state.root[:, None]  # (B, 1)
    if deepest == 0 or guesses == 0 or not gate.opens(state.hidden):
        return DraftTree.root(), root
    ids, logprobs = drafter.draft(state.hidden, state.root, guesses)  # (B, K, P)
    chosen = gate.choose(tree, logprobs)
    if chosen is None:
        return DraftTree.root(), root
    chosen = chosen.cut(deepest)
    tensors = chosen.on(root.device)
    return chosen, torch.cat([root, ids[:, tensors.heads, tensors.ranks]], dim=1)


def _step(
    base: BaseModel,
    state: State,
    tree: DraftTree,
    draft: Tensor,
    sampling: Sampling,
    text: GeneratedText,
    stats: DecodeStats,
) -> State:
    """One forward over the tree; the longest path that the base model agrees with is kept."""
    with stats.phase("verify"):
        hidden, logits = base.step(draft, tree)  # (B, N, D), (B, N, V)
    with stats.phase("commit"):
        tensors = tree.on(draft.device)
        # The token after node i stands one place behind the node, which is at length + depth.
        target = sampling.choose(logits, base.cache.length[:, None] + tensors.depths + 1)  # (B, N)
        path, accepted = ops.verify_tree(draft, target, tensors.parents, tensors.ancestors, tree.depth)
        base.cache.commit(path, accepted)
        # path (B, depth + 1): node 0, the accepted nodes, then -1. The text is what was chosen after each of them.
        gained = target.gather(1, path.long().clamp(min=0)).masked_fill(path < 0, -1)
        last = path.gather(1, accepted.long()[:, None]).long()  # (B, 1)
        tokens = [token for token in gained[0].tolist() if token >= 0]  # the one place where the host waits
        base.cache.committed += len(tokens)
        stats.count_step(len(tokens) - 1, tree.size > 1)
        text.add(tokens)
        last_hidden = hidden.gather(1, last[:, :, None].expand(-1, -1, hidden.shape[-1]))[:, 0]
        return State(last_hidden, target.gather(1, last)[:, 0])
