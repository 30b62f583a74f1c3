"""Tests run against the installed package, not against a source folder in which nothing is built."""

import os
import sys
from collections.abc import Generator
from importlib.machinery import PathFinder
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent

# `python -m pytest` puts the current folder first on sys.path. From the checkout, `import cerberus_ext` would then find
# the source folder, which has no libraries unless it is installed as editable.
elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
if not (ROOT / "cerberus_ext" / "_C.so").is_file() and PathFinder.find_spec("cerberus_ext", elsewhere):
    sys.path[:] = elsewhere

# These import the package: only now is it found where it has libraries.
import own_warnings  # noqa: E402
from combinations import mark_slow  # noqa: E402
from devices import device  # noqa: E402

__all__ = ["device"]

# Five times as many examples: HYPOTHESIS_PROFILE=ci, as .ci/run has it.
hypothesis.settings.register_profile("fast", max_examples=30, deadline=None)
hypothesis.settings.register_profile("ci", max_examples=150, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, in the place of the user's."""
    monkeypatch.setenv("CERBERUS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """All of the tests run in several processes of one thread each, where there is pytest-xdist; `-n 0`: in this one.

    Nearly all tests are too small for two threads to gain anything.
    """
    everything = [Path(argument).resolve() for argument in config.args] == [ROOT / "python_tests"]
    if everything and config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput"):
        option = config.option
        if option.numprocesses is None and option.dist == "no" and not (option.collectonly or option.usepdb):
            option.numprocesses, option.dist = min(4, os.cpu_count() or 1), "loadfile"
            option.loadscopereorder = False
            os.environ.setdefault("OMP_NUM_THREADS", "1")


# Files of few tests that take long begin first: the processes end at about the same time.
LONG = ("training/test_train_command.py", "simt/test_broken_kernels.py", "calibration/test_calibrate.py")


@pytest.hookimpl(tryfirst=True)  # before tests are left out by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_slow(items)
    items.sort(key=lambda item: not str(item.path).endswith(LONG))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Around fixtures, too; pytest's own wrapper, which collects warnings, is around this one."""
    with own_warnings.raised():
        return (yield)
