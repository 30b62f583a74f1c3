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

# These import the package: only now is it found where it has libraries.
import own_warnings  # noqa: E402
from devices import device  # noqa: E402

__all__ = ["device"]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, in the place of the user's."""
    monkeypatch.setenv("CERBERUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Around fixtures, too; pytest's own wrapper, which collects warnings, is around this one."""
    with own_warnings.raised():
        return (yield)
