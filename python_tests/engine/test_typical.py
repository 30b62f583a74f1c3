"""acceptance="typical": what Medusa's rule accepts, of trees by hand and against its formula; and that it is lossy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batches import NEW, equal, plain_heads, prompts, texts_of
from generate_cases import cerberus
from tiny_families import tiny_family
from tiny_models import prompt, tiny_model
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor

from cerberus_ext import AlwaysClosed, Decoder, StaticPolicy, decode, ops
from cerberus_ext.drafting.tree import Tree, tree_of_ranks
from cerberus_ext.runtime.sampling import Sampling, Typical

TREE = StaticPolicy.from_widths([2, 2])
HOT: dict[str, Any] = {"temperature": 3.0, "seed": 4}  # flat enough for drafts at random to be typical
LOSSY: dict[str, Any] = {**HOT, "acceptance": "typical"}


def accepted_path(sampling: Sampling, logits: Tensor, tokens: Tensor, tree: Tree) -> tuple[list[int], list[int]]:
    """logits (N, V), tokens (N,) -> the accepted nodes, and what follows each node."""
    topology = tree.on(logits.device)
    target = sampling.targets(logits[None], tokens[None], tree, 7 + topology.depths[None])
    path, _ = ops.verify_tree(tokens[None], target, topology.parents, topology.ancestors, tree.size - 1)
    return [node for node in path[0].tolist() if node >= 0], target[0].tolist()


# exp(-entropy) is 0.2, 0.66 and 0.31: a draft needs 0.3 * 0.2 = 0.06 after FLAT, 0.09 after the others.
FLAT, STEEP, UNEVEN = [0.2, 0.2, 0.2, 0.2, 0.2], [0.895, 0.08, 0.015, 0.005, 0.005], [0.42, 0.42, 0.08, 0.05, 0.03]
#   0 - 1 - 3
#     - 2 - 4 - 5
BOTH = tree_of_ranks([-1, 0, 0, 1, 2, 4], [0, 0, 1, 0, 0, 0])


@pytest.mark.parametrize(
    ("seed", "drafts", "probabilities", "path"),
    [
        (2, [1, 2, 3, 4, 1], [FLAT] * 6, [0, 2, 4, 5]),  # all are typical: the longest
        (2, [1, 2, 0, 1, 1], [FLAT, FLAT, STEEP, FLAT, FLAT, FLAT], [0, 1, 3]),  # node 4 has 0.08, of 0.09
        (2, [1, 2, 1, 0, 1], [FLAT, STEEP, STEEP, FLAT, STEEP, FLAT], [0, 2, 4]),  # 3 and 5 have
        (2, [3, 2, 1, 1, 0], [FLAT, STEEP, STEEP, FLAT, FLAT, FLAT], [0, 1]),  # 3 and 4 have: of equals the first
        (2, [2, 3, 0, 0, 0], [UNEVEN, FLAT, FLAT, FLAT, FLAT, FLAT], [0]),  # 0.08 and 0.05
        (0, [2, 3, 0, 0, 0], [UNEVEN, FLAT, FLAT, FLAT, FLAT, FLAT], [0, 1, 3]),  # but 2 was drawn
        (2, [2, 1, 0, 0, 0], [UNEVEN, FLAT, FLAT, FLAT, FLAT, FLAT], [0, 2, 4, 5]),
        (2, [-1, 5, 0, 0, 0], [FLAT] * 6, [0]),  # what is no token
    ],
)
def test_by_hand(seed: int, drafts: list[int], probabilities: list[list[float]], path: list[int]) -> None:
    tokens, logits = torch.tensor([0, *drafts]), torch.tensor(probabilities).log()
    drawn = Sampling(seed, 1.0).choose(logits, 7 + BOTH.on(logits.device).depths).tolist()
    assert drawn[0] == (2 if seed == 0 else 1) and all(drawn[n] == 0 for n in range(6) if probabilities[n] is STEEP)
    found, target = accepted_path(Typical(seed, 1.0), logits, tokens, BOTH)
    assert found == path and target[path[-1]] == drawn[path[-1]]


@pytest.mark.parametrize("cut", [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 5, "top_p": 0.8}], ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
def test_random_trees_against_the_formula(cut: dict[str, Any], temperature: float) -> None:
    generator = torch.Generator().manual_seed(3)
    longer = 0
    for number in range(60):
        parents = [-1, *(int(torch.randint(node, (), generator=generator)) for node in range(1, 12))]
        tree = tree_of_ranks(parents, [0] * 12)
        logits = 2 * torch.randn(12, 9, generator=generator)
        tokens = torch.randint(-1, 10, (12,), generator=generator)
        exact, drawn = accepted_path(Sampling(number, temperature, **cut), logits, tokens, tree)
        found, _ = accepted_path(Typical(number, temperature, **cut), logits, tokens, tree)
        accepted = [0]
        for node in range(1, 12):
            if parents[node] in accepted and (
                int(tokens[node]) == drawn[parents[node]]
                or is_typical(logits[parents[node]], int(tokens[node]), temperature, **cut)
            ):
                accepted.append(node)
        assert set(found) <= set(accepted) and len(found) == 1 + max(int(tree.depths[node]) for node in accepted)
        assert len(found) >= len(exact)
        longer += len(found) > len(exact)
    assert longer > 5


def is_typical(
    logits: Tensor, token: int, temperature: float, top_k: int = 9, top_p: float = 1.0, min_p: float = 0.0
) -> bool:
    ranked = sorted(((p, i) for i, p in enumerate((logits.double() / temperature).softmax(-1).tolist())), reverse=True)
    kept = [(p, i) for p, i in ranked if p >= min_p * ranked[0][0]][:top_k]
    total, before = sum(p for p, _ in kept), 0.0
    found = {}
    for p, i in kept:
        if before < top_p * total:
            found[i] = p
        before += p
    p = torch.tensor(list(found.values()), dtype=torch.float64) / sum(found.values())
    lowest = min(0.09, 0.3 * float((p * p.log()).sum().exp()))
    return found.get(token, 0.0) / sum(found.values()) > lowest


@pytest.mark.parametrize("fuse", [None, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_tokens_a_step_and_another_text(dtype: torch.dtype, fuse: bool | None) -> None:
    model = tiny_family("llama", dtype)
    torch.manual_seed(4)
    heads = plain_heads(model, dtype)
    options: dict[str, Any] = {"max_new_tokens": 40, "tree": TREE, "fuse": fuse}
    exact, lossy = (decode(model, heads, prompt(), **options, **sampling) for sampling in (HOT, LOSSY))
    assert exact.stats.exact and exact.stats.tokens_per_step < 1.3
    assert lossy.stats.tokens_per_step > 2 and not lossy.sequences.equal(exact.sequences)
    assert not lossy.stats.exact and lossy.stats.inexact_because is not None
    assert "acceptance='typical'" in lossy.stats.inexact_because
    assert decode(model, heads, prompt(), **options, **LOSSY).sequences.equal(lossy.sequences), "by seed and drafts"
    undrafted = decode(model, heads, prompt(), max_new_tokens=40, fuse=fuse, gate=AlwaysClosed(), **LOSSY)
    assert undrafted.sequences.equal(exact.sequences)


@pytest.mark.parametrize("config", [None, GenerationConfig(repetition_penalty=1.2)], ids=["plain", "penalty"])
@pytest.mark.parametrize("slots", [2, 5])
def test_each_row_is_the_row_alone(slots: int, config: GenerationConfig | None) -> None:
    """With a tree that does not depend on the other rows."""
    model, rows = tiny_family("llama"), prompts([4, 13, 1, 6, 9])
    torch.manual_seed(4)
    heads = plain_heads(model, torch.float32)
    options: dict[str, Any] = {"max_new_tokens": NEW, "tree": TREE, "generation_config": config, **LOSSY}
    want = [decode(model, heads, row, **options | {"seed": 4 + number}) for number, row in enumerate(rows)]
    out = decode(model, heads, rows, slots=slots, **options)
    equal(texts_of(out.sequences, rows), [one.sequences for one in want])
    assert out.stats.tokens_per_step > 2 and not out.stats.exact and not out.stats.rows[1].exact


class InOrder(LogitsProcessor):
    """Is called once for each token, with the text before it."""

    def __init__(self) -> None:
        self.text: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        assert input_ids.shape[0] == 1 and input_ids[0, :-1].tolist() == self.text or not self.text
        self.text = input_ids[0].tolist()
        return scores


@pytest.mark.parametrize("policy", [StaticPolicy.chain(3), TREE], ids=["chain", "tree"])
def test_behind_processors(policy: StaticPolicy) -> None:
    """Of a chain the same is accepted as without them; of a tree the first typical child is, whatever is below it."""
    model = tiny_family("llama")
    torch.manual_seed(4)
    heads, processor = plain_heads(model, torch.float32), InOrder()
    options: dict[str, Any] = {"max_new_tokens": 30, "tree": policy, **LOSSY}
    out = decode(model, heads, prompt(), logits_processor=[processor], **options)
    assert processor.text == out.sequences[0, : len(processor.text)].tolist() and len(processor.text) >= 38
    assert out.stats.tokens_per_step > 2
    if policy is not TREE:
        assert out.sequences.equal(decode(model, heads, prompt(), **options).sequences)


def test_in_generate() -> None:
    model = tiny_model("llama")
    torch.manual_seed(4)
    heads = plain_heads(model, torch.float32)
    got = cerberus(model, prompt(), heads=heads, tree=TREE, do_sample=True, top_k=0, **LOSSY)
    assert got.equal(decode(model, heads, prompt(), tree=TREE, max_new_tokens=24, **LOSSY).sequences)
    with pytest.raises(ValueError, match="^decode: acceptance must be 'exact' where temperature is 0, got 'typical'"):
        cerberus(model, prompt(), acceptance="typical")


def test_a_conversation_goes_on_from_its_cache() -> None:
    """What was accepted was computed as any other text is."""
    model = tiny_family("llama")
    torch.manual_seed(4)
    with Decoder(model, plain_heads(model, torch.float32), tree=TREE) as decoder:
        first = decoder.decode(prompt(), max_new_tokens=NEW, **LOSSY).sequences
        again = decoder.decode(first, max_new_tokens=NEW, **LOSSY)
    assert again.stats.reused_tokens == first.shape[1] - 1
    assert again.sequences.equal(decode(model, decoder.heads, first, max_new_tokens=NEW, tree=TREE, **LOSSY).sequences)


def test_steps_are_not_recorded() -> None:
    with pytest.raises(ValueError, match=r"graphs must be None or False here, got True: .* \(acceptance='typical'\)"):
        decode(tiny_model("llama"), None, prompt(), graphs=True, **LOSSY)
