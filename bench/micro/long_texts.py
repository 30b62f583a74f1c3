"""Steps at 1 k to 128 k tokens of context, of a small random llama: what grows beside attention?

    python bench/micro/long_texts.py [--heads 4] [--out RESULT.json]

For each context: reading the prompt; then steps with one node and with drafts from the text's own past, beside
`tree_attention` alone over as many nodes and as long a cache, both the fastest of many; what the second text, a prompt
that is in the cache already, takes until its first token; memory. `rest` is the step without attention: it is to stay
the same. memory is the most that the process has had.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cerberus_ext import AlwaysClosed, Decoder, ops
from cerberus_ext._host import SuffixIndex

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "shared"))
import machine  # noqa: E402

POSITIONS, SIZE, VOCAB, NEW = 1 << 17, 16, 512, 64  # SIZE: of an attention head
CONTEXTS = (1 << 10, 1 << 13, 1 << 15, POSITIONS - 2 * NEW)


def llama(heads: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=1, head_dim=SIZE, max_position_embeddings=POSITIONS, initializer_range=0.3,
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def fastest(call: Callable[[], Any]) -> float:
    """Milliseconds."""
    found = []
    for _ in range(30):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return min(found) * 1e3


def attention(heads: int, nodes: int, context: int) -> float:
    keys = torch.randn(2, 1, 1, context + NEW, SIZE)
    ancestors = torch.tensor([[(1 << node + 1) - 1] for node in range(nodes)])
    q, length = torch.randn(1, nodes, heads, SIZE), torch.tensor([context])
    return fastest(lambda: ops.tree_attention(q, keys[0], keys[1], length, ancestors, SIZE**-0.5, 0, 0.0, None))


def text(decoder: Decoder, ids: Tensor) -> tuple[float, float]:
    """Milliseconds to the first token, and of the fastest step."""
    times = [time.perf_counter()]
    for _ in decoder.stream(ids, max_new_tokens=NEW):
        times.append(time.perf_counter())
    first, *steps = (1e3 * (end - begin) for begin, end in zip(times, times[1:], strict=False))
    return first, min(steps)


def case(model: LlamaForCausalLM, heads: int, context: int) -> dict[str, float]:
    ids = torch.randint(VOCAB, (1, context), generator=torch.Generator().manual_seed(1))
    with Decoder(model, None, gate=AlwaysClosed()) as decoder:
        first, plain = text(decoder, ids)
        again, drafted = text(drafting := Decoder(model, None), ids)
        assert drafting.stats is not None and drafting.stats.reused_tokens == context - 1
        nodes = round(drafting.stats.nodes_per_step)
    alone, tree = attention(heads, 1, context), attention(heads, nodes, context)
    index, tokens = SuffixIndex(), ids[0].tolist()
    begin = time.perf_counter()
    index.extend(tokens)
    suffix = (time.perf_counter() - begin) / context * 1e6
    return {
        "context": context, "prompt_ms": first, "step_ms": plain, "attention_ms": alone, "rest_ms": plain - alone,
        "nodes": nodes, "drafted_step_ms": drafted, "drafted_attention_ms": tree, "drafted_rest_ms": drafted - tree,
        "prompt_again_ms": again, "suffix_us_per_token": suffix, "memory_MB": peak(),
    }  # fmt: skip


def peak() -> float:
    """MB so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model, results = llama(options.heads), list[dict[str, float]]()
    for context in CONTEXTS:
        results.append({name: round(value, 3) for name, value in case(model, options.heads, context).items()})
        print("  ".join(f"{name} {value}" for name, value in results[-1].items()), flush=True)
    if options.out is not None:
        told = {"date": date.today().isoformat(), "machine": machine.describe(), "contexts": results}
        options.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
