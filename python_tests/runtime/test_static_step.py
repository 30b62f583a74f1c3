"""The parts of a step over static tensors: what the tree looks like on the device, and that it stays there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tape import CaptureError, Tape, check_capturable
from tiny_models import VOCAB, generated, prompt, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cerberus_ext import CerberusConfig, CerberusHeads, _host, ops
from cerberus_ext.drafting.drafter import NO_DRAFTER
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.drafting.tree import ALONE, Tree
from cerberus_ext.runtime.runtime import runtime_of
from cerberus_ext.runtime.sampling import Sampling
from cerberus_ext.runtime.static_step import (
    Drafting,
    StaticDrafts,
    StaticNodes,
    StaticResult,
    StepKind,
    StepMemory,
    run_step,
)
from cerberus_ext.target.model import StepWay, TargetModel

CPU = torch.device("cpu")
SMALL = StaticPolicy.from_paths([(0,), (2,), (0, 1)]).tree  # nodes 1 and 2 after the root, 3 after 1


def pack_tree(tree: Tree, nodes: int, batch: int, drafts: int) -> np.ndarray:
    return _host.pack_tree(tree.parents, tree.tokens, tree.ranks, nodes, batch, drafts)


def test_packed_tree() -> None:
    """Drafts of 4 a head: (0,) is entry 0, (2,) is 2, (0, 1) is 4 + 1; before them are the root and 6 given tokens."""
    packed = pack_tree(SMALL, 6, 1, 4)
    parents, depths, proposers, ancestors, given = np.split(packed, [6, 12, 18, 24])
    assert parents.tolist() == [-1, 0, 0, 1, 0, 0]
    assert depths.tolist() == [0, 1, 1, 2, 1, 1]
    assert proposers.tolist() == [0, 7, 9, 12, 7, 7]  # nodes 4 and 5 repeat node 1
    assert ancestors.tolist() == [0b1, 0b11, 0b101, 0b1011, 0b10001, 0b100001]
    assert given.tolist() == [0] * 6


def test_packed_step_tree() -> None:
    """Its tokens are given; nodes 3 and 4 repeat node 1."""
    tree = Tree(np.array([-1, 0, 1]), np.array([0, 17, 9]), np.zeros(3, np.int64), np.ones(3))
    parents, depths, proposers, ancestors, given = np.split(pack_tree(tree, 5, 2, 4), [5, 10, 15, 20])
    assert parents.tolist() == [-1, 0, 1, 0, 0] and depths.tolist() == [0, 1, 2, 1, 1]
    assert ancestors.tolist() == [0b1, 0b11, 0b111, 0b1001, 0b10001]
    entries = np.array([3, *given[:5]])  # the root's token, then what is given
    assert entries[proposers].tolist() == [3, 17, 9, 17, 17] and given.tolist() == [0, 17, 9, 0, 0] * 2


def test_packed_tree_of_several_words() -> None:
    tree = StaticPolicy.chain(3).tree
    packed = pack_tree(tree, 70, 1, 1)
    assert len(packed) == 70 * 6 and packed.dtype == np.int64
    ancestors = packed[210:350].reshape(70, 2)
    assert ancestors[3].tolist() == [0b1111, 0] and ancestors[69].tolist() == [0b1, 1 << 5]


def test_root_alone() -> None:
    assert pack_tree(ALONE, 1, 1, 0).tolist() == [-1, 0, 0, 1, 0]


@pytest.mark.parametrize("nodes, batch", [(3, 1), (0, 1), (-1, 1), (4, 0)])
def test_a_tree_that_does_not_fit(nodes: int, batch: int) -> None:
    with pytest.raises(ValueError, match="pack_tree: size"):
        pack_tree(SMALL, nodes, batch, 4)
    with pytest.raises(ValueError, match="pack_tree: size"):
        pack_tree(ALONE, 2, 1, 4)
    with pytest.raises(ValueError, match="pack_tree: tokens and ranks"):
        _host.pack_tree(SMALL.parents, SMALL.tokens[1:], None, 6, 1, 4)
    with pytest.raises(ValueError, match="pack_tree: parents"):
        _host.pack_tree([0, 0], [0, 0], None, 2, 1, 4)


@pytest.mark.parametrize("seed", range(40))
def test_padding_never_changes_what_is_accepted(seed: int) -> None:
    """Against the tree without it, for random trees and few tokens, so that much is accepted."""
    random = np.random.default_rng(seed)
    widths = random.integers(1, 4, size=random.integers(1, 4)).tolist()
    policy = StaticPolicy.from_widths(widths)
    tree = policy.cut(int(random.integers(1, 4)))
    nodes = tree.size + int(random.integers(0, 70))
    static, drafts = StaticNodes(1, nodes, CPU), policy.useful_drafts
    static.put(tree, drafts)
    ids = torch.from_numpy(random.integers(0, 2, size=(1, len(widths), drafts)))
    padded_tokens = static.tokens(torch.tensor([1]), ids)
    tensors = tree.on(CPU)
    tokens = torch.cat([torch.tensor([[1]]), ids[:, tree.depths[1:] - 1, tree.ranks[1:]]], 1)
    assert padded_tokens[:, : tree.size].equal(tokens) and (padded_tokens[:, tree.size :] == tokens[:, 1]).all()
    target = torch.from_numpy(random.integers(0, 2, size=(1, nodes)))
    path, accepted = ops.verify_tree(padded_tokens, target, static.parents, static.ancestors, nodes - 1)
    want, want_accepted = ops.verify_tree(
        tokens, target[:, : tree.size].contiguous(), tensors.parents, tensors.ancestors, tree.depth
    )
    kept = path[path >= 0].tolist()
    assert kept == want[want >= 0].tolist() and accepted.equal(want_accepted)


def test_a_tree_is_copied_once() -> None:
    nodes = StaticNodes(1, 6, CPU)
    nodes.put(SMALL, 4)
    nodes.parents.fill_(9)
    nodes.put(SMALL, 4)
    assert nodes.parents.tolist() == [9] * 6
    nodes.put(SMALL, 5)
    assert nodes.parents.tolist() == [-1, 0, 0, 1, 0, 0], "with another number of drafts they lie elsewhere"
    nodes.put(SMALL.first(3), 5)
    assert nodes.parents.tolist() == [-1, 0, 0, 0, 0, 0]


def test_result_on_the_host() -> None:
    result = StaticResult(1, 4, (2, 3), True, CPU)
    result.target.copy_(torch.tensor([[5, 6, 7, 2**40]]))
    result.entropy.fill_(1.5)
    assert result.ids is not None and result.logprobs is not None and result.after is not None
    result.ids.copy_(2**40 + torch.arange(6).view(1, 2, 3))
    result.logprobs.copy_(-torch.arange(6.0).view(1, 2, 3))
    result.after.copy_(torch.arange(9.0).view(1, 1, 3, 3))
    result.host.copy_(result.buffer)
    target, path, entropy, found = result.read()
    assert (target, path, entropy) == ([5, 6, 7, 2**40], [0], 1.5)
    assert found is not None
    ids, logprobs, after = found
    assert after is not None and after.tolist() == [[[0, 1, 2], [3, 4, 5], [6, 7, 8]]]
    assert (ids - 2**40).tolist() == [[0, 1, 2], [3, 4, 5]] and ids.dtype == np.int64
    assert logprobs.tolist() == [[0, -1, -2], [-3, -4, -5]] and logprobs.dtype == np.float32
    result.host.fill_(0)
    assert ids[1, 2] == 2**40 + 5 and logprobs[1, 2] == -5, "they do not change with the next step"
    assert StaticResult(1, 1, None, False, CPU).read().drafts is None
    assert StaticResult(1, 1, None, True, CPU).read().drafts is None, "where nothing is drafted, nothing is weighed"
    _, _, nothing = StaticResult(1, 4, (2, 3), False, CPU).read().drafts or (None, None, 1)
    assert nothing is None


@pytest.mark.parametrize("conditional", [False, True])
def test_what_was_drafted_is_put_into_the_result_at_once(conditional: bool) -> None:
    """To the bit, in three copies: of drafts into theirs, of all into the result, to the host."""
    result, drafts = StaticResult(1, 4, (3, 3), conditional, CPU), StaticDrafts(1, 3, 3, CPU)
    ids, logprobs = 2**40 + torch.arange(9).view(1, 3, 3), torch.randn(1, 3, 3)
    logprobs[0, 2, 1:] = torch.tensor([-torch.inf, torch.nan])
    after, given = torch.randn(1, 2, 3, 3) if conditional else None, torch.tensor([1.5])
    with Tape() as tape:
        drafts.put(ids, logprobs)
        result.put(given, drafts, after)
        result.host.copy_(result.buffer)
    assert [call[0].name() for call in tape.operations] == ["aten::cat.out", "aten::cat.out", "aten::copy_"]
    _, _, entropy, found = result.read()
    assert entropy == 1.5 and found is not None and found[0].tolist() == ids[0].tolist() == drafts.ids[0].tolist()
    for got in (torch.from_numpy(found[1])[None], drafts.logprobs):
        assert got.view(torch.int32).equal(logprobs.view(torch.int32))
    assert (found[2] is None) if after is None else np.array_equal(found[2], after[0].numpy())


def test_tokens_from_another_source() -> None:
    """No heads: what follows in the text is given node by node, beside a draft that is wrong."""
    model, text = tiny_model("llama"), generated("llama", "cpu", 8)
    length = prompt().shape[1]
    tree = StaticPolicy.from_paths([(0, 0, 0), (1,)]).tree  # nodes 1, 4 after the root, 2 after 1, 3 after 2
    with torch.inference_mode(), runtime_of(model).target(64) as base:
        hidden, logits = base.prefill(prompt())
        memory, kind = StepMemory(base.cache), StepKind(5, Sampling(), shape=(3, 2))
        memory.begin(hidden, logits.argmax(-1))
        state, nodes, result = memory.state, memory.nodes(5), memory.result(kind)
        nodes.put(tree, 2)
        nodes.sources[[1, 2, 3]] = 1 + torch.tensor([0, 2, 4])  # entries 0, 2 and 4 of `given`
        nodes.given[0, [0, 2, 4]] = text[0, length + 1 : length + 4]
        run_step(base, kind, memory, result)
        assert result.path.tolist() == [[0, 1, 2, 3, -1]]
        assert result.target[0, [0, 1, 2, 3]].tolist() == text[0, length + 1 : length + 5].tolist()
        assert base.cache.length.tolist() == [length + 4] and state.pending.tolist() == [text[0, length + 4]]


class OneDevice(TorchDispatchMode):
    """Refuses whatever a recording does not allow, and every operation with a tensor that is elsewhere."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        check_capturable(func, args)
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, output)):
            if isinstance(tensor, torch.Tensor):
                assert tensor.device.type == self.device, f"{func.name()}: {tensor.device}"
        self.operations.add(func.name())
        return output


@pytest.mark.parametrize("nodes", [1, 5])
@pytest.mark.parametrize("drafting", [Drafting.BEFORE, Drafting.AFTER])
@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gpt2"])
def test_a_step_never_leaves_the_device(name: str, drafting: Drafting, nodes: int) -> None:
    """On "meta", where tensors have no values to wait for, and copies from and to the host show."""
    device = torch.device("meta")
    model = tiny_model(name, device="meta")
    drafter = CerberusHeads(CerberusConfig("tiny", 32, VOCAB, num_heads=3, draft_vocab=50)).to(device).bind(model)
    with torch.inference_mode(), TargetModel(model, StepWay.plain(model), 64) as base:
        hidden, logits = base.prefill(torch.zeros(1, 9, dtype=torch.int64, device=device))
        sampling = Sampling(seed=3, temperature=0.7, top_p=0.9, min_p=0.1)
        memory = StepMemory(base.cache)
        kind = StepKind(nodes, memory.choosers.of(sampling), drafter, (3, 4), drafting)
        memory.begin(hidden, logits.argmax(-1))
        result = memory.result(kind)
        assert (result.ids is None) == (drafting is Drafting.BEFORE)
        memory.nodes(nodes), memory.drafts((3, 4))
        with OneDevice("meta") as seen:
            run_step(base, kind, memory, result)
    expected = {f"cerberus_ext::{op}" for op in ("tree_attention", "write_cache", "head_stack", "draft_topk")}
    assert expected | {"cerberus_ext::hidden_entropy", "cerberus_ext::choose_tokens"} <= seen.operations
    assert ("cerberus_ext::verify_tree" in seen.operations) == (nodes > 1)


@pytest.mark.parametrize("nodes", [1, 5])
def test_a_step_without_heads_never_leaves_the_device(nodes: int) -> None:
    """Its tokens are all given."""
    device = torch.device("meta")
    model = tiny_model("llama", device="meta")
    with torch.inference_mode(), TargetModel(model, StepWay.plain(model), 64) as base:
        hidden, logits = base.prefill(torch.zeros(1, 9, dtype=torch.int64, device=device))
        memory, kind = StepMemory(base.cache), StepKind(nodes, Sampling(), NO_DRAFTER)
        memory.begin(hidden, logits.argmax(-1))
        result = memory.result(kind)
        memory.nodes(nodes)
        with OneDevice("meta"):
            run_step(base, kind, memory, result)


@pytest.mark.parametrize(
    "what", [lambda x: x + torch.ones(1), lambda x: torch.ones(1).to(x.device), lambda x: x.item()]
)
def test_leaving_the_device_shows(what: Any) -> None:
    with pytest.raises((AssertionError, CaptureError)), torch.inference_mode(), OneDevice("meta"):
        what(torch.empty(1, device="meta"))
