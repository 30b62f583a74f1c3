"""`model.generate(custom_generate=cerberus_ext.generate)` returns what plain `generate` does, or refuses by name."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from generate_cases import CASES, EOS, NEW, Ban, cerberus, run
from stand_ins import OracleHeads, RandomHeads
from tiny_models import VOCAB, generated, prompt, tiny_model
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StopStringCriteria,
    T5Config,
    T5ForConditionalGeneration,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

import cerberus_ext
from cerberus_ext.drafting.gate import AlwaysClosed
from cerberus_ext.engine.custom_generate import _sampling
from cerberus_ext.engine.decode import decode


class Recording(BaseStreamer):
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.calls.append(value.tolist())

    def end(self) -> None:
        self.calls.append("end")


def tokens(result: Any) -> list[list[int]]:
    return (result if isinstance(result, Tensor) else result.sequences).tolist()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_as_generate(case: str, name: str) -> None:
    model, options = tiny_model(name), CASES[case]
    if "generation_config" in options:
        options = {"max_new_tokens": None, **options}
    want = run(model, prompt(), **options)
    text = torch.tensor(tokens(want))
    for heads in (RandomHeads(text, 3, VOCAB), OracleHeads(text, 3, VOCAB)):
        for tree in (9, None):
            got = cerberus(model, prompt(), heads=heads, tree=tree, streamer=heads, **options)
            assert tokens(got) == tokens(want) and type(got) is type(want)


def test_drafts_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle's, in fewer forwards than there are tokens: heads, and what else is of `decode`, arrive."""
    model, want = tiny_model("llama"), generated("llama", "cpu", NEW)
    runs = []
    real = cerberus_ext.Decoder.run
    monkeypatch.setattr(cerberus_ext.Decoder, "run", lambda *a, **k: runs.append(real(*a, **k)) or runs[-1])
    heads = OracleHeads(want, 3, VOCAB)
    assert cerberus(model, prompt(), heads=heads, streamer=heads, tree=9, fuse=False).equal(want)
    assert cerberus(model, prompt(), heads=heads, streamer=heads, gate=AlwaysClosed(), proposers=[]).equal(want)
    assert runs[0].stats.tokens_per_step > 2 and not runs[0].stats.fused
    assert runs[1].stats.tokens_per_step == 1


def test_without_heads_and_arguments() -> None:
    model = tiny_model("llama")
    assert cerberus(model, prompt()).equal(generated("llama", "cpu", NEW))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = model.generate(inputs=prompt(), max_length=30)
        assert model.generate(input_ids=prompt(), max_length=30, custom_generate=cerberus_ext.generate).equal(want)


def test_the_end_of_the_positions() -> None:
    model, ids = tiny_model("gpt2"), prompt(length=90)
    with pytest.raises(IndexError):
        run(model, ids)
    with pytest.warns(UserWarning, match="the text ends after 7 tokens"):
        out = model.generate(ids, max_new_tokens=NEW, do_sample=False, custom_generate=cerberus_ext.generate)
    assert out.equal(run(model, ids, max_new_tokens=7))


def test_stop_strings() -> None:
    """A StopStringCriteria is applied; transformers itself refuses stop_strings beside custom_generate."""
    model, tokenizer = tiny_model("llama"), byte_tokenizer(VOCAB)
    stop = [tokenizer.decode(generated("llama", "cpu", NEW)[0, 17:19])]
    want = run(model, prompt(), stop_strings=stop, tokenizer=tokenizer)
    assert 12 < want.shape[1] <= 19
    criteria: Any = [StopStringCriteria(tokenizer, stop)]
    assert cerberus(model, prompt(), stopping_criteria=criteria).equal(want)
    with pytest.raises(ValueError, match="could not locate a tokenizer"):
        cerberus(model, prompt(), stop_strings=stop, tokenizer=tokenizer)


def test_streamer() -> None:
    ours, theirs = Recording(), Recording()
    run(tiny_model("llama"), prompt(), streamer=theirs, eos_token_id=EOS)
    cerberus(tiny_model("llama"), prompt(), streamer=ours, eos_token_id=EOS)
    assert ours.calls == theirs.calls and ours.calls[-1] == "end"


def test_streamer_of_a_wrapped_generate(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by libraries that trace calls."""
    real, streamer = GenerationMixin.generate, Recording()
    monkeypatch.setattr(GenerationMixin, "generate", lambda *arguments, **options: real(*arguments, **options))
    cerberus(tiny_model("llama"), prompt(), streamer=streamer)
    assert len(streamer.calls) == NEW + 2


def test_streamer_of_a_callable_around_it() -> None:
    """As of one that a user has written; transformers hands it neither streamer nor heads of its own."""
    streamer, want = Recording(), generated("llama", "cpu", NEW)
    heads = OracleHeads(want, 3, VOCAB)
    heads.put(prompt())

    class Both(Recording):
        def put(self, value: Tensor) -> None:
            streamer.put(value)
            if value.dim() == 1:
                heads.put(value)

    out = run(
        tiny_model("llama"), prompt(), streamer=Both(),
        custom_generate=lambda *arguments, **options: cerberus_ext.generate(*arguments, heads=heads, **options),
    )  # fmt: skip
    assert out.equal(want) and len(streamer.calls) == NEW + 1


def test_a_refusal_ends_the_streamer() -> None:
    """A TextIteratorStreamer's reader does not wait for ever."""

    class Words:
        def decode(self, ids: Any, **_: Any) -> str:
            return " ".join(map(str, ids))

    streamer = TextIteratorStreamer(Words(), timeout=60)  # type: ignore[arg-type]
    errors = []

    def refused() -> None:
        try:
            cerberus(tiny_model("llama"), prompt(), streamer=streamer, output_attentions=True)
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=refused)
    thread.start()
    assert list(streamer)
    thread.join()
    assert len(errors) == 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "num_beams": ({"num_beams": 2}, "generate: generation_config must not have num_beams = 2: there are no beams"),
    "num_return_sequences": (
        {"num_return_sequences": 2, "do_sample": True},
        "generate: streamer must be None with 2 texts",
    ),
    "penalty_alpha": ({"penalty_alpha": 0.6, "top_k": 4}, "not have penalty_alpha = 0.6: contrastive search"),
    "dola_layers": ({"dola_layers": "low"}, "not have dola_layers = 'low'"),
    "prompt_lookup_num_tokens": ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens = 3: drafts are those"),
    "output_attentions": ({"output_attentions": True}, "output_attentions = True: steps keep nothing of what"),
    "output_hidden_states": ({"output_hidden_states": True}, "output_hidden_states = True"),
    "synced_gpus": ({"synced_gpus": True}, "generate: synced_gpus must not be set"),
    "past_key_values": ({"past_key_values": DynamicCache()}, "generate: (cache|past_key_values) must not be given"),
    "position_ids": ({"position_ids": torch.arange(3, 12)[None]}, "generate: position_ids must not be given"),
    "attention_mask": ({"attention_mask": torch.tensor([[1] * 2 + [0] + [1] * 6])}, "zeros only left or right"),
    "inputs_embeds": ({"inputs_embeds": torch.zeros(1, 9, 32)}, "generate: inputs_embeds must not be given"),
    "tree": ({"tree": 1}, "decode: tree must be"),
    "seed": ({"seed": 2**64, "do_sample": True}, "decode: seed must be"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    options, message = REFUSED[case]
    streamer = None if "num_beams" in options else Recording()
    ids: Any = {} if case == "inputs_embeds" else {"inputs": prompt()}
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny_model("llama").generate(
            **ids, max_new_tokens=4, custom_generate=cerberus_ext.generate, streamer=streamer, **options
        )
    assert streamer is None or streamer.calls[1:] == ["end"]  # behind the prompt, which `generate` itself hands out


def test_refused_models_and_rows() -> None:
    llama = tiny_model("llama")
    with pytest.raises(ValueError, match="generate: assistant_model must be None: drafts are those"):
        cerberus(llama, prompt(), assistant_model=tiny_model("llama"))
    with pytest.raises(ValueError, match="model_kwargs.* not used by the model: .*'flavour'"):
        cerberus(llama, prompt(), flavour=3)
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ).eval()
    with pytest.raises(ValueError, match="model must be decoder-only, T5ForConditionalGeneration"):
        cerberus(t5, prompt())
    padded = prompt().clone()
    padded[0, 3] = 0
    with pytest.raises(ValueError, match="attention_mask must have zeros only left or right"):
        cerberus(llama, padded)  # pad_token_id 0: `generate` takes it for padding


def test_sampled_text_does_not_depend_on_drafts() -> None:
    model, ids = tiny_model("llama"), prompt()
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "top_p": 0.95, "top_k": 40}
    for more in ({}, {"min_p": 0.02}, {"repetition_penalty": 1.3, "renormalize_logits": True}):
        want = cerberus(model, ids, seed=5, gate=AlwaysClosed(), **options, **more)
        for heads in (OracleHeads(want, 3, VOCAB), RandomHeads(want, 3, VOCAB)):
            assert cerberus(model, ids, seed=5, heads=heads, streamer=heads, **options, **more).equal(want)
        assert not cerberus(model, ids, seed=6, **options, **more).equal(want)
    want = decode(model, None, ids, max_new_tokens=NEW, temperature=1.3, top_p=0.95, top_k=40, seed=5).sequences
    assert cerberus(model, ids, seed=5, **options).equal(want)


def test_torchs_seed() -> None:
    """Without a seed, texts differ from call to call, and torch.manual_seed determines them."""
    model = tiny_model("llama")
    torch.manual_seed(3)
    first, second = (cerberus(model, prompt(), do_sample=True) for _ in range(2))
    torch.manual_seed(3)
    assert cerberus(model, prompt(), do_sample=True).equal(first) and not first.equal(second)
    state = torch.get_rng_state()
    cerberus(model, prompt())
    assert torch.get_rng_state().equal(state), "greedily nothing is drawn"


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7, "top_k": 4}, {"top_p": 0.6, "top_k": 0}, {"min_p": 0.2, "top_k": 0}, {"typical_p": 0.5}],
)
def test_probabilities_are_those_of_generate(options: dict[str, Any]) -> None:
    """Of the token after the prompt, over many seeds."""
    model, counts, draws = tiny_model("llama"), torch.zeros(VOCAB), 600
    for seed in range(draws):
        out = cerberus(model, prompt(), do_sample=True, max_new_tokens=1, seed=seed, fuse=False, **options)
        counts[out[0, -1]] += 1
    want = run(
        model, prompt(), do_sample=True, max_new_tokens=1, output_scores=True, return_dict_in_generate=True, **options
    )
    probabilities = want.scores[0][0].softmax(-1)
    assert not counts[probabilities == 0].any()
    assert (counts / draws - probabilities).abs().max() < 0.08


def test_warpers_of_the_user_stay() -> None:
    """What `generate` would not have made is applied as it is."""
    known = [TemperatureLogitsWarper(0.5), TopKLogitsWarper(4), TopPLogitsWarper(0.9)]
    assert _sampling(taken := LogitsProcessorList([Ban(), *known]), 3) == {
        "temperature": 0.5, "top_k": 4, "top_p": 0.9, "seed": 3
    } and len(taken) == 1  # fmt: skip
    other = [TemperatureLogitsWarper(0.5), TopKLogitsWarper(4, min_tokens_to_keep=9), TopPLogitsWarper(0.9)]
    assert _sampling(kept := LogitsProcessorList(other), 3) == {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    assert kept == other[:2]


def test_decode_takes_the_same() -> None:
    """generation_config in the place of the model's, and logits processors, also of a Decoder."""
    model, ids = tiny_model("llama"), prompt()
    config = GenerationConfig(repetition_penalty=1.3, renormalize_logits=True, eos_token_id=EOS)
    want = run(model, ids, repetition_penalty=1.3, eos_token_id=EOS, logits_processor=[Ban()])
    heads = OracleHeads(want, 3, VOCAB)
    options: dict[str, Any] = {"max_new_tokens": NEW, "generation_config": config, "logits_processor": [Ban()]}
    out = decode(model, heads, ids, streamer=heads, tree=9, **options)
    assert out.sequences.equal(want) and out.stats.tokens_per_step > 2
    with cerberus_ext.Decoder(model) as decoder:
        assert decoder.decode(ids, **options).sequences.equal(want)
        streamed = [token for chunk in decoder.stream(ids, **options) for token in chunk.tokens]
    assert streamed == want[0, ids.shape[1] :].tolist()
    with pytest.raises(ValueError, match=r"graphs .* processed on the host \(repetition_penalty, Ban, renormalize"):
        decode(model, None, ids, graphs=True, **options)
