"""The second of two calls on a lent GPU, at most 6 minutes: the numbers, behind the tests of the ops.

    python bench/gpu/measure.py --out results    # and what else session.py takes

Leaves results/gpu.json, gpu.md and gpu.log.
"""

import sys

from session import main

STAGES = ("tests", "kernels", "steps", "exactness", "end_to_end")

if __name__ == "__main__":
    sys.argv[1:1] = ["--budget", "345", "--stages", *STAGES]  # in front of "--out" and its folder
    sys.exit(main())
