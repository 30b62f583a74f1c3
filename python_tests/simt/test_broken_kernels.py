"""Deliberately broken copies of the kernels: each is found to be wrong, by the tests of the ops as small as they are.

Only the broken file is compiled again; the rest of the library is what the other tests use.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from simt_library import ROOT, build, run, tool

from cerberus_ext.ops.device_step import device_block_bytes


class Broken(NamedTuple):
    why: str
    op: str  # csrc/cuda/<op>.cu is compiled
    file: str  # of csrc/cuda, changed: `before`, which is there exactly once, becomes `after`
    before: str
    after: str


BROKEN = [
    Broken(
        "block_reduce reads before all have written",
        "hidden_entropy",
        "reduce.cuh",
        "if (lane_index() == 0) partial[warp_index()] = value;\n  __syncthreads();\n  value = partial[0];",
        "if (lane_index() == 0) partial[warp_index()] = value;\n  value = partial[0];",
    ),
    Broken(
        "the last element of a row is left out",
        "hidden_entropy",
        "copy.cuh",
        "if (first + i * kStride >= size) break;",
        "if (first + i * kStride + kVector >= size) break;",
    ),
    Broken(
        "one thread of a warp stays away from a shuffle",
        "hidden_entropy",
        "reduce.cuh",
        "for (int mask = kLanes / 2; mask > 0; mask /= 2) value =",
        "for (int mask = kLanes / 2; mask > 0 && threadIdx.x != 7; mask /= 2) value =",
    ),
    Broken(
        "layers without a barrier of the grid between them",
        "head_stack",
        "head_stack.cu",
        "if (next.layer != place.layer && !is_over(next)) grid_barrier();",
        "",
    ),
    Broken(
        "sums are read before all slices have written theirs",
        "head_stack",
        "skinny.cuh",
        "kTileRows);\n    __syncthreads();\n    work.finish(",
        "kTileRows);\n    work.finish(",
    ),
    Broken(
        "weights are not waited for",
        "head_stack",
        "skinny_weights.cuh",
        "wait_for_copies<Product::kStages - 1>();\n      f(",
        "f(",
    ),
    Broken(
        "weights are waited for a chunk late",
        "head_stack",
        "skinny_weights.cuh",
        "wait_for_copies<Product::kStages - 1>();",
        "wait_for_copies<Product::kStages>();",
    ),
    Broken(
        "a stage is filled again before it is read",
        "draft_topk",
        "skinny_weights.cuh",
        "f(Weights{{slot[0]}, {slot[kProductThreads]}}, column);\n      start(slot);",
        "start(slot);\n      f(Weights{{slot[0]}, {slot[kProductThreads]}}, column);",
    ),
    Broken(
        "chunks that are not there are no group of copies",
        "draft_topk",
        "skinny_weights.cuh",
        "    end_copies();",
        "    if (exist) end_copies();",
    ),
    Broken(
        "a slice ends a chunk early",
        "head_stack",
        "skinny_split.cuh",
        "chunks * (of_part + 1) >> log_part_slices) * chunk - begin;",
        "(chunks * (of_part + 1) - 1) >> log_part_slices) * chunk - begin;",
    ),
    Broken(
        "sums of two rows in one place",
        "draft_topk",
        "skinny_split.cuh",
        "return (row << log_round_rows())",
        "return (row >> 1 << log_round_rows())",
    ),
    Broken(
        "room for blocks is asked for before their shared memory",
        "head_stack",
        "launch.cuh",
        "if (const cudaError_t error = allow_shared_bytes(kernel, shared_bytes); error != cudaSuccess) return error;",
        "",
    ),
    Broken(
        "launches overlap whose code cannot wait",
        "tree_attention",  # the first of the library: the linker keeps its copy of an inline function
        "device.h",
        "waits = value >= 90;",
        "waits = value >= 80;",
    ),
    Broken(
        "one token past the end of a part",
        "draft_topk",
        "draft_topk.cu",
        "vocab_row < round_rows_ && id < end;",
        "vocab_row < round_rows_ && id <= end;",
    ),
    Broken(
        "the merge does not wait for the parts",
        "draft_topk",
        "draft_topk.cu",
        "wait_for_previous_launch();\n\n  SoftmaxSum softmax",
        "SoftmaxSum softmax",
    ),
    Broken(
        "a product does not wait for its input",
        "step_product",
        "step_product.cu",
        "void begin() const { wait_for_previous_launch(); }",
        "void begin() const {}",
    ),
    Broken(
        "the selection is set again while others read it",
        "choose_tokens",
        "choose_tokens.cu",
        "__syncthreads();  // all have read them before they are set again",
        "",
    ),
    Broken(
        "parents are shared out to too few warps",
        "rerank",
        "rerank.cu",
        "shuffle(parent, warp_index() + i * kWarps)",
        "shuffle(parent, warp_index())",
    ),
    Broken(
        "a lane reads votes that are not written yet",
        "verify_tree",
        "verify_tree.cu",
        "__syncthreads();",
        "",
    ),
    Broken(
        "tiles are not waited for",
        "tree_attention",
        "tree_attention_mma.cuh",
        "wait_for_copies<Shape::kStages - 2>();",
        "",
    ),
    Broken(
        "tiles are waited for one late",
        "tree_attention",
        "tree_attention_mma.cuh",
        "wait_for_copies<Shape::kStages - 2>();",
        "wait_for_copies<Shape::kStages - 1>();",
    ),
    Broken(
        "a tile's place is filled again while other warps read it",
        "tree_attention",
        "tree_attention_mma.cuh",
        "__syncthreads();  // the tile is there, and nobody needs the one before it\n",
        "",
    ),
    Broken(
        "a tile belongs to two pieces",
        "tree_attention",
        "tree_attention.cuh",
        "border(piece.split + 1));",
        "border(piece.split + 1) + 1);",
    ),
    Broken(
        "a piece ends a tile early",
        "tree_attention",
        "tree_attention.cuh",
        "(last + kKeys - 1) / kKeys : piece.tile;",
        "last / kKeys : piece.tile;",
    ),
    Broken(
        "pieces begin elsewhere in a longer text",
        "tree_attention",
        "tree_attention.cuh",
        "[](int split) { return static_cast<int>(first_of_piece(split)); }",
        "[&](int s) { return static_cast<int>(first_of_piece(s)) + (s == 1 ? piece.length / 32 % 2 * 64 : 0); }",
    ),
    Broken(
        "a path's keys are added in another order than that of their positions",
        "tree_attention",
        "tree_attention_path.cuh",
        "nth_bit(word, n);",
        "nth_bit(word, count - 1 - n);",
    ),
    Broken(
        "keys of a tile with paths are not waited for",
        "tree_attention",
        "tree_attention_mma_tail.cuh",
        "      wait_for_copies<1>();\n",
        "",
    ),
    Broken(
        "values come in the place of keys that other warps read",
        "tree_attention",
        "tree_attention_mma_tail.cuh",
        "__syncthreads();  // all have read the keys\n",
        "",
    ),
    Broken(
        "a tile with paths comes in the place of values that other warps read",
        "tree_attention",
        "tree_attention_mma_tail.cuh",
        "__syncthreads();  // nobody needs what lies there\n",
        "",
    ),
    Broken(
        "pieces are put together before they are there",
        "tree_attention",
        "tree_attention_combine.cuh",
        "  wait_for_previous_launch();\n",
        "",
    ),
    Broken(
        "the length is read before it is there",
        "commit_cache",
        "commit_cache.cu",
        "a.length[row] = length_of_row + kept;\n  }\n  __syncthreads();",
        "a.length[row] = length_of_row + kept;\n  }",
    ),
]
# Of weights in blocks, which a processor with AVX-512 packs.
BROKEN_BLOCKS = [
    Broken(
        "blocks are not waited for",
        "step_product",
        "skinny_blocks.cuh",
        "wait_for_copies<Product::kStages - 2>();\n      warp_barrier();",
        "warp_barrier();",
    ),
    Broken(
        "blocks are read before the other lanes have waited for their parts",
        "step_product",
        "skinny_blocks.cuh",
        "      warp_barrier();\n",
        "",
    ),
    Broken(
        "a place of blocks is filled again before it is read",
        "step_product",
        "skinny_blocks.cuh",
        "(next_ == 0 ? kLast : next_ - kBytes)",
        "next_",
    ),
    Broken(
        "the columns of a kind of weights are split by its own tiles",
        "step_product",
        "step_product.cu",
        "split(a.tiles,",
        "split(tiles,",
    ),
]
if device_block_bytes(torch.empty(1, 32, dtype=torch.bfloat16), 4):
    BROKEN += BROKEN_BLOCKS
UNBROKEN = "unbroken"


def changed_copy(broken: Broken, folder: Path) -> Path:
    """csrc/cuda in `folder`, with the change."""
    shutil.copytree(ROOT / "csrc" / "cuda", folder)
    file = folder / broken.file
    text = file.read_text()
    assert text.count(broken.before) == 1, f"{broken.file} has {text.count(broken.before)} times: {broken.before}"
    file.write_text(text.replace(broken.before, broken.after))
    return folder


def compile_again(library: Path, op: str, kernels: Path) -> Path:
    """_simt.so with the object file of one op compiled from the folder `kernels`."""
    commands = json.loads((library / "compile_commands.json").read_text())
    (command,) = [entry for entry in commands if entry["file"] == str(ROOT / "csrc" / "cuda" / f"{op}.cu")]
    object_file = kernels / f"{op}.o"
    compiling = shlex.split(command["command"])
    was = compiling[compiling.index("-o") + 1]
    compiling[compiling.index("-o") + 1] = object_file
    compiling[compiling.index("-c") + 1] = kernels / f"{op}.cu"
    run(compiling, cwd=library)
    # The last command is the one that links.
    linking = run([tool("ninja"), "-C", library, "-t", "commands", "_simt.so"]).strip().splitlines()[-1]
    assert linking.count(f" {was} ") == 1 and linking.count(" -o _simt.so ") == 1, linking
    linking = linking.replace(was, str(object_file))
    run(["sh", "-c", linking.replace("-o _simt.so", f"-o {kernels / '_simt.so'}")], cwd=library)
    shutil.copy(library / "libsimt.so", kernels)  # looked for next to it
    return kernels / "_simt.so"


def broken_library(broken: Broken, library: Path, folder: Path) -> Path:
    """Its _simt.so, which is kept next to the library until that or the change is another."""
    kernels = changed_copy(broken, folder)
    content = [file.read_bytes() for file in (kernels / broken.file, library / "_simt.so", library / "libsimt.so")]
    kept = library / "broken" / hashlib.sha256(b"".join([broken.op.encode(), *content])).hexdigest()[:16]
    if not (kept / "_simt.so").is_file():
        made = compile_again(library, broken.op, kernels)
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copy(library / "libsimt.so", kept)
        shutil.copy(made, kept / "partial")
        (kept / "partial").replace(kept / "_simt.so")
    return kept / "_simt.so"


@pytest.fixture(scope="module")
def verdicts(built, tmp_path_factory) -> dict[str, str]:
    """All at once, since there may be several processors: what simt_broken says of each."""
    library = build("_simt.so")
    folder = tmp_path_factory.mktemp("kernels")

    nothing = Broken(UNBROKEN, "verify_tree", "verify_tree.cu", "ballot(match)", "ballot(match)")

    def make(number: int) -> Path:
        return broken_library([*BROKEN, nothing][number], library, folder / str(number))

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        libraries = list(threads.map(make, range(len(BROKEN) + 1)))
    for old in (library / "broken").iterdir():
        if old / "_simt.so" not in libraries:
            shutil.rmtree(old, ignore_errors=True)
    given = [[broken.op, str(path)] for broken, path in zip([*BROKEN, nothing], libraries, strict=True)]
    given += [[op, str(library / "_simt.so")] for op in dict.fromkeys(broken.op for broken in BROKEN)]
    names = [*(broken.why for broken in BROKEN), UNBROKEN, *(f"{UNBROKEN} {op}" for op, _ in given[len(BROKEN) + 1 :])]
    helpers = Path(__file__).parents[1] / "helpers"
    command = [sys.executable, helpers / "simt_broken.py", *(part for pair in given for part in pair)]
    path = os.pathsep.join([str(helpers), *sys.path])
    printed = run(command, env=os.environ | {"PYTHONPATH": path}, cwd=folder)
    return dict(zip(names, printed.strip().splitlines(), strict=True))


@pytest.mark.parametrize("why", [broken.why for broken in BROKEN])
def test_broken_is_found(why, verdicts):
    assert verdicts[why].startswith("wrong: ")


def test_unbroken_is_not(verdicts):
    """A copy that was compiled and linked in the same way, and every op that has a broken copy as it is."""
    unbroken = {name: verdict for name, verdict in verdicts.items() if name.startswith(UNBROKEN)}
    assert len(unbroken) > 1 and set(unbroken.values()) == {"right"}
