"""A tokenizer for the tiny models."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast


def byte_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Each token is a byte, so that some characters take several."""
    letters = sorted(ByteLevel.alphabet())[:vocab]
    backend = Tokenizer(BPE({letter: token for token, letter in enumerate(letters)}, []))
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=backend)
