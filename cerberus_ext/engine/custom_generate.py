"""`generate`: what transformers' `model.generate(custom_generate=...)` calls in the place of its own loop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import GenerateDecoderOnlyOutput

from ..drafting.drafter import HeadsLike
from ..drafting.gate import Gate
from ..drafting.proposers import ProposerFactory
from ..drafting.tree import TreePolicy
from ..runtime.logit_rules import REFUSED, check_refused
from .decoder import Decoder
from .request import seed_of_row
from .text import ends_streamer

_ASSISTED = "drafts are those of heads and proposers"
_INSIDE = "steps keep nothing of what is inside the model"
# Of REFUSED, what transformers has made rows, processors and stopping criteria of.
_APPLIED = ("num_return_sequences", "guidance_scale", "watermarking_config", "max_time", "stop_strings")
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    **{field: row for field, row in REFUSED.items() if field not in _APPLIED},
    **dict.fromkeys(("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"), (bool, _ASSISTED)),
    **dict.fromkeys(("output_attentions", "output_hidden_states"), (bool, _INSIDE)),
}
_PREPARED = ("position_ids", "cache", "past_key_values", "cache_params")  # made by `generate` where the user gives none
_HARMLESS = ("logits_to_keep", "use_cache")
# Rows are decoded each at its own pace, and these processors keep what they have seen of all of them.
_OF_ONE_TEXT = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)
# `generate` has them in the opposite order.
_WARPERS: dict[str, Any] = {
    "top_p": TopPLogitsWarper,
    "top_k": TopKLogitsWarper,
    "temperature": TemperatureLogitsWarper,
}


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    /,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    heads: HeadsLike | None = None,
    tree: int | TreePolicy | None = None,
    gate: Gate | None = None,
    proposers: Sequence[ProposerFactory] | None = None,
    seed: int | None = None,
    acceptance: str = "exact",
    graphs: bool | None = None,
    fuse: bool | None = None,
    pack: bool | None = None,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """`model.generate(ids, custom_generate=cerberus_ext.generate, heads=heads, ...)`: the same text, in fewer forwards.

    heads, tree, gate, proposers, acceptance, graphs, fuse, pack: as in `decode`. All other arguments are those of
    `model.generate` with prompts (B, S), padded left or right; transformers prepares them and calls this. Of several,
    logits processors must look at nothing but their arguments.
    do_sample: tokens are drawn from the same probabilities as by `generate`, but with the noise of `decode`, by seed
        and position: other tokens than those of `generate`, and the same with and without drafts. seed None: one is
        drawn from torch's generator, so that torch.manual_seed determines the text here, too.
    num_return_sequences: R texts of each prompt; row r of all has the seed `seed + r`.
    streamer: gets what `generate` gives it, of one text; its `end` is called once, also where this raises.

    Returns sequences (B R, S + new) int64, padded as by `generate`. Where return_dict_in_generate is set, a
    GenerateDecoderOnlyOutput with them, and for each new token with scores and logits, (B R, V) float32, where they are
    asked for; 0 for rows that have ended. Raises ValueError, naming the argument, for what there is not: beams,
    assisted generation, contrastive search, a cache or mask of one's own ...; otherwise as `decode`. For stop_strings
    give stopping_criteria=[StopStringCriteria(tokenizer, ...)]: transformers takes no tokenizer beside custom_generate.
    """
    given = _arguments_of_generate()

    @ends_streamer
    def texts(*, streamer: Any) -> list[dict[str, Any]]:
        decoder = Decoder(model, heads, tree=tree, gate=gate, proposers=proposers, graphs=graphs, fuse=fuse, pack=pack)
        check_refused("generate: generation_config", generation_config, _REFUSED)
        _check_arguments(model, model_kwargs, given)
        if streamer is not None and len(input_ids) > 1:
            raise ValueError(f"generate: streamer must be None with {len(input_ids)} texts")
        if len(input_ids) > 1 and (
            kind := next((type(p) for p in logits_processor if isinstance(p, _OF_ONE_TEXT)), None)
        ):
            raise ValueError(
                f"generate: {kind.__name__} remembers one text, so that ids must have one row, got several"
            )
        put_to, mask = None if streamer is None else _AfterPrompt(streamer), model_kwargs.get("attention_mask")
        first: Any = int(torch.randint(2**63 - 1, ())) if seed is None and generation_config.do_sample else seed
        at_once = 1 if _keeps(generation_config) else len(input_ids)
        return [
            _text(
                decoder, input_ids[row : row + at_once], logits_processor, stopping_criteria, generation_config,
                seed_of_row(int(first), row) if row and generation_config.do_sample else first,
                streamer=put_to, acceptance=acceptance,
                attention_mask=None if mask is None else mask[row : row + at_once],
            )
            for row in range(0, len(input_ids), at_once)
        ]  # fmt: skip

    made = texts(streamer=given.get("streamer") if streamer is None else streamer)
    padding = getattr(generation_config, "_pad_token_tensor", None)
    rows = [row for text in made for row in text.pop("sequences")]
    sequences = pad_sequence(rows, batch_first=True, padding_value=0 if padding is None else int(padding))
    if not generation_config.return_dict_in_generate:
        return sequences
    kept: dict[str, Any] = {name: _by_token([text[name] for text in made]) for name in made[0]}
    return GenerateDecoderOnlyOutput(sequences=sequences, **kept)  # type: ignore[arg-type]


def _arguments_of_generate() -> Mapping[str, Any]:
    """The local variables of the `generate` that called; empty: none did.

    To a callable, transformers 5.6 to 5.24 hand neither the streamer nor the assistant, and caches and positions of the
    user's look like their own.
    """
    sought = ("generate", GenerationMixin.__module__)
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and (frame.f_code.co_name, frame.f_globals.get("__name__")) != sought:
        frame = frame.f_back
    return {} if frame is None else frame.f_locals


def _check_arguments(model: PreTrainedModel, model_kwargs: dict[str, Any], given: Mapping[str, Any]) -> None:
    if getattr(vars(model).get("prepare_inputs_for_generation", model), "__self__", model) is not model:
        raise ValueError("generate: model must make its inputs of tokens alone, another one makes them: prompt tuning?")
    if given.get("assistant_model") is not None:
        raise ValueError(f"generate: assistant_model must be None: {_ASSISTED}")
    if given.get("synced_gpus"):
        raise ValueError("generate: synced_gpus must not be set: the model is on one device")
    own = given.get("kwargs", {})
    for name, value in model_kwargs.items():
        if value is None or name in ("attention_mask", *_HARMLESS) or name in _PREPARED and name not in own:
            continue
        raise ValueError(f"generate: {name} must not be given: with cerberus_ext.generate the model gets tokens alone")


def _keeps(config: GenerationConfig) -> list[str]:
    """What is kept of each token, for which texts are decoded one by one."""
    return [
        name for name in ("logits", "scores") if config.return_dict_in_generate and getattr(config, f"output_{name}")
    ]


def _text(
    decoder: Decoder, ids: Tensor, processors: LogitsProcessorList, criteria: StoppingCriteriaList,
    config: GenerationConfig, seed: Any, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """sequences (B, S + new), and of one text scores and logits of each new token, (1, V), if config asks for them."""
    length = ids.shape[1]
    options |= _options(length, criteria, config.pad_token_id)
    own, warpers = list(processors), list[Any]()
    if config.do_sample:
        options |= _sampling(own, seed)
        warpers = processors[len(own) :]
    kept: dict[str, _Kept] = {}
    if "logits" in _keeps(config):
        own.insert(0, kept.setdefault("logits", _Kept([])))
    if "scores" in _keeps(config):
        own.append(kept.setdefault("scores", scores := _Kept(warpers)))
        if stops := StoppingCriteriaList(options["stopping_criteria"]):
            options["stopping_criteria"] = [lambda ids, _: stops(ids, tuple(scores.rows[: ids.shape[1] - length]))]
    sequences = decoder.run(ids, logits_processor=own, **options).sequences
    return {"sequences": sequences} | {name: of.rows[: sequences.shape[1] - length] for name, of in kept.items()}


def _options(length: int, criteria: StoppingCriteriaList, pad: int | None) -> dict[str, Any]:
    """What transformers has made of the arguments, as options of `decode`. length: the prompts'. pad: their padding."""
    max_length = min(c.max_length for c in criteria if type(c) is MaxLengthCriteria)
    return {
        "max_new_tokens": max(1, max_length - length),  # `generate` writes a token before it looks
        "eos_token_id": [token for c in criteria if type(c) is EosTokenCriteria for token in c.eos_token_id.tolist()],
        "stopping_criteria": [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)],
        "generation_config": GenerationConfig(pad_token_id=pad),  # all else that it asks for is in the lists
    }


def _sampling(processors: list[Any], seed: Any) -> dict[str, Any]:
    """Options of `decode` for drawing as the processors do; those at their end that it knows are taken off.

    The other ways of cutting probabilities off (min_p, ...) stay: they are applied like rules.
    """
    options: dict[str, Any] = {"temperature": 1.0, "seed": seed}
    for name, kind in _WARPERS.items():
        last: Any = processors[-1] if processors else None
        if type(last) is kind and vars(last) == vars(kind(getattr(last, name))):  # as `generate` makes it
            options[name] = getattr(last, name)
            processors.pop()
    return options


def _by_token(texts: list[list[Tensor]]) -> tuple[Tensor, ...]:
    """Of each text, (1, V) by token -> (R, V) by token."""
    return tuple(torch.cat(rows) for rows in zip_longest(*texts, fillvalue=torch.zeros_like(texts[0][0])))


class _Kept:
    """A logits processor that keeps what comes to it, as the warpers, which follow, make it: rows, (1, V) by token."""

    def __init__(self, warpers: list[Any]) -> None:
        self.rows: list[Tensor] = []
        self._warpers = LogitsProcessorList(warpers)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        with torch.inference_mode(False):  # what the caller gets he may compute with
            warp: Any = self._warpers
            self.rows.append(warp(ids, scores.clone()))
        return scores


class _AfterPrompt:
    """A streamer for what follows the prompt, which `generate` has handed out itself."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._prompt = True

    def put(self, tokens: Tensor) -> None:
        if not self._prompt:
            self._streamer.put(tokens)
        self._prompt = False

    def end(self) -> None:
        """Is called for the user's own streamer."""
