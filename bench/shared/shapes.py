"""The sizes of the models that benchmarks are about. "tiny" only shows that a benchmark works."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shapes:
    """A llama-like model, and the heads that decode with it."""

    name: str
    hidden: int  # D
    intermediate: int
    layers: int
    query_heads: int  # Hq
    kv_heads: int  # Hkv
    head_size: int  # E
    vocab: int  # V
    draft_vocabs: tuple[int, ...]  # Vd: a draft vocabulary, and all tokens
    tied: bool  # the LM head is the embeddings' matrix
    num_heads: int = 4  # K
    head_layers: int = 2  # L
    drafts: int = 8  # P


_ALL = (
    Shapes("135M", 576, 1536, 30, 9, 3, 64, 49152, (8192, 49152), tied=True),  # SmolLM2-135M
    Shapes("1B", 2048, 8192, 16, 32, 8, 64, 128256, (32768, 128256), tied=True),  # Llama-3.2-1B
    Shapes("8B", 4096, 14336, 32, 32, 8, 128, 128256, (32768, 128256), tied=False),  # Llama-3.1-8B
    Shapes("tiny", 64, 96, 2, 4, 2, 16, 515, (130, 515), tied=True),
)
SHAPES = {shapes.name: shapes for shapes in _ALL}
