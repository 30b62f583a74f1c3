"""python bench/gpu --out results: see session.py."""

import sys

from session import main

sys.exit(main())
