"""Where steps cannot be recorded they run op by op, the text is the same, and the reason is said once."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from static_stand_ins import StaticHeads
from tape import TapeRecorder
from tiny_families import make_family
from tiny_models import generate, generated, prompt, tiny_model
from transformers import PreTrainedModel

from cerberus_ext.drafting.gate import AlwaysOpen, ConfidenceGate, EntropyGate
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.engine.decode import decode
from cerberus_ext.runtime import session
from cerberus_ext.runtime.runtime import runtime_of
from cerberus_ext.runtime.stats import DecodeStats

NEW = 12
TREE = StaticPolicy.from_paths([(0, 0, 0), (0, 1), (1, 0)])


def run(model: PreTrainedModel, **options: Any) -> DecodeStats:
    text = generate(model, prompt(), max_new_tokens=NEW)
    heads = StaticHeads(model, text, [0, 1, 0], every=4)
    out = decode(model, heads, prompt(), max_new_tokens=NEW, tree=TREE, **options)
    assert out.sequences.tolist() == text.tolist() and out.stats.open_steps > 1
    return out.stats


def test_on_a_cpu() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody expects graphs there
        stats = run(tiny_model("llama"))
        assert run(tiny_model("llama"), graphs=False).fallback is None
    assert stats.fallback == "the model is on cpu, not on a CUDA device"
    assert (stats.graphed_steps, stats.captures, stats.capture_seconds) == (0, 0, 0)
    with pytest.raises(ValueError, match="graphs must be None or False here, got True: the model is on cpu"):
        run(tiny_model("llama"), graphs=True)


@pytest.mark.usefixtures("recorders")
class TestRecordable:
    """On a device with a recorder."""

    @pytest.fixture
    def model(self) -> PreTrainedModel:
        return copy.deepcopy(tiny_model("llama"))

    def falls_back(self, model: PreTrainedModel, reason: str, **options: Any) -> None:
        stats = run(model, **options)
        assert stats.fallback is not None and reason in stats.fallback
        assert stats.graphed_steps < stats.steps
        with pytest.raises(ValueError, match="decode: graphs must be None or False here, got True: ") as caught:
            run(model, graphs=True, **options)
        assert reason in str(caught.value)
        assert not model.lm_head._forward_pre_hooks and run(model, graphs=False, **options).fallback is None

    def test_attention_without_the_interface(self) -> None:
        self.falls_back(make_family("falcon"), "the model computes its attention itself")

    def test_hooks(self, model: PreTrainedModel, recorders: list[TapeRecorder]) -> None:
        seen = []
        handle = model.model.layers[1].mlp.register_forward_hook(lambda *arguments: seen.append(1))
        self.falls_back(model, "the model has hooks (model.layers.1.mlp), which a replay would not call")
        assert seen
        handle.remove()
        model.model.embed_tokens._hf_hook = object()  # as accelerate does
        self.falls_back(model, "the model has hooks (model.embed_tokens)")
        del model.model.embed_tokens._hf_hook
        assert run(model, graphs=True).fallback is None

    def test_hooks_that_transformers_leaves_are_none(self, model: PreTrainedModel) -> None:
        model(prompt(), output_hidden_states=True)
        assert model.model.layers[0]._forward_hooks
        assert run(model, graphs=True).fallback is None

    def test_autocast(self) -> None:
        """Its copies of float32 weights, here the norms', would be gone at the next replay."""
        model = copy.deepcopy(tiny_model("llama", dtype=torch.bfloat16))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            heads = StaticHeads(model, prompt(), [0] * 3)
            stats = decode(model, heads, prompt(), max_new_tokens=3, tree=TREE).stats
        assert stats.fallback is not None and "autocast is on" in stats.fallback and stats.graphed_steps == 0
        assert decode(model, heads, prompt(), max_new_tokens=3, tree=TREE).stats.fallback is None

    @pytest.mark.parametrize("gate", [AlwaysOpen(), ConfidenceGate({1: 1.0, TREE.size: 1.5})])
    def test_a_model_that_reads_values(self, gate: Any, model: PreTrainedModel, recorders: list[TapeRecorder]) -> None:
        """Rotary encodings that change with the longest position; tried once, until it is released."""
        model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
        model = type(model)(model.config).eval()
        self.falls_back(model, "recording a step failed: CaptureError: operation not permitted", gate=gate)
        assert len(recorders) == 1 and not recorders[0].tapes
        assert run(model, gate=gate).capture_seconds == 0 and runtime_of(model)._recordings is None
        runtime_of(model).release()
        assert run(model, gate=gate).capture_seconds > 0

    @pytest.mark.parametrize("after", [1, 2])
    @pytest.mark.parametrize("gate", [EntropyGate(3.04), ConfidenceGate({1: 1.0, TREE.size: 1.5})])
    def test_goes_on_in_the_middle(
        self, gate: Any, after: int, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A later recording fails, after replays: what follows runs op by op, from where the text is."""
        real, calls = TapeRecorder.record, []

        def record(recorder: TapeRecorder, step: Any) -> Any:
            calls.append(1)
            if len(calls) == after:
                step()
                raise torch.OutOfMemoryError("no memory")
            return real(recorder, step)

        monkeypatch.setattr(TapeRecorder, "record", record)
        stats = run(model, gate=gate)
        assert (stats.graphed_steps > 0) == (after == 2) and stats.captures == after - 1
        assert stats.fallback == "recording a step failed: OutOfMemoryError: no memory"

    def test_heads_that_read_values(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        real = StaticHeads.draft
        monkeypatch.setattr(StaticHeads, "draft", lambda *a: real(*a) if a[2].item() >= 0 else None)
        self.falls_back(model, "recording a step failed: CaptureError: operation not permitted")

    def test_the_reason_is_said_once(self, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        """The model pretends to be on a GPU, where graphs are expected."""
        monkeypatch.setattr(session, "expected_on", lambda device: True)
        handle = model.model.norm.register_forward_hook(lambda *arguments: None)
        with pytest.warns(UserWarning, match="decode: no CUDA graphs, .*: the model has hooks") as caught:
            run(model)
            run(model)
        assert len(caught) == 1
        handle.remove()


def test_an_error_inside_the_model_is_not_hidden(
    recorders: list[TapeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Op by op it comes again, and is raised."""
    model = copy.deepcopy(tiny_model("llama"))
    text = generated("llama", "cpu", NEW)
    heads = StaticHeads(model, text, [0, 1, 0])

    def fail(*arguments: Any) -> None:
        raise RuntimeError("broken")

    runtime_of(model).capability()  # where a model that fails at once is refused
    monkeypatch.setattr("cerberus_ext.target.cache.ops.write_cache", fail)
    with pytest.raises(RuntimeError, match="broken"):
        decode(model, heads, prompt(), max_new_tokens=NEW, tree=TREE)
