"""How many chunks of weights the kernels keep on their way, read from their machine code; no GPU is needed.

    python bench/in_flight.py LIBRARY [LIBRARY ...] [--least 6]

LIBRARY: _cuda.so, or object files or cubins of csrc/cuda. Prints, for each kernel that streams weights through a ring
(csrc/cuda/skinny.cuh, skinny_blocks.cuh), how many stages stay in flight while it waits for the oldest. The status is 1
where a kernel has fewer than `--least`, or where one is missing. cuobjdump and nvdisasm are looked for on PATH and
among PyPI's packages; without them nothing is checked, which is said, and the status is 0.

A copy to shared memory is LDGSTS; LDGDEPBAR closes a group of copies, and DEPBAR.LE SBk, n waits until n groups of
scoreboard k are left. Any other instruction that waits for this scoreboard waits for all: then none is in flight.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

KERNELS = ("head_stack_kernel", "draft_topk_parts_kernel", "step_product_kernel", "step_grouped_kernel")
RING = re.compile(r"7ProductI(\w+?)Li([48])ELi(\d)E")  # loads of 8 or 4 elements, that is of 16 bytes
DTYPES = {"13__nv_bfloat16": "bfloat16", "6__half": "float16", "f": "float32"}
OF_BLOCKS = "step_product_kernel"  # that multiplies weights in blocks, too
BLOCKS = re.compile(r"12BlockProductILNS_7PackingE([2456])ELi(\d)E")  # skinny_blocks.cuh
PACKINGS = {"2": "four bits", "6": "five bits", "4": "bytes", "5": "bytes of 16"}
CODE = re.compile(r"\s*/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*/\* (0x[0-9a-f]{16}) \*/")
CONTROL = re.compile(r"\s*/\* (0x[0-9a-f]{16}) \*/")


class Instruction(NamedTuple):
    address: int
    text: str
    waits: int  # bit k: until all that set scoreboard k is done


def decode(listing: str) -> Iterator[tuple[str, str, list[Instruction]]]:
    """Architecture, mangled name and code of every function of what cuobjdump -sass prints.

    An instruction has two words; bits 52 to 57 of the second are the scoreboards that it waits for.
    """
    architecture = ""
    for part in re.split(r"^\s*(?=code for |Function : )", listing, flags=re.MULTILINE):
        if found := re.match(r"code for (\w+)", part):
            architecture = found[1]
        if not (found := re.match(r"Function : (\S+)", part)):
            continue
        code, lines = [], part.splitlines()
        for line, after in zip(lines, lines[1:], strict=False):
            if (first := CODE.match(line)) and (second := CONTROL.match(after)):
                code.append(Instruction(int(first[1], 16), first[2], int(second[1], 16) >> 52 & 63))
        yield architecture, found[1], code


def loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """The innermost ones that multiply."""
    found = []
    for instruction in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction.text)
        if target and int(target[1], 16) < instruction.address:
            body = [one for one in code if int(target[1], 16) <= one.address <= instruction.address]
            if any(re.search(r"\b(HMMA|FFMA)\b", one.text) for one in body):
                found.append(body)
    for body in found:
        within = [other for other in found if body[0] <= other[0] and other[-1] <= body[-1]]
        if within == [body]:
            yield body


def in_flight(code: list[Instruction]) -> int:
    """Groups of copies that stay on their way at every wait of the loop that copies and multiplies; 0: no such loop."""
    kept = []
    for body in loops(code):
        if not any("LDGSTS" in one.text for one in body):
            continue
        waits = [found for one in body if (found := re.search(r"DEPBAR\.LE SB(\d), (0x[0-9a-f]+)", one.text))]
        boards = {int(found[1]) for found in waits}
        drained = any(one.waits >> board & 1 for one in body for board in boards)
        kept.append(0 if drained or not waits else min(int(found[2], 16) for found in waits))
    return min(kept, default=0)


def tool() -> Path | None:
    """cuobjdump, with nvdisasm, which it calls, on PATH or next to it."""
    on_path = shutil.which("cuobjdump")
    folders = [Path(on_path).parent] if on_path else []
    folders += [folder for entry in sys.path for folder in Path(entry).glob("nvidia/cu*/bin")]
    for folder in folders:
        path = os.pathsep.join([str(folder), os.environ.get("PATH", "")])
        if (folder / "cuobjdump").is_file() and shutil.which("nvdisasm", path=path):
            return folder / "cuobjdump"
    return None


def report(listing: str, least: int) -> bool:
    """Prints the table; whether every kernel is there and keeps enough in flight."""
    seen, enough = set(), True
    for architecture, name, code in decode(listing):
        kernel = next((kernel for kernel in KERNELS if kernel in name), None)
        ring, blocks = RING.search(name), BLOCKS.search(name)
        if kernel is None or (ring is None and blocks is None):
            continue
        weights, tiles = (DTYPES[ring[1]], ring[3]) if ring else (PACKINGS[blocks[1]], blocks[2])  # type: ignore[index]
        stages, rows = in_flight(code), 8 if weights == "float32" else 16 * int(tiles)
        print(f"{architecture} {kernel} {weights}, {rows} rows: {stages} stages in flight")
        seen.add((kernel, weights))
        enough = enough and stages >= least
    wanted = {(kernel, weights) for kernel in KERNELS for weights in DTYPES.values()}
    missing = (wanted | {(OF_BLOCKS, weights) for weights in PACKINGS.values()}) - seen
    for kernel, weights in sorted(missing):
        print(f"{kernel} {weights}: not there")
    return enough and not missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", type=Path, nargs="+", metavar="LIBRARY")
    parser.add_argument("--least", type=int, default=6, help="stages; default: %(default)s")
    options = parser.parse_args()
    cuobjdump = tool()
    if cuobjdump is None:
        print("skipped: there is no cuobjdump with an nvdisasm, see pip install nvidia-cuda-cuobjdump")
        return
    environment = os.environ | {"PATH": os.pathsep.join([str(cuobjdump.parent), os.environ.get("PATH", "")])}
    listing = ""
    for library in options.libraries:
        command = [cuobjdump, "-sass", library]
        listing += subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    sys.exit(not report(listing, options.least))


if __name__ == "__main__":
    main()
