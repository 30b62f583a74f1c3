"""The first of two calls on a lent GPU, at most 3 minutes: does everything work, and is it worth measuring?

    python bench/gpu/smoke.py --out results                 # then bench/gpu/measure.py
    python bench/gpu/smoke.py --out results --device cpu    # the same code at tiny sizes; some seconds

One process, which prints a line for each check as it ends and writes results/smoke.json after each, so that one that
crashes or hangs takes along nothing of those before it. The status is 3 where something is not right.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> int:
    import stage

    if "--out" not in sys.argv[1:-1]:
        print("smoke.py: error: --out DIR is required", file=sys.stderr)
        return 2
    where = sys.argv.index("--out") + 1
    out = Path(sys.argv[where])
    out.mkdir(parents=True, exist_ok=True)
    (out / "smoke.json").unlink(missing_ok=True)
    sys.argv[where] = str(out / "smoke.json")
    sys.argv[1:1] = [str(HERE / "stages" / "smoke.py"), "--seconds", "170"]
    return stage.main()


if __name__ == "__main__":
    sys.exit(main())
