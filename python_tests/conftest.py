"""Tests run against the installed package, not against a source folder in which nothing is built."""

import sys
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` puts the current folder first on sys.path. From the checkout, `import cerberus_ext` would then find
# the source folder, which has no libraries unless it is installed as editable.
elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
if not (ROOT / "cerberus_ext" / "_C.so").is_file() and PathFinder.find_spec("cerberus_ext", elsewhere):
    sys.path[:] = elsewhere
