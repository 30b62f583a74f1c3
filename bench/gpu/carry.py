"""What has to be carried to a lent GPU beside the files that git knows: built here, ignored by git.

    python bench/gpu/carry.py    the paths, one a line; their size goes to stderr

The status is 1 where one is missing, or where they are more than is carried. The model is left out: where the machine
has none, `end_to_end` and `exactness` are skipped.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = ("_C.so", "_cuda.so", "_host*.so", "build.json")  # of cerberus_ext/, see docs/benchmarks.md
MOST_BYTES = 64 << 20


def carried(package: Path) -> tuple[list[Path], list[str]]:
    """The files, and the patterns that none has."""
    found = {pattern: sorted(package.glob(pattern)) for pattern in PATTERNS}
    return [file for files in found.values() for file in files], [name for name, files in found.items() if not files]


def main(package: Path = ROOT / "cerberus_ext") -> int:
    files, missing = carried(package)
    size = sum(file.stat().st_size for file in files)
    for file in files:
        print(file.relative_to(package.parent))
    print(f"{size / 2**20:.1f} MiB of {MOST_BYTES >> 20}", file=sys.stderr)
    for name in missing:
        print(f"missing: {package.name}/{name}", file=sys.stderr)
    return int(bool(missing) or size > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main())
