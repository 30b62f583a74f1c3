"""What is kept from one decode to the next, when it serves again, and when it must not."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from stand_ins import RandomHeads
from static_stand_ins import StaticHeads
from tape import TapeRecorder
from tiny_models import VOCAB, generate, generated, prompt, tiny_model
from transformers import PreTrainedModel

import cerberus_ext
from cerberus_ext import CerberusConfig, CerberusHeads, Decoder
from cerberus_ext.drafting.gate import AlwaysClosed, AlwaysOpen, ConfidenceGate, Gate, Signals
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.engine.decode import decode
from cerberus_ext.runtime.recordings import Recordings
from cerberus_ext.runtime.runtime import runtime_of
from cerberus_ext.runtime.stats import DecodeOutput
from cerberus_ext.target import model as target_model

NEW = 16
TREE = StaticPolicy.from_paths([(0, 0, 0), (0, 1), (1, 0)])
SAME_SIZE = StaticPolicy.from_paths([(1, 0), (1, 1), (0,), (1, 0, 1), (1, 0, 0)])
pytestmark = pytest.mark.usefixtures("recorders")


class Alternating(Gate):
    """Steps of both kinds."""

    needs = frozenset({"entropy"})

    def __init__(self) -> None:
        self.asked = 0

    def decide(self, signals: Signals) -> int:
        self.asked += 1
        return signals.max_nodes if self.asked % 3 != 2 else 0


def kept_of(model: PreTrainedModel) -> Recordings:
    kept = runtime_of(model)._recordings
    assert kept is not None
    return kept


@pytest.fixture
def model() -> PreTrainedModel:
    """One that tests may change."""
    return copy.deepcopy(tiny_model("llama"))


def run(model: PreTrainedModel, heads: Any, ids: torch.Tensor | None = None, **options: Any) -> DecodeOutput:
    """Decodes with recordings, and sees that the text is right."""
    ids = prompt() if ids is None else ids
    options = {"max_new_tokens": NEW, "tree": TREE, "gate": Alternating(), "graphs": True, **options}
    out = decode(model, heads, ids, **options)
    if not options.get("temperature"):
        want = generate(model, ids, max_new_tokens=options["max_new_tokens"])
        assert out.sequences.tolist() == want.tolist()
    assert out.stats.graphed_steps == out.stats.steps > 0
    return out


def oracle(model: PreTrainedModel, ids: torch.Tensor | None = None) -> StaticHeads:
    ids = prompt() if ids is None else ids
    return StaticHeads(model, generate(model, ids, max_new_tokens=NEW + 8), [0, 1, 0], every=4)


def test_the_second_decode_records_nothing(model: PreTrainedModel) -> None:
    heads = oracle(model)
    assert run(model, heads).stats.captures == 2
    second = run(model, heads).stats
    assert (second.captures, second.capture_seconds) == (0, 0)


def test_other_lengths_and_trees_of_the_size(model: PreTrainedModel) -> None:
    """Longer and shorter texts, other tokens, within the capacity."""
    heads = oracle(model)
    run(model, heads)
    assert (SAME_SIZE.size, SAME_SIZE.useful_drafts) == (TREE.size, TREE.useful_drafts) and SAME_SIZE != TREE
    for length, new, tree in [(3, 20, TREE), (120, 9, SAME_SIZE), (1, 12, TREE), (60, 16, SAME_SIZE)]:
        for gate in (Alternating(), AlwaysOpen()):
            ids = prompt(length=length)
            assert run(model, heads, ids, max_new_tokens=new, tree=tree, gate=gate).stats.captures == 0


def test_a_tree_of_another_size_is_recorded(model: PreTrainedModel) -> None:
    heads = oracle(model)
    run(model, heads)
    assert run(model, heads, tree=StaticPolicy.from_paths([(0, 1), (1,)])).stats.captures == 1
    assert run(model, heads).stats.captures == 0, "the first ones are still there"


def test_capacity_grows_in_buckets(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_model, "_MIN_LASTING", 32)
    heads = oracle(model)
    capacities, captures = [], []
    for length in (2, 5, 40, 90, 9):
        captures.append(run(model, heads, prompt(length=length)).stats.captures)
        capacities.append(kept_of(model).memory.cache.capacity)
    assert capacities == [32, 32, 64, 128, 128] and captures == [2, 0, 2, 2, 0]


def test_capacity_ends_at_the_positions_of_the_model(model: PreTrainedModel) -> None:
    run(model, oracle(model))
    assert kept_of(model).memory.cache.capacity == 256  # not 512
    ids = prompt(length=255)
    run(model, oracle(model, ids), ids)
    assert kept_of(model).memory.cache.capacity == 320  # 255 + 16 + 7 tokens, in steps of 64


def test_several_heads_and_gates_take_turns(model: PreTrainedModel) -> None:
    first, second = oracle(model), StaticHeads(model, generated("llama", "cpu", NEW), [1, 1, 1])
    confident = ConfidenceGate({1: 1.0, TREE.size: 1.5})
    ways = [(first, Alternating()), (second, Alternating()), (first, confident), (first, AlwaysClosed())]
    assert [run(model, heads, gate=gate).stats.captures for heads, gate in ways] == [2, 1, 2, 0]
    assert [run(model, heads, gate=gate).stats.captures for heads, gate in ways] == [0, 0, 0, 0]


def test_recordings_go_with_their_heads(model: PreTrainedModel) -> None:
    run(model, trained())
    gc.collect()
    run(model, trained())
    kept = kept_of(model)
    assert len(kept._heads) == 1 and len(kept._steps) == 2


def test_no_more_than_a_few_heads_are_kept(model: PreTrainedModel) -> None:
    several = [trained() for _ in range(6)]
    for heads in several:
        run(model, heads)
    kept = kept_of(model)
    assert [heads() for heads, _ in kept._heads] == several[2:] and len(kept._steps) == 1 + 4
    assert run(model, several[2]).stats.captures == 0 and run(model, several[1]).stats.captures == 1


def test_numbers_of_the_sampling_are_data(model: PreTrainedModel) -> None:
    """Another seed, temperature, top_k, top_p or min_p replays what the first ones recorded, with its own effect."""
    heads = oracle(model)
    run(model, heads)
    ways: list[dict[str, Any]] = [
        {"seed": 1, "temperature": 1.0}, {"seed": 2, "temperature": 1.0}, {"seed": 2, "temperature": 3.0},
        {"seed": 2, "temperature": 3.0, "top_k": 4}, {"seed": 2, "temperature": 3.0, "top_p": 0.4},
        {"seed": 1, "temperature": 1.0, "min_p": 0.2}, {"seed": 1, "temperature": 3.0, "min_p": 0.7, "top_k": 20},
        {"seed": 9, "top_k": 3}, {"seed": 1, "temperature": 1.0},
    ]  # fmt: skip
    texts, captures = [], []
    for way in ways:
        out = run(model, heads, **way)
        want = decode(model, heads, prompt(), max_new_tokens=NEW, tree=TREE, gate=Alternating(), graphs=False, **way)
        assert out.sequences.tolist() == want.sequences.tolist()
        texts.append(out.sequences.tolist())
        captures.append(out.stats.captures)
    assert captures == [2, 0, 0, 0, 0, 2, 0, 0, 0]
    assert len({str(text) for text in texts[:8]}) == 8 and texts[8] == texts[0]


def test_release(model: PreTrainedModel) -> None:
    heads = oracle(model)
    run(model, heads)
    kept = weakref.ref(kept_of(model))
    Decoder(model, heads).close()
    gc.collect()
    assert kept() is None
    Decoder(model, heads).close()  # nothing there: no error
    assert run(model, heads).stats.captures == 2


def test_nothing_outlives_the_model() -> None:
    own = copy.deepcopy(tiny_model("llama"))
    run(own, oracle(own))
    kept, gone = weakref.ref(kept_of(own)), weakref.ref(own)
    del own
    gc.collect()
    assert gone() is None and kept() is None


def test_weights_changed_in_place_are_seen(model: PreTrainedModel) -> None:
    heads = oracle(model)
    before = run(model, heads).sequences
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(torch.linspace(0.5, 1.5, parameter.shape[-1]))
    after = run(model, heads)  # compares with generate
    assert after.stats.captures == 0 and after.sequences.tolist() != before.tolist()


def replace_a_parameter(model: PreTrainedModel) -> None:
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().flip(0).clone())


def replace_a_module(model: PreTrainedModel) -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    old = model.model.layers[1].mlp.down_proj
    new = Doubled(old.in_features, old.out_features, bias=False)
    new.weight = old.weight
    model.model.layers[1].mlp.down_proj = new


def turn_a_switch(model: PreTrainedModel) -> None:
    """As adapters are turned off."""
    model.model.layers[0].mlp.merged = True


@pytest.mark.parametrize("change", [replace_a_parameter, replace_a_module, turn_a_switch])
def test_what_replaced_the_memory_or_the_modules_is_recorded(change: Any, model: PreTrainedModel) -> None:
    heads = oracle(model)
    run(model, heads)
    change(model)
    assert run(model, heads).stats.captures == 2
    assert run(model, heads).stats.captures == 0


class Stop(Gate):
    """Raises at the third step."""

    def __init__(self, error: type[BaseException]) -> None:
        self.error, self.asked = error, 0

    def decide(self, signals: Signals) -> int:
        self.asked += 1
        if self.asked == 3:
            raise self.error("in the middle")
        return signals.max_nodes


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_interruption_everything_serves_again(model: PreTrainedModel, error: type[BaseException]) -> None:
    heads = oracle(model)
    with pytest.raises(error, match="in the middle"):
        run(model, heads, gate=Stop(error))
    assert run(model, heads).stats.captures == 1  # the root alone, which it had not come to
    assert run(model, heads).stats.captures == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupted_while_recording(
    model: PreTrainedModel, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, real = oracle(model), TapeRecorder.record

    def record(self: TapeRecorder, step: Any) -> Any:
        real(self, step)
        raise error("while recording")

    with monkeypatch.context() as patch, pytest.raises(error, match="while recording"):
        patch.setattr(TapeRecorder, "record", record)
        run(model, heads)
    assert not model.lm_head._forward_pre_hooks
    assert run(model, heads).stats.captures == 2


class Nested:
    """A streamer that decodes with the same model."""

    def __init__(self, model: PreTrainedModel, graphs: bool) -> None:
        self.model, self.graphs, self.calls = model, graphs, 0

    def put(self, tokens: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 4:
            decode(self.model, RandomHeads(prompt(), 3, VOCAB), prompt(), max_new_tokens=3, graphs=self.graphs)

    def end(self) -> None:
        raise AssertionError("it does not come to that")


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_a_decode_inside_of_another_is_refused(model: PreTrainedModel, outer: bool, inner: bool) -> None:
    heads = oracle(model)
    with pytest.raises(RuntimeError, match="decode: model must not be decoding already"):
        decode(model, heads, prompt(), max_new_tokens=NEW, tree=TREE, streamer=Nested(model, inner), graphs=outer)
    run(model, heads)


def test_threads_never_mix(model: PreTrainedModel) -> None:
    """One of them decodes, the others are refused; afterwards all is well."""
    heads, inside, go_on = oracle(model), threading.Event(), threading.Event()

    class Waiting:
        def put(self, tokens: torch.Tensor) -> None:
            if tokens.dim() == 1 and not inside.is_set():
                inside.set()
                assert go_on.wait(60)

        def end(self) -> None:
            pass

    outs: list[DecodeOutput] = []
    thread = threading.Thread(target=lambda: outs.append(run(model, heads, streamer=Waiting())))
    thread.start()
    assert inside.wait(60)
    with pytest.raises(RuntimeError, match="decode: model must not be decoding already"):
        run(model, heads, prompt(length=4))
    go_on.set()
    thread.join()
    assert outs and run(model, heads).stats.captures == 0


def trained(**changes: Any) -> CerberusHeads:
    """Heads with weights, over part of the vocabulary."""
    torch.manual_seed(3)
    config = CerberusConfig("tiny", 32, VOCAB, num_heads=3, num_layers=2, **changes)
    heads = CerberusHeads(config).eval().requires_grad_(False)
    heads.weight.normal_(std=0.1)
    for parameter in heads.context.parameters() if heads.context is not None else ():
        parameter.normal_(std=0.1)
    if heads.draft_vocab is not None:
        heads.draft_vocab.mul_(2)
    return heads


CONFIGS: list[dict[str, Any]] = [
    {}, {"draft_vocab": 40}, {"anchor": "hidden"}, {"chained": False, "draft_vocab": 50},
    {"context_layer": True, "context_heads": [4, 2, 8]},
]  # fmt: skip


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_cerberus_heads(changes: dict[str, Any], model: PreTrainedModel) -> None:
    heads = trained(**changes)
    for gate in (AlwaysOpen(), ConfidenceGate({1: 1.0, TREE.size: 1.01})):
        replayed = run(model, heads, gate=gate).stats
        eager = decode(model, heads, prompt(), max_new_tokens=NEW, tree=TREE, gate=gate, graphs=False).stats
        assert replayed.captures > 0 and run(model, heads, gate=gate).stats.captures == 0
        assert replayed.accepted_histogram == eager.accepted_histogram and replayed.open_steps == eager.open_steps > 0


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_renewing_sees_new_values(changes: dict[str, Any], model: PreTrainedModel) -> None:
    """Of the heads and of the model, in the memory that graphs read, without writing to either."""
    heads = trained(**changes)
    drafter = heads.bind(model)
    lies = [tensor.data_ptr() for tensor in (drafter.weight, drafter.bias, drafter.projection, drafter.embeddings)]
    hidden, root = torch.randn(1, 32), torch.tensor([7])
    before = drafter.draft(hidden, root, 4)
    heads.weight.mul_(-1)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    weights = model.lm_head.weight.clone()
    assert drafter.renew(heads.bind(model))
    after, fresh = drafter.draft(hidden, root, 4), heads.bind(model).draft(hidden, root, 4)
    assert after[0].equal(fresh[0]) and after[1].equal(fresh[1]) and not after[1].equal(before[1])
    assert lies == [t.data_ptr() for t in (drafter.weight, drafter.bias, drafter.projection, drafter.embeddings)]
    assert weights.equal(model.lm_head.weight)


def test_renewing_refuses_what_moved(model: PreTrainedModel) -> None:
    heads = trained()
    drafter, before = heads.bind(model), heads.bias.detach()
    heads.bias = torch.nn.Parameter(heads.bias + 1)
    kept = before.clone()
    assert not drafter.renew(heads.bind(model)) and before.equal(kept)
    smaller = trained(draft_vocab=30)
    drafter = smaller.bind(model)
    smaller.draft_vocab = smaller.draft_vocab[:20].clone()
    assert not drafter.renew(smaller.bind(model))
    smaller.draft_vocab = None
    assert not drafter.renew(smaller.bind(model))


def test_heads_that_moved_are_recorded_again(model: PreTrainedModel) -> None:
    heads = trained()
    run(model, heads)
    heads.bias = torch.nn.Parameter(heads.bias - 1, requires_grad=False)
    assert run(model, heads).stats.captures == 1  # the step with the draft
    assert len(kept_of(model)._heads) == 1


def test_heads_that_do_not_fit_any_more_are_an_error(model: PreTrainedModel) -> None:
    heads = trained(lm_head_fingerprint=cerberus_ext.drafting.heads.fingerprint([model.lm_head.weight]))
    run(model, heads)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    with pytest.raises(ValueError, match="the heads were trained on the LM head"):
        run(model, heads)
