"""The ends of a model's positions, autocast: refused, or told of, in one sentence; and what our calls never warn of."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from stand_ins import OracleHeads
from tiny_models import VOCAB, generate, prompt, tiny_model
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from cerberus_ext.engine.checks import position_table
from cerberus_ext.engine.decode import decode
from cerberus_ext.engine.decoder import Decoder
from cerberus_ext.target.attention import names_attention


def opt() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "init_std": 0.3}
    config = OPTConfig(vocab_size=VOCAB, max_position_embeddings=40, word_embed_proj_dim=32, **sizes)
    return OPTForCausalLM(config).eval()


def gptj() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "initializer_range": 0.3}
    config = GPTJConfig(vocab_size=VOCAB, n_positions=40, bos_token_id=None, eos_token_id=None, **sizes)
    return GPTJForCausalLM(config).eval()


MODELS = {"gpt2": (lambda: tiny_model("gpt2"), 96), "opt": (opt, 40), "gptj": (gptj, 40)}


def known_model(name: str) -> tuple[PreTrainedModel, int]:
    make, positions = MODELS[name]
    model = make()
    if not names_attention(model):
        pytest.skip("its attention cannot be replaced in this version of transformers")
    return model, positions


@pytest.mark.parametrize("name", MODELS)
def test_to_the_last_position_and_no_further(name: str) -> None:
    model, positions = known_model(name)
    ids = prompt(length=positions - 10)
    model.generation_config.eos_token_id = None
    assert position_table(model) == positions
    want = generate(model, ids, max_new_tokens=11)
    with pytest.raises((IndexError, RuntimeError)):  # gptj's in earlier transformers
        generate(model, ids, max_new_tokens=12)
    heads = OracleHeads(want, 3, VOCAB)
    with pytest.warns(UserWarning, match="decode: max_new_tokens is 12, but the text ends after 11 tokens: .*LM"):
        out = decode(model, heads, ids, max_new_tokens=12, tree=8, streamer=heads)
    assert out.sequences.equal(want) and out.stats.tokens_per_step > 1.5
    streamed: list[int] = []
    with pytest.warns(UserWarning, match="decode: max_new_tokens is 12, but the text ends after 11 tokens") as said:
        for chunk in Decoder(model).stream(ids, max_new_tokens=12):
            streamed += chunk.tokens
    assert streamed == want[0, ids.shape[1] :].tolist() and said[0].filename == __file__
    with pytest.warns(UserWarning, match="decode: max_new_tokens is 12") as said:
        Decoder(model).decode(ids, max_new_tokens=12)
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert decode(model, None, ids, max_new_tokens=11).sequences.equal(want)
        # An end before the last position is no news, either.
        eos = int(want[0, positions - 5])
        ended = decode(model, None, ids, max_new_tokens=500, eos_token_id=eos).sequences
        assert ended.equal(generate(model, ids, max_new_tokens=11, eos_token_id=eos))


@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_beyond_the_last_position(name: str) -> None:
    model, positions = known_model(name)
    with pytest.warns(UserWarning, match="ends after 1 tokens"):
        assert decode(model, None, prompt(length=positions), max_new_tokens=3).stats.new_tokens == 1
    with pytest.raises(
        ValueError, match=f"^decode: ids must have at most {positions} tokens, the positions of .*LM.*, got"
    ):
        decode(model, None, prompt(length=positions + 1), max_new_tokens=3)


@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gemma2"])
def test_models_that_compute_their_positions_go_on(name: str) -> None:
    assert position_table(tiny_model(name)) is None


@pytest.mark.parametrize(("dtype", "other"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_autocast_to_another_dtype(dtype: torch.dtype, other: torch.dtype) -> None:
    heads = OracleHeads(prompt(), 3, VOCAB)
    model = tiny_model("llama", dtype=dtype)
    message = f"model must not run under autocast to another dtype than its own, {dtype}, got {other}: leave"
    with torch.autocast("cpu", dtype=other), pytest.raises(ValueError, match="^decode: " + message):
        decode(model, heads, prompt(), max_new_tokens=3, streamer=heads)
    assert heads.seen == 0


def test_autocast_to_the_same_dtype() -> None:
    model = copy.deepcopy(tiny_model("llama", dtype=torch.bfloat16))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = generate(model, prompt(), max_new_tokens=12)
        assert decode(model, None, prompt(), max_new_tokens=12).sequences.equal(want)


def longrope_phi3() -> PreTrainedModel:
    """Of 64 positions, originally of 16."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"))
    positions = {"max_position_embeddings": 64, "original_max_position_embeddings": 16, "rope_parameters": rope}
    torch.manual_seed(0)
    return Phi3ForCausalLM(Phi3Config(vocab_size=101, initializer_range=0.3, **sizes, **tokens, **positions)).eval()


@pytest.mark.parametrize(("length", "new"), [(9, 8), (16, 1), (17, 30)])
def test_text_ends_where_phi3_would_read_all_of_it_again(length: int, new: int) -> None:
    """`generate` drops the cache when a text grows beyond the original positions; one that begins there goes on."""
    model = longrope_phi3()
    ids = torch.arange(length)[None] * 7 % 101
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        text = decode(model, None, ids, max_new_tokens=30).sequences
    assert text.equal(generate(model, ids, max_new_tokens=30)[:, : length + new]) and text.shape[1] == length + new
    assert any("the text ends after" in str(one.message) for one in caught) == (new < 30)


def test_what_modules_keep_between_calls_is_not_of_a_trace() -> None:
    """Rotary encodings keep their long frequencies at every call; those of a traced step have no numbers."""
    model, untouched, ids = longrope_phi3(), longrope_phi3(), torch.arange(20)[None]
    decode(model, None, ids[:, :4], max_new_tokens=2)
    assert model(ids).logits.equal(untouched(ids).logits)
