"""The same on a GPU, with real CUDA graphs, where there is one; on a CPU with this folder's recorder."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from static_stand_ins import StaticHeads
from tape import TapeRecorder
from tiny_models import VOCAB, generate, generated, prompt, tiny_model

from cerberus_ext import CerberusConfig, CerberusHeads, Decoder
from cerberus_ext.drafting.gate import AlwaysClosed, AlwaysOpen, ConfidenceGate, EntropyGate, Gate
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.engine.decode import decode
from cerberus_ext.runtime.recorder import RECORDERS, waiting_refused

NEW = 24
TREE = StaticPolicy.from_accuracies([[0.6, 0.3, 0.1, 0.05]] * 4, 16)
GATES: dict[str, Gate] = {
    "open": AlwaysOpen(),
    "closed": AlwaysClosed(),
    "entropy": EntropyGate(3.04),
    "confidence": ConfidenceGate({1: 1.0, 16: 1.7}),
}
pytestmark = pytest.mark.usefixtures("recorders")


@pytest.mark.pairwise
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", ["llama", "qwen2-window", "gpt2"])
def test_replays(name: str, gate: str, temperature: float, device: str) -> None:
    model, ids = copy.deepcopy(tiny_model(name, device)), prompt(device)
    heads = StaticHeads(model, generated(name, device, NEW), [1, 0, 2, 0], every=3)
    options: dict[str, Any] = {
        "max_new_tokens": NEW, "tree": TREE, "gate": GATES[gate], "temperature": temperature, "seed": 5
    }  # fmt: skip
    eager = decode(model, heads, ids, graphs=False, **options)
    outs = [decode(model, heads, ids, graphs=True, **options) for _ in range(3)]
    for out in outs:
        assert out.sequences.tolist() == eager.sequences.tolist()
        assert out.stats.accepted_histogram == eager.stats.accepted_histogram
        assert out.stats.graphed_steps == out.stats.steps and out.stats.fallback is None
    assert outs[0].stats.captures > 0 and [out.stats.captures for out in outs[1:]] == [0, 0]


def test_trained_heads_and_weights_changed_in_place(device: str) -> None:
    model, ids = copy.deepcopy(tiny_model("llama", device)), prompt(device)
    torch.manual_seed(3)
    config = CerberusConfig("tiny", 32, VOCAB, num_heads=4, num_layers=2, draft_vocab=60)
    heads = CerberusHeads(config).eval().requires_grad_(False)
    heads.weight.normal_(std=0.1)
    heads.to(device)
    for captures in (1, 0):
        want = generate(model, ids, max_new_tokens=NEW).tolist()
        for gate in (AlwaysClosed(), AlwaysOpen()):
            out = decode(model, heads, ids, max_new_tokens=NEW, tree=TREE, gate=gate, graphs=True)
            anew = captures or out.stats.fused  # a fused step may hold copies of weights
            assert out.stats.captures == anew and out.sequences.tolist() == want
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(torch.linspace(0.5, 1.5, parameter.shape[-1], device=device))


def test_goes_on_where_recording_fails(device: str) -> None:
    """Rotary encodings that read positions on the host; afterwards everything else is recorded as before."""
    healthy, ids = copy.deepcopy(tiny_model("llama", device)), prompt(device)
    config = copy.deepcopy(healthy.config)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    torch.manual_seed(0)
    reading = type(healthy)(config).eval().to(device)
    for model, graphs, fails in [(healthy, True, False), (reading, None, True), (healthy, True, False)]:
        text = generate(model, ids, max_new_tokens=NEW)
        heads = StaticHeads(model, text, [1, 0, 2, 0], every=3)
        out = decode(model, heads, ids, max_new_tokens=NEW, tree=TREE, graphs=graphs)
        assert out.sequences.tolist() == text.tolist() and (out.stats.fallback is not None) == fails
        Decoder(model, heads).close()


def test_recorder(device: str, recorders: list[TapeRecorder]) -> None:
    """By itself: a replay repeats, and `fetch` waits until the copy is there."""
    kind = torch.device(device)
    recorder = RECORDERS[kind.type](kind)
    x, total = torch.full((1 << 20,), 2.0, device=device), torch.zeros(1 << 20, device=device)
    host = torch.zeros(1 << 20, pin_memory=device == "cuda")

    def run() -> None:
        total.add_(x * 3)

    with torch.inference_mode():
        recorder.warm_up(run, last=True)
        replay = recorder.record(run)
        total.zero_()
        for expected in (6, 12):
            replay()
            recorder.fetch(total, host)
            assert host.eq(expected).all()
        x.fill_(1)
        replay()
        recorder.fetch(total, host)
    assert host.eq(15).all()


@pytest.mark.parametrize(("threads", "modes"), [(1, ["error", 0]), (2, [0])])
def test_what_waits_is_refused_while_there_is_one_thread(
    threads: int, modes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not any more afterwards, whatever happened."""
    found: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", found.append)
    monkeypatch.setattr(threading, "active_count", lambda: threads)
    with pytest.raises(ValueError, match="inside"), waiting_refused(True):
        raise ValueError("inside")
    assert found == modes
    with waiting_refused(False):
        pass
    assert found == [*modes, 0]
