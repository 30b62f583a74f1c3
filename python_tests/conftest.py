"""Tests run against the installed package, not against a source folder in which nothing is built."""

import sys
from collections.abc import Generator
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` puts the current folder first on sys.path. From the checkout, `import cerberus_ext` would then find
# the source folder, which has no libraries unless it is installed as editable.
elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
if not (ROOT / "cerberus_ext" / "_C.so").is_file() and PathFinder.find_spec("cerberus_ext", elsewhere):
    sys.path[:] = elsewhere


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Around fixtures, too; pytest's own wrapper, which collects warnings, is around this one."""
    import own_warnings  # which imports the package: only now is it found where it has libraries

    with own_warnings.raised():
        return (yield)
