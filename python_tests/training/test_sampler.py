"""The batched sampler of the data stage."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny_models import VOCAB, generate, tiny_model
from torch import Tensor

from cerberus_ext.training.sampler import Text, draw, write_texts

NEVER: frozenset[int] = frozenset()


def text(prompt: Sequence[int], limit: int, temperature: float = 0.0, top_p: float = 0.95) -> Text:
    noise = torch.rand(limit, generator=torch.Generator().manual_seed(sum(prompt)))
    return Text(prompt, temperature, top_p, noise)


def prompts(count: int) -> list[list[int]]:
    """Of 1 to 13 tokens, in no order of length."""
    draws = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB, (1 + 7 * i % 13,), generator=draws).tolist() for i in range(count)]


def written(name: str, texts: list[Text], rows: int, stop: frozenset[int] = NEVER) -> list[list[int]]:
    write_texts(tiny_model(name), texts, stop, rows, lambda count: None)
    return [one.new for one in texts]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2"])
def test_greedy_texts_are_what_generate_writes(name: str) -> None:
    asked, limits = prompts(7), [20, 3, 12, 1, 20, 7, 16]
    found = written(name, [text(prompt, limit) for prompt, limit in zip(asked, limits, strict=True)], rows=4)
    for prompt, limit, new in zip(asked, limits, found, strict=True):
        expected = generate(tiny_model(name), torch.tensor([prompt]), max_new_tokens=limit)[0, len(prompt) :]
        assert new == expected.tolist()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_text_does_not_depend_on_its_company(temperature: float) -> None:
    def texts() -> list[Text]:
        return [text(prompt, 5 + 3 * i, temperature) for i, prompt in enumerate(prompts(6))]

    together = written("llama", texts(), rows=6)
    assert written("llama", texts(), rows=1) == written("llama", texts(), rows=4) == together
    assert written("llama", texts()[::-1], rows=3) == together[::-1]


def test_a_stop_token_ends_a_text_and_belongs_to_it() -> None:
    free = written("llama", [text(prompt, 20) for prompt in prompts(5)], rows=5)
    stop = frozenset({free[0][6], free[3][0]})
    for one, new in zip(free, written("llama", [text(p, 20) for p in prompts(5)], rows=5, stop=stop), strict=True):
        ends = [i for i, token in enumerate(one) if token in stop]
        assert new == (one[: ends[0] + 1] if ends else one)


def test_progress_counts_the_tokens_that_are_written() -> None:
    counts: list[int] = []
    texts = [text([5, 6, 7], limit) for limit in (2, 3, 4, 8, 8, 8, 8, 9)]
    write_texts(tiny_model("llama"), texts, NEVER, 8, counts.append)
    assert counts == [8, 8, 7, 6, 5, 5, 5, 5, 1] and sum(counts) == sum(len(one.new) for one in texts)


def exact(logits: Tensor, top_p: float) -> Tensor:
    """Softmax cut to the most likely tokens with mass top_p, (V,), in float64."""
    values, ids = logits.double().softmax(-1).sort(descending=True)
    kept = values.cumsum(-1) - values < top_p
    return torch.zeros_like(values).scatter(0, ids, values * kept) / (values * kept).sum()


@pytest.mark.parametrize(("vocab", "spread"), [(11, 1.0), (600, 3.0), (600, 0.1)])
@pytest.mark.parametrize("top_p", [0.3, 0.95, 1.0])
def test_draws_follow_the_distribution_cut_at_top_p(vocab: int, spread: float, top_p: float) -> None:
    """Noise in even steps draws each token as often as its probability says; 600 flat ones need the whole sort."""
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(0)) * spread
    noise = (torch.arange(20_000) + 0.5) / 20_000
    found = torch.cat(
        [draw(logits.expand(len(part), -1), torch.full_like(part, top_p), part) for part in noise.split(500)]
    )
    share = torch.bincount(found, minlength=vocab) / len(noise)
    expected = exact(logits, top_p)
    assert not share[expected == 0].any()
    torch.testing.assert_close(share.double(), expected, rtol=0, atol=2e-4)


def test_noise_at_its_ends() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -9.0]])
    for top_p, last in ((0.5, 0), (0.7, 1), (1.0, 3)):
        for noise, expected in ((0.0, 0), (1 - 2**-24, last)):
            assert draw(logits, torch.tensor([top_p]), torch.tensor([noise])).item() == expected
