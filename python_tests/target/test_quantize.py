"""A model in fewer bits: its weights are those of the blocks, to the bit, and its texts do not depend on drafts."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from tiny_families import make_family
from tiny_llama import make_llama
from torch import Tensor, nn
from transformers import PreTrainedModel

import cerberus_ext
from cerberus_ext.engine.decoder import Decoder
from cerberus_ext.evaluation.quality import own_answers, quality
from cerberus_ext.ops.step import BLOCKS, block_bytes, pack_blocks
from cerberus_ext.target.quantize import _in_eight_bits, _in_four_bits

PACKED = {bits for bits in BLOCKS if block_bytes(torch.empty(1, 32, dtype=torch.bfloat16), 1, bits)}


def packs(weight: Tensor, bits: int) -> bool:
    """Whether steps read it in so many bits, on this processor."""
    memory = torch.empty(block_bytes(weight, len(weight), bits), dtype=torch.uint8)
    return pack_blocks([weight], memory.view(BLOCKS[bits]))


def weights_of(out_size: int, size: int, scale: float = 0.05, shift: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(out_size, size, generator=generator) + shift).bfloat16()


def rounded(weight: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:
    return (how(weight.float().reshape(-1, 32)) + 0.0).view(weight.shape).bfloat16()


WAYS = [(_in_four_bits, 4, 15), (_in_eight_bits, 8, 254)]


@pytest.mark.parametrize(("how", "bits", "steps"), WAYS)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.05, 300.0, 1000.0])
@pytest.mark.parametrize("shift", [0.0, 1.0, -30.0])
def test_what_is_rounded_is_packed(
    how: Callable[[Tensor], Tensor], bits: int, steps: int, scale: float, shift: float
) -> None:
    """Whatever the blocks are like; and every weight moves by half a step at the most, and what rounding d takes."""
    weight = weights_of(64, 256, scale, shift * scale)
    weight[0] = 0
    weight[1] = -0.0
    weight[2] = scale
    weight[3, ::2] = 0
    weight[4] = weight[4].abs()
    weight[5, 1:] = 0
    made = rounded(weight, how)
    if bits in PACKED:
        assert packs(made, bits)
    blocks = weight.float().reshape(-1, 32)
    reach = torch.maximum(blocks.amax(1), torch.tensor(0.0)) - torch.minimum(blocks.amin(1), torch.tensor(0.0))
    moved = (made.float().reshape(-1, 32) - blocks).abs().amax(1)
    furthest = blocks.abs().amax(1)
    most = (1.1 if bits == 4 else 2.1) * reach.clamp(min=1e-5) / steps + furthest * 2**-8 + 4e-6
    assert (moved <= most).all()


@pytest.mark.parametrize("bits", ["q4", "q8"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe", "phi3", "qwen2"])
def test_texts_do_not_depend_on_drafts(family: str, bits: str) -> None:
    model = make_family(family, torch.bfloat16)
    done = cerberus_ext.quantize(model, bits)
    assert done.bits and done.bits.keys().isdisjoint(done.left)
    ids = torch.arange(12)[None] % 50 + 3
    drafted = cerberus_ext.decode(model, None, ids, max_new_tokens=40, fuse=True, pack=True)
    plain = cerberus_ext.decode(model, None, ids, max_new_tokens=40, gate=cerberus_ext.AlwaysClosed(), pack=True)
    by_op = cerberus_ext.decode(model, None, ids, max_new_tokens=40, fuse=False)
    assert drafted.stats.exact
    assert drafted.sequences.equal(plain.sequences)
    if family != "gpt2":  # whose weights the fused step reads the other way round: another order of summation
        assert drafted.sequences.equal(by_op.sequences)


def test_every_family_is_packed() -> None:
    """All products of layers in four bits, and the LM head in eight, where this processor has such."""
    if not PACKED:
        pytest.skip("this processor makes no weights of blocks")
    for family in ("llama", "gpt2", "gemma"):
        model = make_family(family, torch.bfloat16)
        done = cerberus_ext.quantize(model, "q4")
        program = Decoder(model, pack=True).explain()
        assert not done.left and "packed in four bits, 1 packed in eight bits" in program, (family, program[:300])


def test_what_is_rounded_and_what_is_left() -> None:
    model = make_llama(hidden_size=64, intermediate_size=100).bfloat16()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    done = cerberus_ext.quantize(model, "q4")
    assert done.bits.pop("lm_head.weight") == 8 and set(done.bits.values()) == {4}
    assert done.left == {
        f"model.layers.{layer}.mlp.down_proj.weight": "100 inputs are no multiple of 32" for layer in range(2)
    }
    changed = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    assert changed == {*done.bits, "lm_head.weight"}
    assert "model.embed_tokens.weight" not in changed and len(done.bits) == 2 * 6


def test_tied_embeddings_stay_the_lm_heads() -> None:
    model = make_llama(tie_word_embeddings=True).bfloat16()
    done = cerberus_ext.quantize(model, "q8")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert done.bits["lm_head.weight"] == 8 and len(done.bits) == 2 * 7 + 1 - 2 and len(done.left) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_what_is_not_finite_stays(value: float) -> None:
    model = make_llama().bfloat16()
    weight = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        weight[3, 5] = value
    before = weight.clone()
    done = cerberus_ext.quantize(model, "q8")
    because = "a weight is not finite, or beyond 60000"
    assert done.left["model.layers.0.self_attn.q_proj.weight"] == because and weight.equal(before) != math.isnan(value)


def test_it_is_the_same_once_more() -> None:
    for bits in ("q4", "q8"):
        model = make_llama(hidden_size=64, intermediate_size=96).bfloat16()
        cerberus_ext.quantize(model, bits)
        again = deepcopy(model)
        cerberus_ext.quantize(again, bits)
        near = [
            (a.float() - b.float()).norm() <= 0.02 * a.float().norm()
            for a, b in zip(model.parameters(), again.parameters(), strict=True)
        ]
        assert all(near)


def test_a_model_that_was_decoded_before_is_packed_anew() -> None:
    model = make_llama(hidden_size=64, intermediate_size=96).bfloat16()
    ids = torch.arange(9)[None]
    first = cerberus_ext.decode(model, None, ids, max_new_tokens=30, fuse=True, pack=True)
    cerberus_ext.quantize(model, "q4")
    fresh = deepcopy(model)
    after = cerberus_ext.decode(model, None, ids, max_new_tokens=30, fuse=True, pack=True)
    assert after.sequences.equal(cerberus_ext.decode(fresh, None, ids, max_new_tokens=30, fuse=False).sequences)
    assert not after.sequences.equal(first.sequences)


def test_what_is_refused() -> None:
    for bits in ("q5", "", 4):
        with pytest.raises(ValueError, match="^quantize: bits must be one of q4, q8, got "):
            cerberus_ext.quantize(make_llama(), bits)
    with pytest.raises(ValueError, match="^quantize: model must be float32, bfloat16 or float16, got torch.float64"):
        cerberus_ext.quantize(make_llama().double(), "q4")


def test_what_it_costs() -> None:
    model: PreTrainedModel = make_llama(hidden_size=64, intermediate_size=96)
    answers = own_answers(model, [torch.arange(6)[None], torch.arange(9)[None]], 30)
    before = quality(model, answers)
    logits = [model(answer.ids).logits[0, answer.prompt - 1 : -1] for answer in answers]
    wanted = [answer.ids[0, answer.prompt :] for answer in answers]
    loss = nn.functional.cross_entropy(torch.cat(logits), torch.cat(wanted))
    assert before.perplexity == pytest.approx(loss.exp().item(), rel=1e-5) and before.agreement == 1
    cerberus_ext.quantize(model, "q8")
    in_eight = quality(model, answers)
    cerberus_ext.quantize(model, "q4")
    in_four = quality(model, answers)
    assert before.agreement >= in_eight.agreement > in_four.agreement > 0.2
    assert before.perplexity < in_four.perplexity
