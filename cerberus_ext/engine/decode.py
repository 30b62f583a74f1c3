"""Decoding with drafts: design.md, "One decoding step", in code."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..drafting.dynamic_policy import DynamicPolicy, Tree, TreeGrower
from ..drafting.gate import Gate, answers
from ..drafting.proposers import ProposerFactory
from ..drafting.static_policy import StaticPolicy
from ..runtime.stats import DecodeOutput
from ..runtime.stepper import HeadsLike, Stepper
from .forked import threads_after_fork
from .text import GeneratedText, ends_streamer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@ends_streamer
def decode(
    model: PreTrainedModel,
    heads: HeadsLike | None,
    ids: Tensor | Sequence[int] | Mapping[str, Any],
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int = 256,
    tree: int | StaticPolicy | DynamicPolicy | None = None,
    gate: Gate | None = None,
    proposers: Sequence[ProposerFactory] | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_token_id: int | Sequence[int] | Tensor | None = None,
    stopping_criteria: list[Any] | None = None,
    streamer: Any = None,
    graphs: bool | None = None,
    compile: bool = False,
) -> DecodeOutput:
    """Generates what `model` alone would, in fewer forwards.

    model: a decoder-only transformers model with a key/value cache (full or sliding attention), in evaluation mode, on
        one device. It is left as it was, also when this raises.
    heads: CerberusHeads, or anything else that drafts; None: only `proposers` draft. They never change the text. What
        is no draft (a probability that is 0 or no number, a token that the model does not have) is left out.
    ids: (1, S) or (S,) integers on the model's device, a list of them, or what a tokenizer returns (input_ids, and
        attention_mask): the prompt. attention_mask: None or all ones.
    max_new_tokens: at most so many tokens are generated, >= 0; fewer, with a warning, where a model that looks up its
        positions in a table has no more of them.
    tree: which drafts a step checks: a DynamicPolicy, or its number of nodes, those that are most likely right at this
        step, a StaticPolicy always the same of the heads' alone. None: the one that `calibrate` found for these heads
        on this device, with this dtype and, on a CPU, torch.get_num_threads(), with `compile` of compiled steps, if
        that was calibrated; where there is none, a DynamicPolicy, or, for other heads than CerberusHeads and for a gate
        that chooses among StaticPolicies, `default_tree`.
    gate: when, and with which tree. None: the calibrated one where the tree is, too; otherwise at every step.
    proposers: who drafts besides the heads, see proposers.py; None: the text's own past, `[SuffixProposer()]`, with
        a DynamicPolicy; a StaticPolicy has none.
    temperature: 0 takes the most likely token, as `model.generate(do_sample=False)` does. What model.generation_config
        says about the text is applied first, as there, see logit_rules.py; steps are then not recorded. Above 0,
        tokens are drawn, with noise determined by seed and position, so that for a seed the text is the same whatever
        the heads, the tree and the gate; top_k and top_p are those of `ops.choose_tokens`.
    eos_token_id: token or tokens that end the text, included in it; None: those of model.generation_config.
    stopping_criteria, streamer: transformers' own. A criterion gets None as its scores, as from `generate` without
        output_scores. The streamer gets the prompt when nothing more is refused; its `end` is called once, also where
        this raises or is interrupted.
    graphs: steps as CUDA graphs, see graphs.py. None: where possible; True: or an error; False: not.
    compile: on a CPU, the target model's steps go through torch.compile, see compiled_step.py. The first decode of a
        process waits until they are compiled.

    Returns sequences (1, S + new) int64 and stats; `stats.exact` tells whether drafts can never change a token, see
    capability.py. Raises TypeError or ValueError, naming the argument, where one is wrong or model.generation_config
    asks for what there is not (beams, ...), and RuntimeError while the same model is already decoding.
    Source: arXiv 2410.13344.
    """
    # Here, and not above: they import transformers, which takes seconds and is not needed to look at a tree.
    from ..runtime.capability import capability_of
    from ..runtime.graphs import open_stepper
    from ..runtime.logit_rules import logit_rules
    from . import checks
    from .plan import make_plan

    threads_after_fork()
    checks.check_model(model)
    checks.check_autocast(model)
    ids = checks.prompt_ids(ids, attention_mask, model)
    max_new_tokens = checks.check_integer("max_new_tokens", max_new_tokens, 0)
    sampling = checks.check_sampling(temperature, top_k, top_p, seed)
    checks.check_streamer(streamer)
    checks.check_graphs(graphs)
    checks.check_compile(compile, graphs)
    plan = make_plan(model, heads, tree, gate, proposers, compile)
    stopping = checks.stopping_criteria_list(stopping_criteria)
    eos = checks.eos_token_ids(eos_token_id, model)
    rules = logit_rules(model, ids, max_new_tokens, eos)
    most = checks.max_new_tokens(model, ids, max_new_tokens)
    capability = capability_of(model)
    stats = capability.stats(compile)
    if capability.no_drafts_because:
        plan = plan.without_drafts()
    text = GeneratedText(ids, most, eos, stopping, streamer)
    steps = None
    if compile:
        from ..runtime.compiled_step import compiled_steps

        steps = compiled_steps(model, plan.sizes, stats)
    if text.ended:
        text.begin()
    else:
        capacity = ids.shape[1] + most + plan.max_nodes
        drafting = (model, plan.heads, capacity, ids.shape[0], plan.drafts, plan.looks_ahead)
        with (
            torch.inference_mode(),
            open_stepper(*drafting, sampling, stats, graphs, steps, rules) as stepper,
        ):
            if plan.looks_ahead and plan.drafts:
                checks.check_looking_ahead(stepper.drafter, plan.tree)
            with stats.phase("prefill"):
                first = stepper.prefill(ids)
            with stats.phase("draft"):
                trees = plan.begin(ids[0].tolist() + first)
            with stats.phase("prefill"):
                text.begin()
                text.add(first)
            while not text.ended:
                # A step gains one token more than it accepts drafts.
                deepest = min(text.remaining - 1, stepper.deepest())
                tokens = take_step(stepper, plan.gate, trees, deepest if plan.max_nodes > 1 else 0)
                with stats.phase("commit"):
                    taken = text.add(tokens)
                    if isinstance(trees, TreeGrower):
                        trees.extend(taken)
    if len(text.tokens) == most < max_new_tokens and not text.stopped:
        warnings.warn(
            f"decode: max_new_tokens is {max_new_tokens}, but the text ends after {most} tokens:"
            f" {type(model).__name__} has no more positions, or would have to read all of it again",
            stacklevel=3,
        )
    stats.new_tokens = len(text.tokens)
    return DecodeOutput(text.sequences(), stats)


def take_step(stepper: Stepper, gate: Gate, trees: StaticPolicy | TreeGrower, deepest: int) -> list[int]:
    """Asks the gate, and runs a step with what it answers, cut to depth `deepest` -> the tokens gained.

    deepest: 0 where a draft is of no use; the gate is then not asked.
    """
    with stepper.stats.phase("draft"):
        chosen = ask(gate, trees, stepper, deepest) if deepest > 0 else None
    return stepper.step(chosen or StaticPolicy.root(), deepest)


class Signals(Protocol):
    """What a gate may want to see of a step; a Stepper is one."""

    @property
    def hidden(self) -> Tensor: ...

    def entropy(self) -> float: ...

    def logprobs(self) -> Tensor: ...

    def drafts(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]: ...


def ask(gate: Gate, trees: StaticPolicy | TreeGrower, step: Signals, deepest: int) -> StaticPolicy | Tree | None:
    """The tree that the gate wants to be checked at this step, or None. It is asked no more than it answers."""
    if answers(gate, "opens"):
        is_open = gate.opens(step.hidden)
    else:
        is_open = not answers(gate, "opens_at") or gate.opens_at(step.entropy())
    if not is_open:
        return None
    if isinstance(trees, TreeGrower):
        grown = trees.grow(step, deepest)
        size = gate.choose_size(grown.expected)
        return grown.first(size) if size > 1 else None
    return gate.choose(trees, step.logprobs()) if answers(gate, "choose") else trees
