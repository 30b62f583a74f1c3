"""How probable the tokens of an answer were, and which others would have been."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LEAST = -9999.0  # OpenAI's, of what is forbidden: JSON has no infinity
_PRINTED = {*range(33, 127), *range(161, 173), *range(174, 256)}  # bytes that stand for themselves in GPT-2's alphabet
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]  # are its characters from 256 on
_BYTES = {chr(byte): byte for byte in _PRINTED} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}
_BYTES |= {f"<0x{byte:02X}>": byte for byte in range(256)}  # whole tokens, of SentencePiece


class Logprobs:
    """A logits processor that changes nothing: of each token of one text, its log-probability and the `top` best ones.

    They are the log softmax, in float32, of what comes: behind the rules of the generation_config, before temperature,
    top_k and top_p. `decode` calls it for each accepted token once, in order, with ids (1, S) and scores (1, V).
    found: of each token that was taken, (token, log-probability) of the token and of the best ones.
    """

    def __init__(self, top: int) -> None:
        self.found: list[list[tuple[int, float]]] = []
        self._top = top
        self._rows: list[Tensor] = []  # (1, V), of the tokens of a step

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        self._rows.append(scores.log_softmax(-1))
        return scores

    def take(self, tokens: Sequence[int]) -> None:
        """Those that the text has taken of a step. The step may have chosen more."""
        for token, row in zip(tokens, self._rows, strict=False):
            best = row[0].clamp(min=_LEAST).topk(min(self._top, row.shape[1]))
            own = max(row[0, token].item(), _LEAST)
            self.found.append([(token, own), *zip(best.indices.tolist(), best.values.tolist(), strict=True)])
        self._rows.clear()


@dataclass(frozen=True)
class Spelling:
    """How a token reads by itself: in the middle of a text, so that it keeps the space it begins with.

    bytes: also where they are a part of a character only; None: the tokenizer does not tell.
    """

    text: str
    bytes: list[int] | None

    @property
    def name(self) -> str:
        """As completions have it, where it is a key: of the parts of a character OpenAI's `bytes:\\xe2`."""
        if "\ufffd" not in self.text or self.bytes is None:
            return self.text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.bytes)


class Spellings:
    """Of a tokenizer's tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.of = lru_cache(1 << 16)(self._of)

    def _of(self, token: int) -> Spelling:
        once, twice = (str(self._tokenizer.decode([token] * times, skip_special_tokens=False)) for times in (1, 2))
        text = twice[len(once) :]
        if "\ufffd" not in text:
            return Spelling(text, list(text.encode()))
        name: Any = self._tokenizer.convert_ids_to_tokens(token)
        parts = [name] if name in _BYTES else list(name)
        known = all(part in _BYTES for part in parts)
        return Spelling(text, [_BYTES[part] for part in parts] if known else None)


@dataclass(frozen=True)
class Entry:
    """Of one token: where in the answer's text it begins, and the log-probabilities of it and of the best ones."""

    offset: int
    own: tuple[Spelling, float]
    best: list[tuple[Spelling, float]]


def of_chat(entries: Sequence[Entry]) -> dict[str, Any]:
    """As chat completions have them."""

    def put(spelling: Spelling, logprob: float) -> dict[str, Any]:
        return {"token": spelling.text, "logprob": logprob, "bytes": spelling.bytes}

    content = [{**put(*entry.own), "top_logprobs": [put(*other) for other in entry.best]} for entry in entries]
    return {"content": content, "refusal": None}


def of_completion(entries: Sequence[Entry]) -> dict[str, Any]:
    """As completions have them: the token itself is always among the best ones."""
    best = [[*entry.best, entry.own] for entry in entries]
    return {
        "tokens": [entry.own[0].name for entry in entries],
        "token_logprobs": [entry.own[1] for entry in entries],
        "top_logprobs": [{spelling.name: logprob for spelling, logprob in of_one} for of_one in best],
        "text_offset": [entry.offset for entry in entries],
    }
