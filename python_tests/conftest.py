"""Tests run against the installed package, never against a source folder in which nothing is built."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` puts the current folder first on sys.path. From the checkout, `import cerberus_ext` would then find
# the source folder; without an editable install that has no libraries.
if not (ROOT / "cerberus_ext" / "_C.so").is_file():
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
