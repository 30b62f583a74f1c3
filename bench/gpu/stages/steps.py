"""Stage "steps" of a GPU session: what a decoding step costs, with trees of several sizes, for three sizes of models.

The models have random weights, made on the device: a step costs the same whatever they say. So have the heads, of which
nearly no draft is accepted. Two decodes of different lengths are subtracted from each other: what is left is the steps
that one has and the other has not, without the prompt and without the last steps, whose trees are cut.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import machine
import stage
import torch
from block_weights import q4_1, q8_0
from shapes import SHAPES, Shapes
from step_model import PROGRAMS, WAYS, WEIGHT_BYTES, layer_weights, step_time
from subject import our_way, random_heads
from timing import tried
from transformers import LlamaConfig, LlamaForCausalLM

from cerberus_ext import CerberusHeads, Decoder, DecodeStats

MODELS = ("8B", "135M", "1B")  # those first that there is a target for
CONTEXTS = (2048, 512, 8192)
NODES = (1, 64, 8, 16, 32)
NEW_TOKENS = {"cuda": (16, 48), "cpu": (4, 12)}  # of the two decodes


def random_model(shapes: Shapes, device: str, positions: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=shapes.vocab,
        hidden_size=shapes.hidden,
        intermediate_size=shapes.intermediate,
        num_hidden_layers=shapes.layers,
        num_attention_heads=shapes.query_heads,
        num_key_value_heads=shapes.kv_heads,
        head_dim=shapes.head_size,
        max_position_embeddings=positions,
        tie_word_embeddings=shapes.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if device == "cpu" else torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def streamed_bytes(model: LlamaForCausalLM) -> int:
    """Weights that a step reads whole: of the embeddings it reads a few rows, unless they are the LM head, too."""
    embeddings = model.get_input_embeddings().weight
    tied = embeddings.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    skipped = 0 if tied else embeddings.numel() * embeddings.element_size()
    return sum(weight.numel() * weight.element_size() for weight in model.parameters()) - skipped


def put_few_bits(model: LlamaForCausalLM) -> None:
    """Gives the layers weights of a Q4_1 file, the LM head those of a Q8_0 file."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data.copy_((q8_0 if module is head else q4_1)(*module.weight.shape))


class Steps:
    """One model and its heads, of which single cells of the table are measured.

    few_bits: with the weights of put_few_bits, which a step reads in blocks.
    """

    def __init__(self, shapes: Shapes, device: str, contexts: tuple[int, ...], few_bits: bool = False) -> None:
        torch.manual_seed(0)
        self.shapes, self.device = shapes, device
        self.model = random_model(shapes, device, max(contexts) + 128)
        self.dtype = self.model.dtype
        with torch.device(device):
            self.heads: CerberusHeads = random_heads(shapes.vocab, shapes.hidden, shapes.draft_vocabs[0]).to(self.dtype)
        self.bytes, self.weights_in = streamed_bytes(self.model), WAYS["fused"]
        if few_bits:
            put_few_bits(self.model)
            self.weights_in = layers_in, head_in = WAYS["fused, four bits"]
            in_layers = shapes.layers * layer_weights(shapes) * WEIGHT_BYTES[layers_in]
            self.bytes = int(in_layers + shapes.vocab * shapes.hidden * WEIGHT_BYTES[head_in])

    def seconds(self, context: int, nodes: int, graphs: bool) -> dict[str, Any]:
        """Of a step, and how it came about."""
        numbers = torch.Generator().manual_seed(context)
        ids = torch.randint(self.shapes.vocab, (1, context), generator=numbers).to(self.device)
        way = our_way("", self.model, self.heads, nodes, graphs)
        fewer, more = NEW_TOKENS[self.device]
        stats: dict[int, list[DecodeStats]] = {more: [], fewer: []}
        for new in (more, more, more, fewer, fewer, fewer):  # the first ones capture
            one = way.run(ids, new)[1]
            assert one is not None  # our loop has statistics
            stats[new].append(one)
        short, long = (min(stats[new][1:], key=_step_seconds) for new in (fewer, more))
        return {
            "seconds": (_step_seconds(long) - _step_seconds(short)) / (long.steps - short.steps),
            "tokens_per_step": long.tokens_per_step,
            "captures": sum(one.captures for every in stats.values() for one in every),
            "capture_seconds": sum(one.capture_seconds for every in stats.values() for one in every),
            "graphed_steps": long.graphed_steps,
            "fused": long.fused,
            "fallback": long.fallback,
        }


def body(run: stage.Stage) -> None:
    models, contexts = (("tiny",), (64,)) if run.on_cpu else (MODELS, CONTEXTS)
    copy_speed = run.result["copy_bytes_per_second"] = machine.copy_bandwidth(run.device)
    run.result["weights"] = "random"
    for name in models:
        keys = {_key(name, context, nodes) for context in contexts for nodes in NODES}
        if keys <= set(run.rows) or run.left < 5:
            continue
        steps = Steps(SHAPES[name], run.device, contexts)
        for context, nodes in cells(contexts):
            if run.begin(_key(name, context, nodes), limit=60):
                row, problem = measure(steps, context, nodes, copy_speed, run)
                run.problems += [problem] if problem else []
                run.add(_key(name, context, nodes), row)
                print(row, flush=True)
        del steps
        gc.collect()
        if not run.on_cpu:
            torch.cuda.empty_cache()
    if any(_key(name, c, n) not in run.rows for name in models for c, n in cells(contexts)):
        run.unfinished = "out of time"


def cells(contexts: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    return ((context, nodes) for context in contexts for nodes in NODES)


def measure(
    steps: Steps, context: int, nodes: int, copy_speed: float, run: stage.Stage
) -> tuple[dict[str, Any], str | None]:
    """A row, and what went wrong: where a step cannot be a graph, it is measured without."""
    row: dict[str, Any] = {
        "model": steps.shapes.name,
        "dtype": str(steps.dtype).removeprefix("torch."),
        "context": context,
        "nodes": nodes,
        "weight_bytes": steps.bytes,
        "floor_milliseconds": steps.bytes / copy_speed * 1e3,
    }
    graphs = not run.on_cpu
    found, failure = tried(lambda: steps.seconds(context, nodes, graphs), run.device)
    Decoder(steps.model).close()  # what is kept has a cache as long as the context
    problem = None
    if found is None and graphs:
        problem = f"{_key(steps.shapes.name, context, nodes)}: not as a graph: {failure}"
        found, failure = tried(lambda: steps.seconds(context, nodes, False), run.device)
    if found is None:
        return row | {"error": failure}, f"{_key(steps.shapes.name, context, nodes)}: {failure}"
    row |= found | {"milliseconds": found.pop("seconds") * 1e3, "graphed": graphs and problem is None}
    program = PROGRAMS["fused" if row["fused"] else "op by op"]
    weights_in = steps.weights_in if row["fused"] else WAYS["op by op"]
    row["expected_milliseconds"] = step_time(steps.shapes, context, nodes, program, *weights_in).seconds * 1e3
    row["share_of_floor"] = row["floor_milliseconds"] / row["milliseconds"]
    alone = run.rows.get(_key(steps.shapes.name, context, 1), {}).get("milliseconds")
    row["over_autoregressive"] = row["milliseconds"] / (alone or row["milliseconds"]) if nodes == 1 or alone else None
    return row, problem


def _step_seconds(stats: DecodeStats) -> float:
    """Of everything but the prompt."""
    return stats.total_seconds - stats.seconds["prefill"]


def _key(model: str, context: int, nodes: int) -> str:
    return f"{model} {context} {nodes}"
