"""The parts of trees new at every step, and what is said of those, and of proposers, that are wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from proposer_stand_ins import KnowingMaker, table
from stand_ins import OracleHeads
from tiny_models import VOCAB, generated, prompt, tiny_model
from transformers import PreTrainedModel

from cerberus_ext import CerberusConfig, CerberusHeads
from cerberus_ext.drafting import dynamic_policy
from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.gate import ConfidenceGate
from cerberus_ext.drafting.proposers import HeadsDrafts
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.drafting.suffix import DocumentProposer, SuffixProposer
from cerberus_ext.drafting.tree import Tree
from cerberus_ext.engine.decode import decode

NEW = 24


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.mark.parametrize(
    ("size", "sizes"), [(2, (1, 2)), (4, (1, 4)), (5, (1, 4, 5)), (16, (1, 4, 8, 16)), (70, (1, 4, 8, 16, 32, 64, 70))]
)
def test_sizes(size: int, sizes: tuple[int, ...]) -> None:
    assert DynamicPolicy(size).sizes == sizes


def test_step_tree() -> None:
    parents, probabilities = np.array([-1, 0, 1, 0, 2]), np.array([1.0, 0.5, 0.25, 0.25, 0.125])
    tree = Tree(parents, np.array([0, 7, 8, 9, 7]), np.array([0, 0, 1, 0, 1]), probabilities)
    assert (tree.size, tree.depth, tree.depths.tolist()) == (5, 3, [0, 1, 2, 1, 3])
    assert tree.expected_tokens.tolist() == [1, 1.5, 1.75, 2, 2.125]
    assert tree.first(5) is tree and tree.first(9) is tree
    small = tree.first(3)
    assert (
        small.parents.tolist() == [-1, 0, 1] and small.depth == 2 and small.expected_tokens.tolist() == [1, 1.5, 1.75]
    )
    tensors = tree.on(torch.device("cpu"))
    assert small.tokens.tolist() == [0, 7, 8] and tensors.parents.tolist() == parents.tolist()
    assert tensors.ancestors.tolist() == [[0b1], [0b11], [0b111], [0b1001], [0b10111]]


class CountedHeads:
    """Heads with some drafts of 9 tokens at each of 3 depths, their probabilities together less than 1."""

    def __init__(self, generator: np.random.Generator) -> None:
        self.asked = 0
        logits = generator.normal(size=(3, 10)) * 3
        order = (-logits[:, :9]).argsort(1, "stable")
        self._ids, every = order.astype(np.int64), np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        self._logprobs = np.log(np.take_along_axis(every, order, 1)).astype(np.float32)

    def drafts(self) -> HeadsDrafts:
        self.asked += 1
        return HeadsDrafts(self._ids, self._logprobs)


@pytest.mark.parametrize("size", [2, 3, 4, 6])
def test_heads_are_not_asked_where_none_of_their_drafts_could_win(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees are what they would be otherwise."""
    generator, asked = np.random.default_rng(size), list[bool]()
    for _ in range(200):
        path = generator.integers(0, 9, 5), generator.random(5) ** 0.3

        class Past:
            def extend(self, tokens: list[int]) -> None: ...

            def propose(self, max_depth: int, path: Any = path) -> tuple[np.ndarray, np.ndarray]:
                return path[0][:max_depth], path[1][:max_depth]

        heads, trees = CountedHeads(generator), DynamicPolicy(size).begin([Past()], 9)
        got = trees.grow(heads, 5, True)
        asked.append(heads.asked > 0)
        with monkeypatch.context() as patch:
            patch.setattr(dynamic_policy, "_fills", lambda *arguments: False)
            want = trees.grow(heads, 5, True)
        assert np.array_equal(got.parents, want.parents) and np.array_equal(got.tokens, want.tokens)
        assert (got.probabilities <= want.probabilities + 1e-6).all()
    assert 0.1 < np.mean(asked) < 0.9


WRONG_TREES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"size": 1}, ValueError, "size must be in 2..1024, got 1"),
    ({"size": 1025}, ValueError, "size must be in 2..1024, got 1025"),
    ({"size": 4.0}, TypeError, "size must be an integer, got 4.0"),
    ({"size": True}, TypeError, "size must be an integer, got True"),
    ({"size": 4, "drafts": 0}, ValueError, "drafts must be in 1..32, got 0"),
    ({"size": 4, "drafts": 33}, ValueError, "drafts must be in 1..32, got 33"),
    ({"size": 4, "platt": ((1, 2, 3),)}, TypeError, r"platt must be \(slope, shift\) of every head, got"),
    ({"size": 4, "platt": 3}, TypeError, r"platt must be \(slope, shift\) of every head, got 3"),
    ({"size": 4, "platt": (("a", 1),)}, TypeError, r"platt must be \(slope, shift\) of every head, got"),
    ({"size": 4, "platt": ((float("nan"), 1),)}, ValueError, r"platt must be \(slope, shift\) .*nan"),
]


@pytest.mark.parametrize(("values", "error", "message"), WRONG_TREES, ids=[message for *_, message in WRONG_TREES])
def test_wrong_tree(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^DynamicPolicy: {message}"):
        DynamicPolicy(**values)
    assert DynamicPolicy(4, platt=[[1, 2]]).platt == ((1.0, 2.0),)  # type: ignore[arg-type]


def check_usable(model: PreTrainedModel) -> None:
    """After an error, the model is as it was, and decodes again."""
    assert model.config._attn_implementation == "sdpa" and not model.lm_head._forward_pre_hooks
    want = generated("llama", "cpu", NEW)
    assert decode(model, None, prompt(), max_new_tokens=NEW).sequences.tolist() == want.tolist()


# ---------------------------------------------------------------- proposers that are none


class Broken:
    """Gives the answer at its second question; before, and in between, all is well."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, 0

    def extend(self, tokens: list[int]) -> None:
        pass

    def propose(self, most: int) -> Any:
        self.asked += 1
        return self.answer if self.asked == 2 else ([3], [0.1])


BROKEN: list[tuple[Any, str]] = [
    (None, r"Broken.propose must return \(tokens, probabilities\), got NoneType"),
    (([1], [0.5], [0.5]), r"Broken.propose must return \(tokens, probabilities\), got tuple"),
    ([[1], [0.5]], r"Broken.propose must return \(tokens, probabilities\), got list"),
    (([1.0], [0.5]), "Broken.propose must return integers and numbers, got float64 and float64"),
    ((["a"], [0.5]), "Broken.propose must return integers and numbers, got <U1 and float64"),
    (([1], [True]), "Broken.propose must return integers and numbers, got int64 and bool"),
    (([2**70], [0.5]), "Broken.propose must return integers and numbers, got object and float64"),
    (([1, 2], [0.5]), r"Broken.propose must return tokens and probabilities of one shape, .* got \(2,\) and \(1,\)"),
    ((1, 0.5), r"Broken.propose must return tokens and probabilities of one shape, .* got \(\) and \(\)"),
    (([[[1]]], [[[0.5]]]), r"Broken.propose must return tokens and probabilities of one shape, .* got \(1, 1, 1\)"),
    (([[1], [2, 3]], [[0.5], [0.5, 0.1]]), "Broken.propose must return two arrays: "),
    (
        (torch.tensor([1]), torch.tensor([0.5], dtype=torch.bfloat16)),
        "Broken.propose must return two arrays: .*BFloat16",
    ),
    (([[1, 2]], [[0.25, 0.5]]), "Broken.propose must return the drafts of each place best first"),
    (([VOCAB], [0.5]), "Broken.propose must return tokens in 0..100, got 101"),
    (([4, -1], [0.5, 0.5]), "Broken.propose must return tokens in 0..100, got -1"),
    (([[4, VOCAB]], [[0.5, 0.5]]), "Broken.propose must return tokens in 0..100, got 101"),
    ((np.array([2**64 - 1], np.uint64), [0.5]), "Broken.propose must return tokens in 0..100, got -1"),
    (([4], [1.5]), "Broken.propose must return probabilities in 0..1, got 1.5"),
    (([4], [-0.5]), "Broken.propose must return probabilities in 0..1, got -0.5"),
    (([4], [float("nan")]), "Broken.propose must return probabilities in 0..1, got nan"),
    (([[4, 5]], [[float("nan"), 0.5]]), "Broken.propose must return probabilities in 0..1, got nan"),
]


@pytest.mark.parametrize(("answer", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_a_broken_source_is_named(answer: Any, message: str, llama: PreTrainedModel) -> None:
    text = generated("llama", "cpu", NEW)
    for heads in (OracleHeads(text, 4, VOCAB), None):
        proposers = [SuffixProposer(), lambda prompt: Broken(answer), KnowingMaker(text, table(VOCAB, 3, 2, 5))]
        with pytest.raises(ValueError, match=f"^decode: proposers: {message}"):
            decode(
                llama, heads, prompt(), max_new_tokens=NEW, tree=DynamicPolicy(32), proposers=proposers, streamer=heads
            )
        check_usable(llama)


@pytest.mark.parametrize("error", [ValueError, ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["maker", "propose", "extend"])
def test_what_a_source_raises_comes_through(where: str, error: type[BaseException], llama: PreTrainedModel) -> None:
    def fail(*arguments: Any) -> Any:
        raise error("of its own")

    proposer = Broken(None)
    if where != "maker":
        setattr(proposer, where, fail)
    with pytest.raises(error, match="^of its own$"):
        maker = fail if where == "maker" else lambda prompt: proposer
        decode(llama, None, prompt(), max_new_tokens=NEW, tree=DynamicPolicy(8), proposers=[maker])
    check_usable(llama)


def test_documents_of_another_model(llama: PreTrainedModel) -> None:
    text = generated("llama", "cpu", NEW)
    document = [*text[0, :12].tolist(), VOCAB + 7]
    with pytest.raises(ValueError, match="DocumentDrafts.propose must return tokens in 0..100, got 108"):
        decode(
            llama, None, prompt(), max_new_tokens=NEW, tree=DynamicPolicy(8), proposers=[DocumentProposer([document])]
        )


@pytest.mark.parametrize("made", [None, 3, SuffixProposer()])
def test_a_maker_of_something_else(made: Any, llama: PreTrainedModel) -> None:
    with pytest.raises(
        TypeError, match=rf"^decode: proposers\[1\] must make what has extend and propose, .* got {type(made).__name__}"
    ):
        decode(llama, None, prompt(), max_new_tokens=NEW, proposers=[SuffixProposer(), lambda prompt: made])
    check_usable(llama)


def test_a_gate_chooses_the_first_nodes_of_either_policy(llama: PreTrainedModel) -> None:
    """One formula for both; the costs have to reach the size of the policy."""
    heads, confident = CerberusHeads(CerberusConfig("tiny", 32, VOCAB)), ConfidenceGate({1: 1.0, 2: 1.001, 4: 1.3})
    for tree in (DynamicPolicy(4), StaticPolicy.from_widths([3])):
        out = decode(llama, heads, prompt(), max_new_tokens=NEW, tree=tree, gate=confident, proposers=[])
        assert out.sequences.tolist() == generated("llama", "cpu", NEW).tolist()
        assert {2} <= {nodes for nodes, _ in out.stats.trace} <= {1, 2}, "the last step may be a plain one"
    for tree in (DynamicPolicy(5), StaticPolicy.from_widths([4])):
        with pytest.raises(ValueError, match="^ConfidenceGate: costs must reach .* 5 nodes, the largest .* is 4$"):
            decode(llama, heads, prompt(), max_new_tokens=NEW, tree=tree, gate=confident)
        check_usable(llama)
