"""Compiled steps: the text stays what it was, nothing is compiled twice, a node has the bits that it has alone."""

from __future__ import annotations

import copy
import gc
import os
import shutil
import sysconfig
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_ins import AdversarialHeads, LastDraftHeads, OracleHeads, RandomGate, RandomHeads
from tiny_families import make_family
from tiny_llama import make_llama
from tiny_models import VOCAB, generate, prompt, tiny_model
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import PreTrainedModel

from cerberus_ext import SuffixProposer
from cerberus_ext.drafting.dynamic_policy import DynamicPolicy
from cerberus_ext.drafting.gate import AlwaysClosed, AlwaysOpen
from cerberus_ext.drafting.static_policy import StaticPolicy
from cerberus_ext.drafting.tree import ALONE
from cerberus_ext.engine.decode import decode
from cerberus_ext.runtime import compiled_step, runtime
from cerberus_ext.runtime.compiled_step import CompileError
from cerberus_ext.runtime.runtime import runtime_of
from cerberus_ext.runtime.stats import DecodeOutput, DecodeStats

NEW = 24
# Of 4 nodes each: nothing but this size and 1 is compiled for most of the tests, since each size takes seconds.
TREES = {
    "chain": StaticPolicy.chain(3),
    "wide": StaticPolicy.from_widths([3]),
    "both": StaticPolicy.from_paths([(0,), (0, 1), (1,)]),
}
HEADS = {"random": RandomHeads, "adversarial": AdversarialHeads, "oracle": OracleHeads, "last draft": LastDraftHeads}
GATES = {"open": AlwaysOpen, "closed": AlwaysClosed, "random": RandomGate}

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="inductor needs a C++ compiler and Python.h",
)


def run(
    model: PreTrainedModel, heads: str = "oracle", new: int = NEW, ids: Tensor | None = None, **options: Any
) -> DecodeOutput:
    """Decodes, and compares with `generate`."""
    ids = prompt() if ids is None else ids
    want = generate(model, ids, max_new_tokens=new)
    stand_in = HEADS[heads](want, 4, VOCAB)
    options = {"tree": TREES["both"], "compile": True, **options}
    out = decode(model, stand_in, ids, max_new_tokens=new, streamer=stand_in, **options)
    assert out.sequences.tolist() == want.tolist()
    return out


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are run op by op: for tests of what is done with them, since compiling takes seconds."""
    monkeypatch.setattr(compiled_step, "_compile_piece", lambda piece, examples, nodes: piece)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    """Compiled for 1 and 4 nodes."""
    model = copy.deepcopy(tiny_model("llama"))
    stats = run(model, "random", gate=RandomGate()).stats
    assert stats.compilations == 2 and stats.row_invariant is True
    assert stats.compile_seconds > stats.total_seconds, "compiling is not part of the phases"
    return model


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("heads", HEADS)
def test_equals_generate(heads: str, tree: str, gate: str, llama: PreTrainedModel) -> None:
    stats = run(llama, heads, tree=TREES[tree], gate=GATES[gate]()).stats
    assert stats.compilations == 0 and stats.compile_seconds == 0, "it was compiled before"
    if heads == "oracle" and gate == "open":
        assert stats.tokens_per_step > 1.5


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("heads", ["last draft", "random"])
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "qwen2-window", "mistral"])
def test_other_models(name: str, heads: str) -> None:
    assert run(copy.deepcopy(tiny_model(name)), heads, tree=StaticPolicy.from_widths([3, 4])).stats.compilations > 0


@pytest.mark.usefixtures("interpreted")
def test_plain_decoding_compiles_one_size() -> None:
    stats = run(copy.deepcopy(tiny_model("llama")), gate=AlwaysClosed()).stats
    assert (stats.compilations, stats.row_invariant) == (1, None)


def test_other_lengths(llama: PreTrainedModel) -> None:
    """Neither the capacity of the cache nor how much of it is in use is compiled in."""
    for length, new in ((1, 5), (100, 150)):
        stats = run(llama, new=new, ids=prompt(length=length)).stats
        assert stats.compilations == 0


@pytest.mark.usefixtures("interpreted")
def test_each_size_is_compiled_once() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    for tree in (StaticPolicy.from_widths([2, 2]), StaticPolicy.from_widths([69])):
        first, second = (run(model, "random", tree=tree).stats for _ in range(2))
        assert (first.compilations, second.compilations) == (1 + (tree.size == 7), 0), "1, too, the first time"


@pytest.mark.usefixtures("interpreted")
def test_layers_share_their_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = []
    monkeypatch.setattr(compiled_step, "_compile_piece", lambda piece, *_: pieces.append(piece) or piece)
    run(make_llama(num_hidden_layers=6), gate=AlwaysClosed())
    assert len(pieces) == 3


def test_dynamic_tree(llama: PreTrainedModel) -> None:
    want = generate(llama, prompt(), max_new_tokens=NEW)
    options = {"tree": DynamicPolicy(4), "proposers": [SuffixProposer()], "compile": True}
    out = decode(llama, None, prompt(), max_new_tokens=NEW, **options)
    assert out.sequences.tolist() == want.tolist() and out.stats.compilations == 0


def test_drawn_tokens(llama: PreTrainedModel) -> None:
    options = {"max_new_tokens": NEW, "temperature": 1.0, "seed": 5, "gate": AlwaysClosed()}
    texts = [decode(llama, None, prompt(), compile=compile, **options).sequences for compile in (False, True)]
    assert texts[0].equal(texts[1])


@pytest.mark.parametrize("nodes", [1, 2, 3, 4])
def test_is_what_the_model_computes(nodes: int, llama: PreTrainedModel) -> None:
    """Hidden states, logits, and what is left in the cache, also where the step is filled up."""
    tree = StaticPolicy.chain(nodes - 1).tree
    tokens = torch.arange(nodes)[None] + 3
    found = []
    for steps in (None, runtime_of(llama).compiled([1, 4], DecodeStats())):
        with torch.inference_mode(), runtime_of(llama).target(64, compiled=steps) as base:
            base.prefill(prompt())
            hidden, logits = base.step(tokens, tree.on(tokens.device))
            assert hidden.shape == (1, nodes, 32) and logits.shape == (1, nodes, VOCAB)
            length = base.cache.committed
            found.append([hidden, logits, torch.stack(base.cache.planes())[..., : length + nodes, :].clone()])
            assert base.cache.length.tolist() == [length] == [9]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_node_has_the_bits_that_it_has_alone(dtype: torch.dtype, llama: PreTrainedModel) -> None:
    model: Any = llama if dtype == torch.float32 else make_llama(num_hidden_layers=1).to(dtype)
    stats = DecodeStats()
    steps = runtime_of(model).compiled([1, 4], stats)
    tokens, tree = torch.tensor([[5, 60, 7, 88]]), StaticPolicy.from_widths([3]).tree
    with torch.inference_mode(), runtime_of(model).target(64, compiled=steps) as base:
        base.prefill(prompt())
        hidden, logits = base.step(tokens, tree.on(tokens.device))
        root_hidden, root_logits = base.step(tokens[:, :1], ALONE.on(tokens.device))
        assert root_hidden[0, 0].equal(hidden[0, 0]) and root_logits[0, 0].equal(logits[0, 0])
        base.cache.extend(1)  # the root
        for node in (1, 2, 3):
            alone_hidden, alone_logits = base.step(tokens[:, [node]], ALONE.on(tokens.device))
            assert alone_hidden[0, 0].equal(hidden[0, node]) and alone_logits[0, 0].equal(logits[0, node])
    assert stats.row_invariant is True


def test_sums_are_not_split_over_threads() -> None:
    """Inductor would, where there is one row only, and then add in another order."""

    def norm(x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True))

    x = torch.randn(4, 8192, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = [compiled_step._compile_piece(make_fx(norm)(part), [part], len(part))(part) for part in (x, x[:1])]
    finally:
        torch.set_num_threads(threads)
    assert rows[0][:1].equal(rows[1])


def test_values_are_rounded_where_ops_are_fused() -> None:
    """As op by op, whatever is fused with what; that depends on the number of nodes."""

    def chain(x: Tensor, y: Tensor) -> Tensor:
        return x * y * y * y + x

    x, y = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    compiled = compiled_step._compile_piece(make_fx(chain)(x, y), [x, y], 3)
    assert compiled(x, y).equal(chain(x, y))


@pytest.mark.usefixtures("interpreted")
def test_bits_that_differ_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = compiled_step._run_alone
    monkeypatch.setattr(
        compiled_step, "_run_alone", lambda program, cache, tokens: real(program, cache, tokens) + len(tokens)
    )
    assert run(copy.deepcopy(tiny_model("llama"))).stats.row_invariant is False


@pytest.mark.usefixtures("interpreted")
class TestChanges:
    """Of a model between two decodes."""

    @pytest.fixture
    def model(self, interpreted: None) -> PreTrainedModel:
        model = copy.deepcopy(tiny_model("llama"))
        run(model)
        return model

    def test_weights_in_place(self, model: PreTrainedModel) -> None:
        before = generate(model, prompt(), max_new_tokens=NEW)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(-1.1)
        assert run(model).stats.compilations == 0
        assert not generate(model, prompt(), max_new_tokens=NEW).equal(before)

    def test_weights_replaced(self, model: PreTrainedModel) -> None:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).contiguous())
        run(model)

    def test_another_number_of_threads(self, model: PreTrainedModel) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:
            assert run(model).stats.compilations == 2
        finally:
            torch.set_num_threads(threads)
        assert run(model).stats.compilations == 0

    def test_model_is_not_kept(self, model: PreTrainedModel) -> None:
        kept = len(runtime._runtimes)
        other = copy.deepcopy(model)
        run(other)
        assert len(runtime._runtimes) == kept + 1 and runtime_of(other)._programs is not None
        alive = weakref.ref(other)
        del other
        gc.collect()
        assert alive() is None and len(runtime._runtimes) == kept


REFUSED = "decode: compile must be False here, got True: "


class TestErrors:
    @pytest.fixture
    def checked(self) -> Iterator[PreTrainedModel]:
        """A model that is left as it was, and decodes as it did."""
        model = make_llama(hidden_size=48)  # no other test compiles steps of this size
        yield model
        self.is_as_it_was(model)

    def is_as_it_was(self, model: PreTrainedModel) -> None:
        assert model.config._attn_implementation == "sdpa" and not model.get_output_embeddings()._forward_pre_hooks
        assert run(model, compile=False).stats.compilations == 0

    def test_model_that_computes_its_attention_itself(self) -> None:
        model = make_family("falcon")
        with pytest.raises(CompileError, match=REFUSED + "the model computes its attention itself"):
            run(model)
        self.is_as_it_was(model)

    def test_hooks(self, checked: PreTrainedModel) -> None:
        hook = checked.model.layers[0].register_forward_hook(lambda *_: None)
        with pytest.raises(CompileError, match=REFUSED + r"the model has hooks \(model.layers.0\)"):
            run(checked)
        hook.remove()

    def test_autocast(self) -> None:
        """To the model's own dtype; to others it is refused with or without `compile`."""
        model = make_llama(hidden_size=48).to(torch.bfloat16)
        with pytest.raises(CompileError, match=REFUSED + "autocast is on"), torch.autocast("cpu"):
            run(model)
        assert decode(model, None, prompt(), max_new_tokens=3).stats.new_tokens == 3

    def test_no_compiler(self, checked: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from torch._inductor import config

        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
        refused = pytest.raises(CompileError, match=REFUSED + "compiling a step failed: .*no-such-compiler")
        with config.patch({"cpp.cxx": (None, "no-such-compiler")}), refused:
            run(checked)

    def test_model_that_reads_values(self, checked: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the host does with them cannot be traced."""
        rotary = type(checked.model.rotary_emb)
        real = rotary.forward
        monkeypatch.setattr(
            rotary, "forward", lambda self, x, position_ids: real(self, x, position_ids * int(position_ids.max() > 0))
        )
        with pytest.raises(CompileError, match=REFUSED + "compiling a step failed: .*data-dependent"):
            run(checked)
        monkeypatch.undo()

    def test_model_that_computes_with_the_cache(
        self, checked: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from cerberus_ext.target.cache import TreeCacheLayer

        real = TreeCacheLayer.update

        def update(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            keys, values = real(*args, **kwargs)
            return keys * 1, values

        monkeypatch.setattr(TreeCacheLayer, "update", update)
        with pytest.raises(CompileError, match=REFUSED + "the model computes with the cache in other ways"):
            run(checked)
        monkeypatch.undo()

    def test_on_another_device(self) -> None:
        model = copy.deepcopy(tiny_model("llama")).to("meta")
        with pytest.raises(CompileError, match=REFUSED + "the model is on meta, where steps are CUDA graphs"):
            runtime_of(model).compiled([1], DecodeStats())
