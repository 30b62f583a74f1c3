"""Stage "tests" of a GPU session: those of python_tests/ that run on the device, as far as the time allows."""

from __future__ import annotations

import signal
from collections import Counter
from typing import Any

import pytest
import stage

TESTS = stage.ROOT / "python_tests"
ELSEWHERE = ("simt", "bench", "cli")  # about no device
ON_CPU = [str(TESTS / "ops" / name) for name in ("test_verify_tree.py", "test_cache_ops.py")]
_MAX_FAILURES = 25  # after an illegal access every further test fails, too
_TEST_SECONDS = 60  # one that takes longer ends the process, which then starts again without it


class Watch:
    """A pytest plugin: counts outcomes, keeps what failed, and ends the run in time."""

    def __init__(self, run: stage.Stage) -> None:
        self.run = run
        self.counts: Counter[str] = Counter()
        self.failures: dict[str, str] = {}
        self.selected = 0

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.selected = len(session.items)
        self.save()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":  # set-up and tear-down count where they fail or skip
            self.counts[report.outcome] += 1
        if report.failed:
            self.failures[report.nodeid] = str(report.longreprtext).strip().splitlines()[-1][:300]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failures[report.nodeid] = str(report.longreprtext).strip().splitlines()[-1][:300]

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.run.running = item.nodeid
        self.save()
        signal.alarm(_TEST_SECONDS)
        yield
        signal.alarm(0)
        if self.run.left <= 0:
            item.session.shouldstop = "out of time"

    def save(self) -> None:
        self.run.result.update(
            selected=self.selected,
            passed=self.counts["passed"],
            failed=self.counts["failed"],
            skipped=self.counts["skipped"],
            failures=self.failures,
        )
        self.run.save()


def on_a_gpu() -> list[str]:
    """The folders of tests, those of the ops first."""
    folders = {file.parent.name for file in TESTS.glob("*/test_*.py")} - {"ops", *ELSEWHERE}
    return [str(TESTS / name) for name in ("ops", *sorted(folders))]


def body(run: stage.Stage) -> None:
    watch = Watch(run)
    where = ON_CPU if run.device == "cpu" else on_a_gpu()
    # On the CPU a few are enough to show that this stage works.
    chosen = run.result["tests"] = "cuda" if run.device == "cuda" else "cpu and by_hand"
    options = [
        "-q",
        "-k",
        chosen,
        f"--maxfail={_MAX_FAILURES}",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--tb=short",
    ]
    options += [f"--deselect={test}" for test in run.rows]  # those at which the process died before
    status = pytest.main([*where, *options, "-c", str(stage.ROOT / "pyproject.toml")], plugins=[watch])
    run.running = None
    run.problems += [f"{test}: {message}" for test, message in list(watch.failures.items())[:_MAX_FAILURES]]
    ran = watch.counts["passed"] + watch.counts["failed"] + watch.counts["skipped"]
    if watch.counts["passed"] == 0:
        run.problems.append(f"no test ran to its end on {run.device}; pytest ended with status {int(status)}")
    elif ran < watch.selected and run.left <= 0:
        run.unfinished = f"out of time after {ran} of {watch.selected} tests"
    elif status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        run.problems.append(f"pytest ended with status {int(status)}")
    watch.save()
