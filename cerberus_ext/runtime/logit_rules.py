"""What a generation_config says about the text: applied as `generate(do_sample=False)` does, or refused by name.

A node's logits are processed by themselves, with the text and the node's own path as their context. So what comes out
never depends on the other nodes of the tree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence, Set
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from ..drafting.tree import Tree
from ..io.checks import call
from .sampling import Chooser, Sampling


class Context(NamedTuple):
    """ids (1, S): the prompt. max_length: of prompt and answer. eos (E,): end-of-text tokens, None: there are none."""

    ids: Tensor
    max_length: int
    eos: Tensor | None
    config: Any


def _is_set(value: Any, context: Context) -> bool:
    return value is not None


def _is_positive(value: Any, context: Context) -> bool:
    return value is not None and value > 0


def _is_not_one(value: Any, context: Context) -> bool:
    return value is not None and value != 1


def _is_true(value: Any, context: Context) -> bool:
    return value is True


def _delays_eos(value: Any, context: Context) -> bool:
    return context.eos is not None and _is_positive(value, context)


def _min_length(value: Any, context: Context) -> bool:
    # `generate` sets min_length by min_new_tokens where that is given.
    return context.config.min_new_tokens is None and _delays_eos(value, context)


def _first_place(context: Context) -> int:
    """Where the tokens of begin_suppress_tokens are forbidden: behind a token that is forced first."""
    prompt = context.ids.shape[1]
    return prompt + 1 if prompt == 1 and context.config.forced_bos_token_id is not None else prompt


# Fields of generation_config, in the order in which `generate` applies them before sampling: when the value says
# something, and transformers' processor for it, with its arguments.
RULES: tuple[tuple[str, Callable[[Any, Context], bool], str, Callable[[Any, Context], tuple[Any, ...]]], ...] = (
    ("sequence_bias", _is_set, "SequenceBias", lambda v, c: (v,)),
    ("encoder_repetition_penalty", _is_not_one, "EncoderRepetitionPenalty", lambda v, c: (v, c.ids)),
    ("repetition_penalty", _is_not_one, "RepetitionPenalty", lambda v, c: (v,)),
    ("no_repeat_ngram_size", _is_positive, "NoRepeatNGram", lambda v, c: (v,)),
    ("encoder_no_repeat_ngram_size", _is_positive, "EncoderNoRepeatNGram", lambda v, c: (v, c.ids)),
    ("bad_words_ids", _is_set, "NoBadWords", lambda v, c: (v, c.eos)),
    ("min_length", _min_length, "MinLength", lambda v, c: (v, c.eos)),
    ("min_new_tokens", _delays_eos, "MinNewTokensLength", lambda v, c: (c.ids.shape[1], v, c.eos)),
    ("forced_bos_token_id", _is_set, "ForcedBOSToken", lambda v, c: (v,)),
    ("forced_eos_token_id", _is_set, "ForcedEOSToken", lambda v, c: (c.max_length, v, c.ids.device)),
    ("remove_invalid_values", _is_true, "InfNanRemove", lambda v, c: ()),
    ("exponential_decay_length_penalty", _is_set, "ExponentialDecay", lambda v, c: (v, c.eos, c.ids.shape[1])),
    ("suppress_tokens", _is_set, "SuppressTokens", lambda v, c: (v, c.ids.device)),
    ("begin_suppress_tokens", _is_set, "SuppressTokensAtBegin", lambda v, c: (v, _first_place(c), c.ids.device)),
    ("renormalize_logits", _is_true, "LogitNormalization", lambda v, c: ()),
)
_OTHER_NAMES = {"ExponentialDecay": "ExponentialDecayLengthPenalty", "LogitNormalization": "LogitNormalization"}

# What changes the text of `generate`, and cannot be had from `decode`: field -> the values that it must not have, and
# what to do instead.
REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_beams": (lambda v: v > 1, "there are no beams"),
    "num_return_sequences": (lambda v: v > 1, "one text is returned"),
    "penalty_alpha": (lambda v: v > 0, "contrastive search is not supported"),
    "dola_layers": (lambda v: True, "DoLa is not supported"),
    "constraints": (lambda v: True, "constrained search is not supported"),
    "force_words_ids": (lambda v: True, "constrained search is not supported"),
    "guidance_scale": (lambda v: v != 1, "guidance takes a second forward for every token"),
    "watermarking_config": (lambda v: True, "watermarks are not supported"),
    "token_healing": (bool, "the prompt is taken as it is"),
    "is_assistant": (bool, "the model is the target model, no assistant"),
    "assistant_ensemble_weight": (lambda v: True, "every token is the target model's"),
    "cache_implementation": (lambda v: "quantized" in str(v), "the cache keeps what the model computes"),
    "max_time": (lambda v: True, "give stopping_criteria=[MaxTimeCriteria(...)]"),
    "stop_strings": (lambda v: True, "give stopping_criteria=[StopStringCriteria(tokenizer, ...)]"),
}

_NOTHING = -2  # no token of the model's, nor what stands for a draft that there is not


class LogitRules:
    """A Chooser: the processors of one text in front of its sampling, and the text so far.

    rules: the fields of generation_config, and the classes, that are applied. ids (1, S): the prompt. eos: tokens that
    end the text. seconds: what the processors took so far.
    """

    def __init__(
        self, rules: Sequence[str], processors: LogitsProcessorList, ids: Tensor, eos: Set[int], sampling: Sampling
    ) -> None:
        self.host_rules = tuple(rules)
        self.seconds = 0.0
        self.inexact_because = sampling.inexact_because
        self._processors = processors
        self._text = ids
        self._eos = eos
        self._sampling = sampling

    def first(self, logits: Tensor, positions: Tensor) -> Tensor:
        return self._sampling.choose(self._apply(self._text, logits), positions)

    def targets(self, logits: Tensor, tokens: Tensor, tree: Tree | None, positions: Tensor) -> Tensor:
        """_NOTHING after nodes that are not accepted, or that end the text: nothing is computed there.

        So processors are called as by `generate`, also those that count their calls or follow the text: for each token
        once, in order. Nodes of equal depth that are accepted have the same text, and what follows the first one
        follows all of them.
        """
        assert tree is not None
        drafts, chosen, parents = tokens[0].tolist(), [_NOTHING] * tree.size, tree.parents.tolist()
        text, follows = self._text[:, :-1], list[int]()  # the accepted path so far, and the token behind each depth
        for node, (parent, depth) in enumerate(zip(parents, tree.depths.tolist(), strict=True)):
            accepted = node == 0 or 0 <= chosen[parent] == drafts[node]
            if not accepted or node and drafts[node] in self._eos:
                continue
            if depth == len(follows):
                text = torch.cat([text, tokens[:, node : node + 1]], 1)
                processed = self._apply(text, logits[:, node])
                children = [token for token, above in zip(drafts, parents, strict=True) if above == node]
                follows.append(self._sampling.follow(processed, positions[:, node], children))
            chosen[node] = follows[depth]
        return tokens.new_tensor([chosen])

    def extend(self, tokens: list[int]) -> None:
        self._text = torch.cat([self._text, self._text.new_tensor([tokens])], 1)

    def _apply(self, ids: Tensor, logits: Tensor) -> Tensor:
        process: Any = self._processors
        begin = time.perf_counter()
        try:
            return call("decode: logits_processor", process, ids, logits.to(torch.float32, copy=True))
        finally:
            self.seconds += time.perf_counter() - begin


def check_refused(whose: str, config: Any, refused: dict[str, tuple[Callable[[Any], bool], str]]) -> None:
    """whose: the configuration's name. Raises ValueError for a field with a value that it must not have."""
    for field, (refuses, instead) in refused.items():
        value = getattr(config, field, None)
        if value is not None and refuses(value):
            raise ValueError(f"{whose} must not have {field} = {value!r}: {instead}")


def logit_rules(
    model: PreTrainedModel, ids: Tensor, max_new_tokens: int, eos_token_ids: frozenset[int], sampling: Sampling,
    generation_config: Any = None, own: Sequence[Any] = (),
) -> Chooser:  # fmt: skip
    """ids (1, S): the prompt -> what chooses as generation_config asks for, None: the model's; own: further processors.

    Raises ValueError, naming the field, for what is not supported or does not fit the model.
    """
    whose = "decode: generation_config" if generation_config is not None else "decode: model.generation_config"
    config: Any = generation_config or model.generation_config or GenerationConfig()
    check_refused(whose, config, REFUSED)
    eos = torch.tensor(sorted(eos_token_ids), device=ids.device) if eos_token_ids else None
    context = Context(ids, ids.shape[1] + max_new_tokens, eos, config)
    rules, processors = [], LogitsProcessorList()
    for field, active, name, arguments in RULES:
        if field == "renormalize_logits":  # the last one: in `generate`, too, it comes behind the user's
            rules += [type(processor).__name__ for processor in own]
            processors += own
        value = getattr(config, field, None)
        try:
            if not active(value, context):
                continue
            name = _OTHER_NAMES.get(name, f"{name}LogitsProcessor")
            processor = getattr(transformers, name)(*arguments(value, context))
            # Once, on nothing: token ids that the model does not have are better found before the first token.
            processor(ids, torch.zeros((1, model.get_output_embeddings().weight.shape[0]), device=ids.device))
        except Exception as error:
            raise ValueError(f"{whose} must have a {field} that fits, got {value!r}: {error}") from error
        rules.append(field)
        processors.append(processor)
    return LogitRules(rules, processors, ids, eos_token_ids, sampling) if rules else sampling
