"""Adapters that are chosen, scaled and turned off between texts: what a decode keeps for a model is no longer used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stand_ins import OracleHeads
from tiny_models import VOCAB, generate, generated, prompt, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel

import cerberus_ext
from cerberus_ext import Decoder, decode

NEW = 24


class Adapted(nn.Module):
    """A Linear and small additions to it, as peft makes them: which ones count is said by a list, a dictionary, a flag
    and an attribute."""

    def __init__(self, base: nn.Linear, names: tuple[str, ...]) -> None:
        super().__init__()
        self.base_layer = base
        self.added = nn.ModuleDict({name: nn.Linear(base.in_features, base.out_features, False) for name in names})
        self.active, self.scaling, self.off = [names[0]], dict.fromkeys(names, 2.0), False

    def forward(self, x: Tensor) -> Tensor:
        out = self.base_layer(x)
        for name in [] if self.off else self.active:
            out = out + self.added[name](x) * self.scaling[name]
        return out


@pytest.fixture
def llama() -> PreTrainedModel:
    return copy.deepcopy(tiny_model("llama"))


def as_generate(model: PreTrainedModel, decoder: Decoder) -> list[int]:
    want = generate(model, prompt(), max_new_tokens=NEW)
    heads = OracleHeads(want, 3, VOCAB)
    assert decode(model, heads, prompt(), max_new_tokens=NEW, tree=9, streamer=heads).sequences.equal(want)
    out = decoder.decode(prompt(), max_new_tokens=NEW)
    assert out.sequences.equal(want) and out.stats.fused and out.stats.exact
    return want[0].tolist()


def test_switches_between_texts(llama: PreTrainedModel) -> None:
    torch.manual_seed(0)
    adapted: list[Any] = []
    for layer in llama.model.layers:
        layer.mlp.up_proj = Adapted(layer.mlp.up_proj, ("first", "second"))
        adapted.append(layer.mlp.up_proj)
    llama.eval()
    texts = []
    with Decoder(llama) as decoder:
        for change in ("nothing", "active", "active again", "scaling", "both", "off", "on"):
            for one in adapted:
                if change == "active":
                    one.active[:] = ["second"]
                elif change == "active again":
                    one.active = ["first"]
                elif change == "scaling":
                    one.scaling["first"] = 5.0
                elif change == "both":
                    one.active.append("second")
                one.off = change == "off"
            texts.append(as_generate(llama, decoder))
    assert texts[0] != texts[1] and texts[0] == texts[2] != texts[3] and texts[4] == texts[6] != texts[5]


def test_peft(llama: PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")
    options: dict[str, Any] = {"init_lora_weights": False, "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(llama, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], **options), "one")
    wrapped.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj", "o_proj", "lm_head"], **options))
    model, texts = wrapped.eval().get_base_model(), []
    with Decoder(model) as decoder:
        for name in ("one", "other", "one"):
            wrapped.set_adapter(name)
            texts.append(as_generate(model, decoder))
            own = {"attention_mask": torch.ones_like(prompt()), "do_sample": False, "pad_token_id": 0}
            got = wrapped.generate(prompt(), max_new_tokens=NEW, custom_generate=cerberus_ext.generate, **own)
            assert got[0].tolist() == texts[-1]
        with wrapped.disable_adapter():
            assert (
                as_generate(model, decoder) == generate(tiny_model("llama"), prompt(), max_new_tokens=NEW)[0].tolist()
            )
        wrapped.merge_adapter()
        assert as_generate(model, decoder) == texts[0]
    assert texts[0] == texts[2] != texts[1]
    with pytest.raises(TypeError, match=r"got PeftModelForCausalLM: give its get_base_model\(\)$"):
        decode(wrapped, None, prompt())


def test_inputs_that_another_one_makes(llama: PreTrainedModel) -> None:
    """As peft's prompt tuning does, for which the tokens are not all."""

    class Tuned:
        def prepare_inputs_for_generation(self, *arguments: Any, **kwargs: Any) -> Any:
            return type(llama).prepare_inputs_for_generation(llama, *arguments, **kwargs)

    llama.prepare_inputs_for_generation = Tuned().prepare_inputs_for_generation
    with pytest.raises(ValueError, match="generate: model must make its inputs of tokens alone, another one makes"):
        generate(llama, prompt(), max_new_tokens=4, custom_generate=cerberus_ext.generate)
    # As peft leaves it afterwards.
    llama.prepare_inputs_for_generation = type(llama).prepare_inputs_for_generation.__get__(llama)
    want = generate(llama, prompt(), max_new_tokens=4)
    assert generate(llama, prompt(), max_new_tokens=4, custom_generate=cerberus_ext.generate).equal(want)


def test_compiled_around(llama: PreTrainedModel) -> None:
    with pytest.raises(TypeError, match=r"got OptimizedModule: give the model as it was before torch.compile$"):
        decode(torch.compile(llama, backend="eager"), None, prompt())


def test_another_vocabulary(llama: PreTrainedModel) -> None:
    with Decoder(llama) as decoder:
        as_generate(llama, decoder)
        llama.resize_token_embeddings(128, mean_resizing=False)
        as_generate(llama, decoder)
        head = nn.Linear(32, 128)
        with torch.no_grad():
            head.weight.copy_(llama.lm_head.weight)
            head.bias.normal_(0, 2, generator=torch.Generator().manual_seed(0))
        llama.lm_head = head
        as_generate(llama, decoder)


@pytest.mark.parametrize("part", ["model", "layers", "forward"])
def test_compiled_in_place(part: str, llama: PreTrainedModel) -> None:
    """The compiler has nothing to do for a decode, and its switch is as before."""
    calls: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    if part == "model":
        llama.compile(backend=backend)
    elif part == "forward":
        mlp: Any = llama.model.layers[1].mlp
        mlp.forward = torch.compile(mlp.forward, backend=backend)
    else:
        for layer in llama.model.layers:
            layer.compile(backend=backend)
    for fuse in (None, False):
        heads = OracleHeads(generated("llama", "cpu", NEW), 3, VOCAB)
        out = decode(llama, heads, prompt(), max_new_tokens=NEW, tree=9, fuse=fuse, streamer=heads)
        assert out.sequences.equal(generated("llama", "cpu", NEW))
    assert not calls
    llama(prompt())
    assert calls, "outside of a decode it is compiled"
    torch.compiler.reset()
