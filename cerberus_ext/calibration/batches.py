"""What a step of several texts costs on this machine, for the budget that they share (engine/budget.py).

Not every number of nodes with every number of texts: what more nodes add was measured to be the same for 1, 2, 4 and 8
texts, within 7 %, though a step of 8 texts with 8 nodes takes a fifth longer than one of a single text with as many.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np
import torch
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedModel

from ..drafting.heads import input_matrix
from ..drafting.tree import ALONE, Tree
from ..engine.budget import Costs
from ..engine.plan import NoHeads
from ..evaluation.timing import timed
from ..runtime.runtime import runtime_of
from ..runtime.sampling import Sampling
from ..runtime.session import Running, session
from ..runtime.stats import DecodeStats
from ..runtime.stepper import Drafts, Stepper, step_together
from .cost import fill, put_back

TEXTS = (1, 2, 4, 8)
# Of PAIR texts. A product computes its rows in blocks of 4 or 8, of which the first one costs most.
NODES = (*range(2, 18), 20, 24, 25, 28, 32)
PAIR = 2
_ROUNDS = 5  # for each round of other step times


def measure_batches(model: PreTrainedModel, context: int, rounds: int) -> Costs:
    """In seconds, without heads, of texts of `context` tokens, behind which the model has positions for a draft."""
    vocabulary = input_matrix(model).shape[0]
    steps = [(texts, [ALONE] * texts) for texts in TEXTS]
    steps += [(PAIR, [star(nodes // 2, vocabulary), star(nodes - nodes // 2, vocabulary)]) for nodes in NODES]
    seconds: list[list[float]] = [[] for _ in steps]
    running = Running(graphs=False, slots=max(TEXTS))
    made = session(runtime_of(model), Drafts(NoHeads(), 0, False, False, (1,)), running)
    with torch.inference_mode(), made as found, tqdm(total=_ROUNDS * rounds + 1, desc="batches", unit="round") as bar:
        texts = [found.open(Sampling(), DecodeStats(), context + 1 + max(NODES)) for _ in range(max(TEXTS))]
        for text in texts:
            fill(text)
        for round in range(_ROUNDS * rounds + 1):  # the first one warms up
            for (count, trees), times in zip(steps, seconds, strict=True):
                for warm in (False, True):  # behind one of the same size, as in `decode`
                    taken = _time_step(texts[:count], trees, context, model.device)
                    times += [taken] if round and warm else []
            bar.update()
    # Fewer never take longer: where they seem to, something else has delayed them.
    parts = np.split(np.array([median(times) for times in seconds]), [len(TEXTS)])
    plain, drafted = (np.minimum.accumulate(part[::-1])[::-1].tolist() for part in parts)
    return Costs(dict(zip(TEXTS, plain, strict=True)), dict(zip(NODES, drafted, strict=True)))


def star(nodes: int, vocabulary: int) -> Tree:
    """As deep as a draft, however many nodes."""
    if nodes == 1:
        return ALONE
    zeros = np.zeros(nodes, np.int64)
    return Tree(np.minimum(np.arange(nodes) - 1, 0), np.arange(nodes) % vocabulary, zeros, np.ones(nodes))


def _time_step(texts: list[Stepper], trees: list[Tree], context: int, device: torch.device) -> float:
    for text in texts:
        put_back(text, context)

    def step() -> Any:
        return step_together(texts, trees)

    return timed(step, device)[1]
