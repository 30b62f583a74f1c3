"""What `decode` can do with a model: read and proved once, before anything is printed."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stand_ins import OracleHeads
from tiny_families import make_family
from tiny_models import VOCAB, generate, prompt
from torch import Tensor, nn
from transformers import PreTrainedModel

from cerberus_ext.drafting.gate import AlwaysClosed
from cerberus_ext.engine.decode import decode
from cerberus_ext.runtime.capability import _can_be_padded
from cerberus_ext.runtime.runtime import runtime_of
from cerberus_ext.target import row_invariant
from cerberus_ext.target.step_audit import unreadable

NEW = 16


@pytest.fixture
def llama() -> PreTrainedModel:
    """Of which nothing is known yet."""
    return make_family("llama")


class Forwards:
    """Counts those of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.count = 0
        model.lm_head.register_forward_hook(self.add)

    def add(self, *_: Any) -> None:
        self.count += 1

    def during(self, work: Any) -> int:
        before = self.count
        work()
        return self.count - before


class TestOnce:
    @pytest.fixture
    def forwards(self, llama: PreTrainedModel) -> Iterator[Forwards]:
        """After the model was decoded once."""
        forwards = Forwards(llama)
        assert forwards.during(lambda: runtime_of(llama).capability()) > 5
        assert forwards.during(lambda: decode(llama, None, prompt(), max_new_tokens=NEW, gate=AlwaysClosed())) == NEW
        yield forwards

    def test_found_once(self, llama: PreTrainedModel, forwards: Forwards) -> None:
        assert forwards.during(lambda: runtime_of(llama).capability()) == 0

    def test_weights_changed_in_place(self, llama: PreTrainedModel, forwards: Forwards) -> None:
        with torch.no_grad():
            llama.lm_head.weight.mul_(-1.1)
        assert forwards.during(lambda: runtime_of(llama).capability()) == 0

    def test_weights_replaced(self, llama: PreTrainedModel, forwards: Forwards) -> None:
        llama.model.norm.weight = nn.Parameter(llama.model.norm.weight.detach().clone())
        assert forwards.during(lambda: runtime_of(llama).capability()) > 5
        assert forwards.during(lambda: runtime_of(llama).capability()) == 0

    def test_another_dtype(self, llama: PreTrainedModel, forwards: Forwards) -> None:
        llama.to(torch.bfloat16)
        assert forwards.during(lambda: runtime_of(llama).capability()) > 5

    def test_a_module_replaced(self, llama: PreTrainedModel, forwards: Forwards) -> None:
        llama.model.layers[0].mlp.act_fn = nn.GELU()
        assert forwards.during(lambda: runtime_of(llama).capability()) > 5

    def test_hooks(self, llama: PreTrainedModel, forwards: Forwards) -> None:
        """One may mix tokens, as the one here does."""
        hook = llama.model.layers[0].register_forward_hook(lambda module, inputs, output: output + output.mean(1, True))
        with pytest.warns(RuntimeWarning, match="^decode: no drafts"):
            assert forwards.during(lambda: decode(llama, None, prompt(), max_new_tokens=1)) > 5
        hook.remove()
        assert runtime_of(llama).capability().no_drafts_because is None

    def test_a_forward_of_its_own(self, llama: PreTrainedModel, forwards: Forwards) -> None:
        mlp = llama.model.layers[0].mlp
        forward = mlp.forward
        mlp.forward = lambda hidden: forward(hidden) + hidden.mean(1, keepdim=True)
        with pytest.warns(RuntimeWarning, match="^decode: no drafts"):
            assert forwards.during(lambda: decode(llama, None, prompt(), max_new_tokens=1)) > 5
        del mlp.forward
        assert runtime_of(llama).capability().no_drafts_because is None

    def test_another_number_of_threads(self, llama: PreTrainedModel, forwards: Forwards) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            assert forwards.during(lambda: runtime_of(llama).capability()) > 5
        finally:
            torch.set_num_threads(threads)


class Mixing(nn.Module):
    """Adds a little of the mean over tokens."""

    def __init__(self, inner: nn.Module, share: float) -> None:
        super().__init__()
        self.inner, self.share = inner, share

    def forward(self, hidden: Tensor) -> Tensor:
        output = self.inner(hidden)
        return output + self.share * output.mean(1, keepdim=True)


@pytest.mark.parametrize("share", [1e-4, 1.0])
def test_a_module_that_mixes_tokens(share: float, llama: PreTrainedModel) -> None:
    """Is named by the reading, and found by the proof: without drafts."""
    llama.model.layers[0].mlp = Mixing(llama.model.layers[0].mlp, share)
    reason = "LlamaForCausalLM computes other numbers for a token of a tree than for the token by itself"
    with pytest.warns(RuntimeWarning, match=f"^decode: no drafts: {reason}$"):
        capability = runtime_of(llama).capability()
    assert capability.inexact_because == "Mixing calls mean"
    assert capability.no_drafts_because == reason
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has been said
        want = decode(llama, None, prompt(), max_new_tokens=NEW, gate=AlwaysClosed()).sequences
        heads = OracleHeads(want, 3, VOCAB)
        out = decode(llama, heads, prompt(), max_new_tokens=NEW, tree=8, streamer=heads)
    assert out.sequences.equal(want)
    assert out.stats.no_drafts_because == reason and out.stats.open_steps == 0 and out.stats.steps == NEW - 1
    assert out.stats.exact is True and out.stats.inexact_because is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_the_prompt_calls_is_not_read(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch's products are slow, and it goes the way of the steps: it is the same in all decodes."""
    monkeypatch.setattr(row_invariant, "_is_native", lambda weight: False)
    assert runtime_of(make_family("llama", dtype)).capability().inexact_because is None


@pytest.mark.parametrize(("threads", "can"), [(1, True), (16, True), (32, False)])
def test_widths_that_cannot_be_padded_at_every_size(threads: int, can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """34 nodes of Llama 2 7B on 32 threads: no number up to 50 makes whole vectors of all 12 to 17 shares."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert _can_be_padded({11008}) is can


class ByItself(nn.Linear):
    """Goes another way with a single token."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if input.shape[1] > 1 else torch.einsum("bni,oi->bno", input, self.weight)


@pytest.mark.filterwarnings("ignore:decode. no drafts:RuntimeWarning")  # the bits may differ, or not
def test_what_is_done_with_a_single_token_is_read(llama: PreTrainedModel) -> None:
    llama.model.layers[0].mlp = ByItself(64, 64, bias=False)
    assert runtime_of(llama).capability().inexact_because == "ByItself calls einsum"


@pytest.mark.filterwarnings("ignore:decode. no drafts:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:Dynamo does not know:UserWarning")
@pytest.mark.parametrize("by", ["TorchScript", "torch.compile"])
def test_what_cannot_be_read_is_not_exact(by: str, llama: PreTrainedModel) -> None:
    linear = nn.Linear(64, 64).eval()
    if by == "TorchScript":
        llama.model.layers[0].mlp = torch.jit.script(linear)
    else:
        linear.forward = torch.compile(linear.forward, backend="eager")
        llama.model.layers[0].mlp = linear
    assert runtime_of(llama).capability().inexact_because == f"Linear is compiled by {by}"


def test_unreadable() -> None:
    """Compiled in place, or wrapped."""
    in_place = nn.Linear(2, 2)
    in_place.compile(backend="eager")
    wrapped = torch.compile(nn.Linear(2, 2), backend="eager")
    assert unreadable(nn.Sequential(nn.Linear(2, 2))) is None
    assert unreadable(nn.Sequential(in_place)) == "Linear is compiled by torch.compile"
    assert unreadable(nn.Sequential(wrapped)) == "OptimizedModule is compiled by torch.compile"


def test_a_module_that_might_mix_tokens(llama: PreTrainedModel) -> None:
    """But does not: the proof finds nothing, the reading says that nothing is certain."""
    llama.model.layers[0].mlp = Mixing(llama.model.layers[0].mlp, 0.0)
    want = decode(llama, None, prompt(), max_new_tokens=NEW, gate=AlwaysClosed())
    heads = OracleHeads(want.sequences, 3, VOCAB)
    out = decode(llama, heads, prompt(), max_new_tokens=NEW, tree=8, streamer=heads)
    assert out.sequences.equal(want.sequences) and out.stats.tokens_per_step > 1.5
    for stats in (want.stats, out.stats):
        assert stats.exact is False and stats.inexact_because == "Mixing calls mean"
        assert stats.no_drafts_because is None


def test_attention_that_is_wrong_in_a_step(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a bias for the place in the cache that nobody has thought of: it is lost there."""
    own = sys.modules[type(llama).__module__].eager_attention_forward
    llama.set_attn_implementation("eager")

    def biased(module: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kwargs: Any) -> Any:
        return own(module, query, key * torch.linspace(0.5, 1.5, key.shape[2])[:, None], value, *rest, **kwargs)

    monkeypatch.setattr(sys.modules[type(llama).__module__], "eager_attention_forward", biased)
    message = "decode: model must compute in a step what it computes by itself, LlamaForCausalLM does not: its logits"
    with pytest.raises(ValueError, match=rf"^{message} differ by \d+%$"):
        decode(llama, None, prompt(), max_new_tokens=NEW)
    monkeypatch.undo()
    assert decode(llama, None, prompt(), max_new_tokens=NEW).stats.exact is True, "a refusal is not kept"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AssertionError(), "AssertionError: no reason given"),
        (IndexError("out of range\nsecond line"), "IndexError: out of range"),
        (NotImplementedError("not yet"), "NotImplementedError: not yet"),
    ],
)
def test_a_model_that_fails(
    error: Exception, reason: str, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(llama.model.layers[1].mlp, "forward", fail)
    with pytest.raises(ValueError) as refused:
        decode(llama, None, prompt(), max_new_tokens=NEW)
    assert str(refused.value) == f"decode: model must run over a tree of drafts, LlamaForCausalLM does not: {reason}"


class Alarm(Exception):
    """As the handler of a signal may raise it."""


@pytest.mark.parametrize("interruption", [Alarm, KeyboardInterrupt, TimeoutError])
def test_an_interruption_is_no_fault_of_the_model(
    interruption: type[BaseException], llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it comes while torch has taken a mode from its stack, torch fails on the way out."""

    own = llama.model.layers[1].mlp.forward

    def interrupted(hidden: Tensor) -> Tensor:
        if torch._C._len_torch_function_stack() == 0:
            return own(hidden)
        torch.overrides._pop_mode()
        raise interruption("now")

    with monkeypatch.context() as patch:
        patch.setattr(llama.model.layers[1].mlp, "forward", interrupted)
        with pytest.raises(interruption, match="^now$"):
            decode(llama, None, prompt(), max_new_tokens=NEW)
    assert decode(llama, None, prompt(), max_new_tokens=NEW).stats.exact is True


def test_a_package_that_a_model_misses(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def misses(*_: Any, **__: Any) -> None:
        try:
            import a_package_that_nobody_has  # noqa: F401
        except ImportError:
            raise RuntimeError("install a package")  # noqa: B904

    monkeypatch.setattr(llama.model.layers[1].mlp, "forward", misses)
    with pytest.raises(ValueError, match="LlamaForCausalLM does not: RuntimeError: install a package$"):
        decode(llama, None, prompt(), max_new_tokens=NEW)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers(value: float, llama: PreTrainedModel) -> None:
    """Of a token that can never, or must always, be chosen: the same alone and in a tree."""
    llama.lm_head.bias = nn.Parameter(torch.zeros(VOCAB))
    with torch.no_grad():
        llama.lm_head.bias[50] = value
    capability = runtime_of(llama).capability()
    assert capability.no_drafts_because is None and capability.inexact_because is None


def test_logits_of_zero(llama: PreTrainedModel) -> None:
    with torch.no_grad():
        llama.lm_head.weight.zero_()
    assert runtime_of(llama).capability().no_drafts_because is None


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "mixtral"])
def test_hooks_of_users_run(family: str) -> None:
    """At every forward, and what they change counts."""
    model, seen = make_family(family), []
    layer = next(module for name, module in model.named_modules() if name.endswith(("layers.1", "h.1")))
    plain = generate(model, prompt(), max_new_tokens=NEW)

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(hidden.shape[1])
        return (-hidden, *output[1:]) if isinstance(output, tuple) else -hidden

    with layer.register_forward_hook(hook):
        want = generate(model, prompt(), max_new_tokens=NEW)
        runtime_of(model).capability()
        seen.clear()
        heads = OracleHeads(want, 3, VOCAB)
        out = decode(model, heads, prompt(), max_new_tokens=NEW, tree=8, proposers=[], streamer=heads)
    assert out.sequences.equal(want) and not want.equal(plain)
    assert out.stats.tokens_per_step > 1.5 and seen[0] == 9 and len(seen) == 1 + out.stats.steps
