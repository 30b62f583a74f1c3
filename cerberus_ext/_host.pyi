from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

def best_tree(accuracy: ArrayLike, size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
def ancestors(parents: ArrayLike) -> NDArray[np.int64]: ...
def depths(parents: ArrayLike) -> NDArray[np.int64]: ...
def pack_tree(
    parents: ArrayLike, tokens: ArrayLike, ranks: ArrayLike | None, size: int, batch: int, drafts: int
) -> NDArray[np.int64]: ...

class ConditionalTables:
    def __init__(
        self,
        parents: NDArray[np.int16],
        children: NDArray[np.int16],
        places: NDArray[np.int64],
        slopes: NDArray[np.float32],
        rest: NDArray[np.float32],
    ) -> None: ...

HeadDrafts = tuple[
    ConditionalTables,
    NDArray[np.int64],
    NDArray[np.float32],
    NDArray[np.float32] | None,
    NDArray[np.float64] | None,
    int,
]

def best_drafts(
    tokens: ArrayLike,
    probabilities: ArrayLike,
    proposers: ArrayLike,
    paths: Sequence[tuple[ArrayLike, ArrayLike, int]],
    vocabulary: int,
    size: int,
    max_depth: int,
    heads: HeadDrafts | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]: ...
def read_drafts(
    ids: ArrayLike, logprobs: ArrayLike, platt: NDArray[np.float64] | None, vocabulary: int, max_depth: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]: ...

class SuffixIndex:
    def __init__(self, max_match: int = 24, max_tokens: int = 1 << 20) -> None: ...
    def extend(self, tokens: ArrayLike) -> None: ...
    def end_document(self) -> None: ...
    def propose(self, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
    def propose_after(self, tail: ArrayLike, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]: ...
    def record(self) -> NDArray[np.int64]: ...
    def __len__(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def max_match(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
