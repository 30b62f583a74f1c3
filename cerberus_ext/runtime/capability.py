"""What `decode` can do with a model: found once per model, before any text is generated, by running a few steps.

    reading    a step over a small tree and one of a single token, call by call: is a token's result independent of the
               other tokens by construction (step_audit.py)? The answer is `exact` and `inexact_because`.
    proof      the same tree against its paths decoded token by token, and these against what the model itself computes.
               A model that fails the first decodes without drafts; one that fails the second is refused.

The proof finds faults of kinds that nobody thought of. That it passes proves nothing: `exact` never rests on it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..drafting.static_policy import StaticPolicy
from ..drafting.tree import ALONE
from ..io.transformers_names import cache_argument
from ..target.attention import UnsupportedAttention, check_attention
from ..target.cache import UnevenLayers
from ..target.model import StepWay, TargetModel
from ..target.row_invariant import RowInvariant
from ..target.stand_ins import current_step
from ..target.step_audit import Audit, padded_nodes, unreadable
from ..target.uncompiled import uncompiled
from .stats import DecodeStats

# More nodes than a sum may have terms to be written out (row_invariant.py): one over nodes is none of these.
_TREE = StaticPolicy.from_paths(
    [(0,), (1,), (2,), (3,), (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0)]
).tree  # 11 nodes
_PATHS = ((0, 1, 6), (0, 2, 7))  # of its nodes
_PROMPT = 5  # tokens
_MAX_NODES = 256  # of a step
_CAPACITY = 32
_STRIDE = 7919  # between the token ids of the proof; any, as long as they differ
# Largest difference from the model itself, as a share of the logits' norm: rounding stays far below.
_LARGEST_DIFFERENCE = {torch.float32: 0.02, torch.float16: 0.3, torch.bfloat16: 0.3}


# What a model that cannot run may raise.
_MODEL_ERRORS = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)


@dataclass(frozen=True)
class Capability:
    """way: how steps run. inexact_because, no_drafts_because: as in DecodeStats."""

    way: StepWay
    inexact_because: str | None = None
    no_drafts_because: str | None = None

    def stats(self) -> DecodeStats:
        """Those of a decode that begins."""
        because = None if self.no_drafts_because else self.inexact_because
        return DecodeStats(exact=because is None, inexact_because=because, no_drafts_because=self.no_drafts_because)


def examine(model: PreTrainedModel) -> Capability:
    """Raises ValueError, naming the model's class and the reason, where the model's steps cannot run."""
    name = type(model).__name__
    try:
        check_attention(model)
        with torch.inference_mode():
            return _prove(model, _read(model))
    except UnsupportedAttention as error:
        reason = str(error)
        raise ValueError(
            f"decode: model must have an attention that is known here, {name} has not: {reason}"
        ) from error
    except UnevenLayers as error:
        reason = str(error).removeprefix("TreeCache: ")
        raise ValueError(
            f"decode: model must have keys and values of one shape in all layers, {name} has not: {reason}"
        ) from error
    except _MODEL_ERRORS as error:
        if str(error).startswith("decode:"):
            raise
        if interruption := _interruption(error):
            raise interruption from None
        reason = next(iter(str(error).splitlines()), "") or "no reason given"
        raise ValueError(
            f"decode: model must run over a tree of drafts, {name} does not: {type(error).__name__}: {reason}"
        ) from error


def _interruption(error: BaseException) -> BaseException | None:
    """What came from outside, a signal handler say, and led to the error; None: there is no such thing.

    torch's stack of modes is not safe against it: interrupted between two of its own lines, it raises an error of its
    own on the way out. An ImportError is what models raise theirs for that miss a package.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        if not isinstance(link, (*_MODEL_ERRORS, ImportError)):
            return link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return None


def _read(model: PreTrainedModel) -> Capability:
    """How steps run, and whether they are exact by construction."""
    way = StepWay.plain(model)
    if model.device.type != "cpu":
        reason = f"products on {model.device.type} are summed in an order that depends on the number of tokens"
        return Capability(way, inexact_because=reason)
    audit = Audit(_PROMPT)

    def mode() -> RowInvariant:  # where the model runs the prompt with its own attention, it may go through it, too
        return RowInvariant() if current_step() is None else audit

    with TargetModel(model, StepWay(way.names_attention, sees_all=True), _CAPACITY, mode=mode) as target:
        target.prefill(_tokens(model))
        audit.nodes = _TREE.size
        target.step(_tokens(model, range(_TREE.size)), _TREE.on(model.device))
        audit.nodes = 1  # some models go another way with a single token
        target.step(_tokens(model, [0]), ALONE.on(model.device))
    sees_all = way.sees_all or audit.sees_all or not _can_be_padded(audit.widths)
    widths = frozenset() if sees_all else frozenset(audit.widths)
    return Capability(StepWay(way.names_attention, sees_all, widths), audit.uncovered or unreadable(model))


def _can_be_padded(widths: Set[int]) -> bool:
    """Whether every step, however many nodes its tree has, can be filled up to a number that vector code computes."""
    threads = torch.get_num_threads()
    return all(padded_nodes(nodes, widths, threads) is not None for nodes in range(1, _MAX_NODES + 1))


def _prove(model: PreTrainedModel, capability: Capability) -> Capability:
    """The capability, with what the proof finds."""
    same = True
    with TargetModel(model, capability.way, _CAPACITY) as target:
        target.prefill(_tokens(model))
        hidden, logits = target.step(_tokens(model, range(_TREE.size)), _TREE.on(model.device))
        for path in _PATHS:
            for node, own in zip(path, _own_logits(model, path), strict=True):
                alone_hidden, alone_logits = target.step(_tokens(model, [node]), ALONE.on(model.device))
                target.cache.extend(1)
                apart = difference(alone_logits[0, 0], own)
                if not apart <= _LARGEST_DIFFERENCE[model.dtype]:
                    raise ValueError(
                        f"decode: model must compute in a step what it computes by itself, {type(model).__name__} does"
                        f" not: its logits differ by {apart:.0%}"
                    )
                same = (
                    same and _agree(alone_logits[0, 0], logits[0, node]) and _agree(alone_hidden[0, 0], hidden[0, node])
                )
            target.cache.extend(-len(path))
    if same:
        return capability
    name = type(model).__name__
    reason = f"{name} computes other numbers for a token of a tree than for the token by itself"
    warnings.warn(f"decode: no drafts: {reason}", RuntimeWarning, stacklevel=2)
    return Capability(capability.way, capability.inexact_because, no_drafts_because=reason)


def _own_logits(model: PreTrainedModel, path: Sequence[int]) -> list[Tensor]:
    """(V,) after each node of the path: token by token, with a cache and an attention of its own, as in `generate`."""
    cache = {cache_argument(model): DynamicCache(config=model.config)}
    with uncompiled(model.device):
        model(input_ids=_tokens(model), use_cache=True, **cache)
        return [model(input_ids=_tokens(model, [node]), use_cache=True, **cache).logits[0, -1] for node in path]


def _tokens(model: PreTrainedModel, nodes: Sequence[int] | None = None) -> Tensor:
    """(1, T): the proof's prompt, or the tokens of nodes of its tree."""
    numbers = torch.arange(_PROMPT) if nodes is None else torch.tensor(list(nodes)) + _PROMPT
    embeddings: Any = model.get_input_embeddings()
    return (numbers * _STRIDE % embeddings.weight.shape[0])[None].to(model.device)


def _agree(got: Tensor, want: Tensor) -> bool:
    """On a CPU, bit for bit; on another device, up to rounding. What is no number in both agrees."""
    if got.device.type == "cpu":
        return got.nan_to_num().equal(want.nan_to_num())
    return difference(got, want) <= _LARGEST_DIFFERENCE[got.dtype]


def difference(got: Tensor, want: Tensor) -> float:
    """As a share of the norm; NaN where only one of them is finite. What is finite in neither does not count."""
    got, want = got.float(), want.float()
    finite = want.isfinite()
    if not finite.equal(got.isfinite()):
        return math.nan
    got, want = got[finite], want[finite]
    return float((got - want).norm() / want.norm().clamp(min=torch.finfo(torch.float32).tiny))
