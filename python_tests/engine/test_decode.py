"""`decode` gives what the model alone gives, whatever heads, tree and gate do; and its counts are right."""

from __future__ import annotations

import pytest
import torch
from stand_ins import AdversarialHeads, LastDraftHeads, OracleHeads, RandomGate, RandomHeads
from tiny_models import VOCAB, generate, generated, prompt, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from cerberus_ext import ops
from cerberus_ext.drafting.gate import AlwaysClosed, AlwaysOpen, ConfidenceGate, EntropyGate
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.engine.decode import decode

NEW = 24
HEADS = {"random": RandomHeads, "adversarial": AdversarialHeads, "oracle": OracleHeads, "last draft": LastDraftHeads}
GATES = {"open": AlwaysOpen, "closed": AlwaysClosed, "random": RandomGate}
TABLE = [[0.6, 0.3, 0.1, 0.05]] * 4
TREES = {
    "chain": StaticPolicy.chain(4),
    "16": StaticPolicy.from_accuracies(TABLE, 16),
    "64": StaticPolicy.from_accuracies(TABLE, 64),
    "one draft": StaticPolicy.chain(1),
    "65, wide": StaticPolicy.from_widths([64]),
}


def expected(name: str, device: str) -> Tensor:
    return generated(name, device, NEW)


@pytest.fixture
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.mark.pairwise
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gpt2"])
def test_equals_generate(name: str, heads: str, tree: str, gate: str, device: str) -> None:
    model, want = tiny_model(name, device), expected(name, device)
    stand_in = HEADS[heads](want, 4, VOCAB)
    out = decode(
        model, stand_in, prompt(device), max_new_tokens=NEW, tree=TREES[tree], gate=GATES[gate](), streamer=stand_in
    )
    assert out.sequences.tolist() == want.tolist()
    stats = out.stats
    assert stats.new_tokens == NEW
    assert stats.step_tokens == NEW - 1 and stats.steps == sum(stats.accepted_histogram)
    if gate == "closed" or heads == "adversarial":
        assert stats.tokens_per_step == 1
    if gate == "closed":
        assert stats.open_steps == 0


@pytest.mark.parametrize("name", ["qwen2", "mistral", "gemma2"])
@pytest.mark.parametrize("heads", HEADS)
def test_equals_generate_on_other_models(name: str, heads: str, device: str) -> None:
    model, want = tiny_model(name, device), expected(name, device)
    stand_in = HEADS[heads](want, 4, VOCAB)
    out = decode(model, stand_in, prompt(device), max_new_tokens=NEW, tree=TREES["16"], streamer=stand_in)
    assert out.sequences.tolist() == want.tolist()


@pytest.mark.parametrize("tree", TREES)
def test_oracle_is_accepted_to_full_depth(tree: str, llama: PreTrainedModel) -> None:
    depth = TREES[tree].depth
    new = 1 + 5 * (depth + 1)  # the prompt's token and 5 whole steps
    want = generate(llama, prompt(), max_new_tokens=new)
    oracle = OracleHeads(want, 4, VOCAB)
    stats = decode(llama, oracle, prompt(), max_new_tokens=new, tree=TREES[tree], streamer=oracle).stats
    assert stats.accepted_histogram == [0] * depth + [5]
    assert stats.steps == stats.open_steps == 5 and stats.zero_accept_steps == 0
    assert stats.tokens_per_step == depth + 1 and stats.gate_open_rate == 1


@pytest.mark.parametrize("heads", [OracleHeads, LastDraftHeads, AdversarialHeads])
def test_heads_get_the_hidden_state_of_the_root(heads: type, llama: PreTrainedModel) -> None:
    """The LM head makes the root from it, wherever in the tree it was found."""
    stand_in = heads(expected("llama", "cpu"), 4, VOCAB)
    own_draft, checked = stand_in.draft, []

    def draft(hidden: Tensor, pending: Tensor, drafts: int) -> tuple[Tensor, Tensor]:
        assert llama.lm_head(hidden).argmax(-1).equal(pending)
        checked.append(pending)
        return own_draft(hidden, pending, drafts)

    stand_in.draft = draft
    stats = decode(llama, stand_in, prompt(), max_new_tokens=NEW, tree=TREES["16"], streamer=stand_in).stats
    assert len(checked) == stats.open_steps > 3


def test_adversarial_heads_waste_every_step(llama: PreTrainedModel) -> None:
    heads = AdversarialHeads(expected("llama", "cpu"), 4, VOCAB)
    stats = decode(llama, heads, prompt(), max_new_tokens=NEW, tree=TREES["16"], streamer=heads).stats
    # The last step has one token to go and therefore no use for drafts.
    assert (stats.steps, stats.open_steps, stats.zero_accept_rate) == (NEW - 1, NEW - 2, 1.0)
    assert stats.accepted_histogram == [NEW - 1]
    assert set(stats.seconds) == {"prefill", "draft", "verify", "commit"} and stats.tokens_per_second > 0


@pytest.mark.parametrize("gate", [EntropyGate(3.0), ConfidenceGate({1: 1.0, 5: 1.1, 64: 1.3})])
def test_gates_that_look(gate, llama: PreTrainedModel) -> None:
    want = expected("llama", "cpu")
    heads = OracleHeads(want, 4, VOCAB)
    out = decode(llama, heads, prompt(), max_new_tokens=NEW, tree=TREES["16"], gate=gate, streamer=heads)
    assert out.sequences.tolist() == want.tolist()


def test_takes_eos_from_the_model(llama: PreTrainedModel) -> None:
    text = expected("llama", "cpu")
    llama.generation_config.eos_token_id = [int(text[0, prompt().shape[1] + 3])]
    try:
        want = generate(llama, prompt(), max_new_tokens=NEW)
        oracle = OracleHeads(text, 4, VOCAB)
        out = decode(llama, oracle, prompt(), max_new_tokens=NEW, tree=TREES["chain"], streamer=oracle)
    finally:
        llama.generation_config.eos_token_id = None
    assert out.sequences.tolist() == want.tolist() and out.stats.new_tokens <= 4


def test_streams_as_generate_does(llama: PreTrainedModel) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.calls: list[object] = []

        def put(self, tokens: Tensor) -> None:
            self.calls.append(tokens.tolist())

        def end(self) -> None:
            self.calls.append("end")

    theirs, ours = Streamer(), Streamer()
    generate(llama, prompt(), max_new_tokens=5, streamer=theirs)
    decode(
        llama,
        RandomHeads(expected("llama", "cpu"), 4, VOCAB),
        prompt(),
        max_new_tokens=5,
        gate=AlwaysClosed(),
        streamer=ours,
    )
    assert ours.calls == theirs.calls


def test_sampling_is_keyed_by_absolute_position(device: str) -> None:
    """Token by token, with whole forwards of the model: the noise of a token is that of its place in the text."""
    model, ids = tiny_model("llama", device), prompt(device)
    text = ids
    for position in range(ids.shape[1], ids.shape[1] + 10):
        with torch.inference_mode():
            logits = model(text).logits[:, -1].contiguous()
        place = torch.tensor([position], device=device)
        text = torch.cat([text, ops.choose_tokens(logits, place, 7, 1.5, 0, 0.9)[:, None]], 1)
    heads = OracleHeads(text, 4, VOCAB)
    out = decode(model, heads, ids, max_new_tokens=10, temperature=1.5, top_p=0.9, seed=7, streamer=heads)
    assert out.sequences.tolist() == text.tolist()


@pytest.mark.parametrize("name", ["llama", "qwen2-window"])
def test_bfloat16_bits_do_not_depend_on_drafts(name: str, device: str) -> None:
    if device != "cpu":
        pytest.skip("rows are independent of each other on CPUs only")
    model, ids = tiny_model(name, device, torch.bfloat16), prompt(device)
    plain = decode(model, RandomHeads(ids, 4, VOCAB), ids, max_new_tokens=64, gate=AlwaysClosed()).sequences
    for heads in (OracleHeads, RandomHeads, LastDraftHeads):
        for tree in ("16", "chain"):
            stand_in = heads(plain, 4, VOCAB)
            out = decode(
                model, stand_in, ids, max_new_tokens=64, tree=TREES[tree], gate=RandomGate(), streamer=stand_in
            )
            assert out.sequences.tolist() == plain.tolist()


def test_leaves_the_model_as_it_was(llama: PreTrainedModel) -> None:
    before = (llama.config.to_dict(), llama.config._attn_implementation, len(llama.lm_head._forward_pre_hooks))
    weights = {name: parameter for name, parameter in llama.named_parameters()}
    heads = RandomHeads(expected("llama", "cpu"), 4, VOCAB)
    decode(llama, heads, prompt(), max_new_tokens=6, streamer=heads)
    assert before == (llama.config.to_dict(), llama.config._attn_implementation, len(llama.lm_head._forward_pre_hooks))
    assert all(parameter is weights[name] for name, parameter in llama.named_parameters())
    assert not llama.training and generate(llama, prompt(), max_new_tokens=NEW).equal(expected("llama", "cpu"))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["heads", "streamer", "criterion", "gate", "op"])
def test_interrupted_it_leaves_the_model_as_it_was(where: str, error, llama: PreTrainedModel, monkeypatch) -> None:
    heads = RandomHeads(expected("llama", "cpu"), 4, VOCAB)
    calls = 0

    def fail(*args: object, **kwargs: object) -> bool:
        nonlocal calls
        calls += 1
        if calls < 3:
            return torch.zeros(1, dtype=torch.bool) if where == "criterion" else True
        raise error("in the middle")

    options: dict = {}
    if where == "heads":
        heads.make = lambda drafts: fail() and torch.zeros(4, drafts, dtype=torch.int64)
    elif where == "criterion":
        options["stopping_criteria"] = [fail]
    elif where == "gate":
        options["gate"] = RandomGate()
        options["gate"].decide = lambda signals: fail() and signals.max_nodes
    elif where == "op":
        options["fuse"] = False
        monkeypatch.setattr("cerberus_ext.target.cache.ops.write_cache", fail)
    else:
        real = heads.put
        heads.put = lambda tokens: real(tokens) if fail() else None
    before = (llama.config.to_dict(), llama.config._attn_implementation)
    with pytest.raises(error, match="in the middle"):
        decode(llama, heads, prompt(), max_new_tokens=NEW, streamer=heads, **options)
    assert before == (llama.config.to_dict(), llama.config._attn_implementation)
    assert not llama.lm_head._forward_pre_hooks
    assert generate(llama, prompt(), max_new_tokens=4).equal(expected("llama", "cpu")[:, : prompt().shape[1] + 4])
