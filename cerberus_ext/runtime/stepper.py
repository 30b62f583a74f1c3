"""The steps of one decode, as the host sees them: it hands over a tree and gets the tokens that the step gained.

    settle     what follows the target model's forward, on the device only: choose, verify, commit
    Stepper    runs a step op by op; `graphs.GraphedStepper` replays recorded ones

Letters: B rows (1 so far), N nodes of the step's tree, K heads, P drafts per head, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import ops
from ..drafting.dynamic_policy import StepTensors, Tree
from ..drafting.static_policy import StaticPolicy, TreeTensors
from .stats import DecodeStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..drafting.context_layer import BoundContext
    from ..target.attention import Topology
    from ..target.cache import TreeCache
    from ..target.model import TargetModel
    from .logit_rules import LogitRules


_ALONE = StaticPolicy.root()


class Drafter(Protocol):
    """Heads bound to a model.

    Where it also has `rebind`, as `heads.Drafter` does, a recorded step contains its draft: `draft` then has to compute
    from its arguments and from tensors that stay where they are, on the device only. Otherwise it is called at every
    step, and only what follows is recorded.

    Drafts that depend on those before them on their path cannot be made before there is a tree. A drafter of such
    drafts has, instead of `draft`,

        draft_tree(hidden (B, D), root (B,), tree) -> the tokens (B, N) of the tree's nodes, the root's first

    and is called at every step: such steps run op by op, and no gate can choose by the drafts' probabilities.

    A drafter may have `context`, as `heads.Drafter` does: see context_layer.py. It is told of every token of the text,
    and `draft` then gets what it makes of the hidden state.
    """

    def draft(self, hidden: Tensor, root: Tensor, drafts: int) -> tuple[Tensor, Tensor]:
        """hidden (B, D), root (B,) -> token ids (B, K, P) int64 and log-probabilities (B, K, P) float32, best first."""


class HeadsLike(Protocol):
    """What `decode` needs of heads; CerberusHeads is one. config.num_heads is K."""

    config: Any

    def bind(self, model: PreTrainedModel) -> Drafter: ...


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from logits, see `ops.choose_tokens`."""

    seed: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def choose(self, logits: Tensor, positions: Tensor) -> Tensor:
        """logits (..., V), positions (...) of the tokens to choose -> tokens (...)."""
        flat = logits.reshape(-1, logits.shape[-1]).contiguous()
        chosen = ops.choose_tokens(
            flat, positions.reshape(-1).contiguous(), self.seed, self.temperature, self.top_k, self.top_p
        )
        return chosen.view(positions.shape)


class Settled(NamedTuple):
    """What a step found. The text goes on with target[node] for every node of the path."""

    target: Tensor  # (B, N) int64: what the target model chose after each node
    path: Tensor | None  # (B, depth + 1) int32: the accepted nodes from the root on, then -1; None: only the root
    hidden: Tensor  # (B, D): what the last of the tokens was chosen from
    root: Tensor  # (B,) int64: the last of the tokens


def settle(
    cache: TreeCache, tokens: Tensor, hidden: Tensor, logits: Tensor, tree: Topology, depth: int, sampling: Sampling,
    rules: LogitRules | None = None, parents: Any = (),
) -> Settled:  # fmt: skip
    """tokens (B, N), hidden (B, N, D), logits (B, N, V) of a forward over `tree`, which is not deeper than `depth`.

    rules: what the logits go through, with the tree's parents (N,) on the host. Keeps the longest path that the target
    model agrees with. Without rules the host never waits here.
    """
    # The token after node i stands one place behind the node, which is at length + depth.
    positions = cache.length[:, None] + tree.depths + 1  # (B, N)
    if rules is None:
        target = sampling.choose(logits, positions)
    else:
        target = rules.targets(logits, tokens, parents, positions, sampling)
    if tokens.shape[1] == 1:  # the root, which is always accepted and lies where it has to stay
        cache.length += 1
        return Settled(target, None, hidden[:, 0], target[:, 0])
    path, accepted = ops.verify_tree(tokens, target, tree.parents, tree.ancestors, depth)
    cache.commit(path, accepted)
    last = path.gather(1, accepted.long()[:, None]).long()  # (B, 1)
    last_hidden = hidden.gather(1, last[:, :, None].expand(-1, -1, hidden.shape[-1]))[:, 0]
    return Settled(target, path, last_hidden, target.gather(1, last)[:, 0])


def accepted_path(path: list[int]) -> list[int]:
    """The accepted nodes, from the root on, of one row of `Settled.path`. The text goes on with their targets."""
    return [node for node in path if node >= 0]


def context_of(drafter: Drafter) -> BoundContext | None:
    """What its hidden states go through before they are drafted from."""
    return getattr(drafter, "context", None)


def prefill(base: TargetModel, context: BoundContext | None, ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids (B, S): the prompt, of which `context` is told -> hidden (B, D) and logits (B, V) of its last position."""
    if context is None:
        return base.prefill(ids)
    states, logits = base.prefill_all(ids)  # (B, S, D), (B, V)
    context.keep_prompt(base.cache, states, ids)
    return states[:, -1], logits


def draft(drafter: Drafter, cache: TreeCache, hidden: Tensor, root: Tensor, drafts: int) -> tuple[Tensor, Tensor]:
    """hidden (B, D): what led to root (B,) -> ids, logprobs (B, K, drafts) of the drafts behind it, on the device.

    Id -1 where the probability is 0 or no number: such a draft is none.
    """
    context = context_of(drafter)
    if context is not None:
        hidden = context.read(cache, hidden[:, None], root[:, None], _ALONE.on(root.device))[:, 0]
    ids, logprobs = drafter.draft(hidden, root, drafts)
    return ids.masked_fill(~logprobs.isfinite(), -1), logprobs


def embeddable(tokens: Tensor, base: TargetModel) -> Tensor:
    """tokens of a tree's nodes, with token 0 in the place of those that the model does not have.

    For the forward alone: `settle` gets the others, which the target model never chooses.
    """
    embeddings: Any = base.model.get_input_embeddings().weight
    return tokens.masked_fill((tokens < 0) | (tokens >= len(embeddings)), 0)


def drafts_along_paths(drafter: Drafter) -> bool:
    """Whether it has `draft_tree` in the place of `draft`."""
    return hasattr(drafter, "draft_tree")


class Stepper:
    """`prefill` once, then `step` as often as needed.

    hidden  (B, D): what the root was chosen from. Another step may write over it
    root    (B,): chosen, not yet in the cache
    """

    hidden: Tensor
    root: Tensor

    def __init__(
        self, base: TargetModel, drafter: Drafter, drafts: int, sampling: Sampling, stats: DecodeStats,
        rules: LogitRules | None = None,
    ) -> None:  # fmt: skip
        """drafts: how many of each head any tree uses, 0: none. rules: what the logits go through; None: nothing."""
        self.base = base
        self.drafter = drafter
        self.context = context_of(drafter) if drafts else None
        self.max_drafts = drafts
        self.sampling = sampling
        self.stats = stats
        self.rules = rules
        self._drafted: tuple[Tensor, Tensor] | None = None  # of this step: ids, logprobs (B, K, P)

    def prefill(self, ids: Tensor) -> list[int]:
        """ids (1, S): the prompt -> the first new token."""
        hidden, logits = prefill(self.base, self.context, ids)  # (B, D), (B, V)
        if self.rules is not None:
            logits = self.rules.first(logits)
        root = self.sampling.choose(logits, self.base.cache.length)  # (B,); the cache's length is the root's position
        self._start(hidden, root)
        first = root.tolist()
        if self.rules is not None:
            self.rules.extend(first)
        return first

    def deepest(self) -> int:
        """How deep a tree may be at the next step, for no node to have a position that the model does not know."""
        return self.base.deepest()

    def entropy(self) -> float:
        """In nats, of softmax(hidden)."""
        return ops.hidden_entropy(self.hidden)[0].item()

    def logprobs(self) -> Tensor:
        """(B, K, P) of the heads' drafts, on the host."""
        return self._draft()[1].cpu()

    def drafts(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """ids, logprobs (K, P) of the heads' drafts for row 0, on the host; (0, 0) where no tree has any."""
        if not self.max_drafts:
            return np.empty((0, 0), np.int64), np.empty((0, 0), np.float32)
        ids, logprobs = self._draft()
        return ids[0].numpy(force=True), logprobs[0].numpy(force=True)

    def step(self, tree: StaticPolicy | Tree, deepest: int) -> list[int]:
        """One forward over `tree` without the nodes deeper than `deepest` -> the tokens gained, at least one."""
        tree = tree.cut(deepest)
        with self.stats.phase("draft"):
            tensors = tree.on(self.root.device)
            tokens = self._tokens(tree, tensors)  # (B, N)
            known = tokens
            if isinstance(tree, StaticPolicy) and tree.size > 1:  # a Tree has been checked
                known = embeddable(tokens, self.base)
                if not (known == tokens)[:, 1:].any():  # nothing was drafted
                    tree = _ALONE
                    tensors, tokens, known = tree.on(self.root.device), tokens[:, :1], known[:, :1]
        self.base.prepare(tree.size)
        with self.stats.phase("verify"):
            hidden, logits = self.base.step(known, tensors)  # (B, N, D), (B, N, V)
        with self.stats.phase("commit"):
            if self.context is not None:
                self.context.keep_nodes(self.base.cache, self.hidden, hidden, known, tensors)
            settled = settle(
                self.base.cache, tokens, hidden, logits, tensors, tree.depth, self.sampling, self.rules, tree.parents
            )
            self._start(settled.hidden, settled.root)
            # The one place where the host waits.
            if settled.path is None:
                path, gained = [0], settled.target[0].tolist()
            else:
                places = tree.depth + 1
                row = torch.cat([settled.path.long(), settled.target], 1)[0].tolist()
                path = accepted_path(row[:places])
                gained = [row[places + node] for node in path]
            if self.rules is not None:
                self.rules.extend(gained)
            self._count(path, tree)
        return gained

    def _tokens(self, tree: StaticPolicy | Tree, tensors: TreeTensors | StepTensors) -> Tensor:
        """(B, N) of the tree's nodes."""
        root = self.root[:, None]
        if tree.size == 1:
            return root
        if isinstance(tensors, StepTensors):
            return torch.cat([root, tensors.tokens[None]], dim=1)
        if drafts_along_paths(self.drafter):
            return self.drafter.draft_tree(self.hidden, self.root, tree)  # type: ignore[attr-defined]
        ids, _ = self._draft()
        return torch.cat([root, ids[:, tensors.heads, tensors.ranks]], dim=1)

    def _draft(self) -> tuple[Tensor, Tensor]:
        """The heads' drafts and their log-probabilities, (B, K, P) each; made once a step."""
        if self._drafted is None:
            self._drafted = draft(self.drafter, self.base.cache, self.hidden, self.root, self.max_drafts)
        return self._drafted

    def _start(self, hidden: Tensor, root: Tensor) -> None:
        """From here on it is the next step."""
        self.hidden, self.root, self._drafted = hidden, root, None

    def _count(self, path: list[int], tree: StaticPolicy | Tree) -> None:
        """path: the accepted nodes, from the root on."""
        self.base.cache.committed += len(path)
        drafted = path[1:]
        proposers = [int(tree.proposers[node]) for node in drafted] if isinstance(tree, Tree) else [0] * len(drafted)
        self.stats.count_step(tree.size, drafted, proposers)
