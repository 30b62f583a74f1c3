"""A whole session on a GPU, unattended: is everything right, and how fast is it? In 8 minutes, without a network.

    python bench/gpu --out results                 # everything
    python bench/gpu --out results --stages kernels steps
    python bench/gpu --out results --device cpu    # the same code at tiny sizes, to see that it works; a minute

Writes results/gpu.json and, made from it by report.py, results/gpu.md, after every stage, and what the stages print to
results/gpu.log. Each stage is a process with a time limit of its own: one that crashes, hangs or breaks the GPU's
context takes no other along. What a stage does not use of its time goes to those after it. The status is 1 where a
stage that checks correctness failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes
import report
import stage

HERE = Path(__file__).resolve().parent
STAGES = HERE / "stages"
DEFAULT_BUDGET = 465.0  # 8 minutes, with what is not a stage
_MAX_STARTS = 4  # of one stage that crashes and goes on behind the row at which it did
_GRACE = 5.0  # between a stage's own deadline and its end by force


@dataclass(frozen=True)
class Plan:
    """A stage: its file, its share of the time, whether it checks correctness."""

    name: str
    file: Path
    share: float
    checks: bool


SHARES = {  # in seconds, where all run
    "machine": 30,
    "tests": 70,
    "sanitizer": 95,
    "kernels": 65,
    "steps": 85,
    "exactness": 40,
    "end_to_end": 65,
    "compiled": 45,
}
CHECKS = {"tests", "sanitizer", "kernels", "exactness"}
PLANS = [Plan(name, STAGES / f"{name}.py", share, name in CHECKS) for name, share in SHARES.items()]


def run_stages(plans: Sequence[Plan], budget: float, out: Path, options: Sequence[str], record: dict[str, Any]) -> None:
    """Runs the stages one after the other; `record` and the files in `out` say what became of each."""
    begin = time.monotonic()
    stages = record["stages"] = {plan.name: {"status": "not started", "checks": plan.checks} for plan in plans}
    for index, plan in enumerate(plans):
        left = budget - (time.monotonic() - begin)
        limit = left * plan.share / sum(later.share for later in plans[index:])
        print(f"{plan.name:12} at most {limit:4.0f} s ... ", end="", flush=True)
        with tempfile.TemporaryDirectory() as folder, (out / "gpu.log").open("a" if index else "w") as log:
            stages[plan.name] = run_stage(plan, limit, Path(folder), options)
            log.write(f"=== {plan.name}\n{(Path(folder) / f'{plan.name}.log').read_text()}")
        record["seconds"] = round(time.monotonic() - begin, 1)
        stage.write_json(out / "gpu.json", record)
        (out / "gpu.md").write_text(report.markdown(record))
        print(f"{stages[plan.name]['status']}, {stages[plan.name]['seconds']:.0f} s", flush=True)


def run_stage(plan: Plan, limit: float, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """What became of a stage, and what it found; what it printed is in <name>.log of the folder, which is empty."""
    file, log = folder / f"{plan.name}.json", folder / f"{plan.name}.log"
    begin = time.monotonic()
    status: int | None = None
    for _ in range(_MAX_STARTS):
        left = limit - (time.monotonic() - begin)
        own = max(1.0, left - _GRACE)
        command = [
            sys.executable,
            str(HERE / "stage.py"),
            str(plan.file),
            "--out",
            str(file),
            "--seconds",
            f"{own:.1f}",
            *options,
        ]
        status = processes.run(command, left, log)
        found = _read(file)
        if status in (None, 0, stage.PROBLEMS) or not found.get("running"):
            break  # it came to its end, ran out of time, or died where it would die again
    return {
        "status": _outcome(status, found),
        "checks": plan.checks,
        "limit": round(limit, 1),
        "seconds": round(time.monotonic() - begin, 1),
        "reason": _reason(status, found, log),
        "problems": found.get("problems", []),
        "result": found.get("result", {}),
    }


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def _outcome(status: int | None, found: dict[str, Any]) -> str:
    if status is None:
        return "timed out"
    if status not in (0, stage.PROBLEMS):
        return "crashed"
    if found.get("skipped"):
        return "skipped"
    if found.get("problems"):
        return "failed"
    return "incomplete" if found.get("unfinished") else "passed"


def _reason(status: int | None, found: dict[str, Any], log: Path) -> str:
    """Why a stage did not simply pass; empty if it did."""
    if status is None or status not in (0, stage.PROBLEMS):
        how = "" if status is None else f"exit status {status}; " if status > 0 else f"signal {-status}; "
        where = f"at {found['running']}; " if found.get("running") else ""
        return f"{how}{where}the log ends with: " + " / ".join(log.read_text().strip().splitlines()[-6:])
    return found.get("skipped") or "; ".join(found.get("problems", [])) or found.get("unfinished") or ""


def failed_checks(record: dict[str, Any]) -> list[str]:
    """Names of the stages that check correctness and did not get through."""
    wrong = ("failed", "crashed", "timed out")
    return [name for name, found in record["stages"].items() if found["checks"] and found["status"] in wrong]


def main() -> int:
    names = [plan.name for plan in PLANS]
    arguments_of = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[stage.parser()],
        prog="python bench/gpu",
    )
    arguments_of.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the results go")
    arguments_of.add_argument("--stages", nargs="+", choices=names, metavar="STAGE", help=f"of {', '.join(names)}")
    arguments_of.add_argument("--budget", type=float, default=DEFAULT_BUDGET, help="seconds for everything")
    arguments = arguments_of.parse_args()
    for name in ("model", "medusa", "questions"):
        given = getattr(arguments, name)
        if given is not None and not Path(given).exists():
            arguments_of.error(f"--{name}: there is no {given}")
    if arguments.device == "cuda":
        import torch  # here, because it takes seconds

        if not torch.cuda.is_available():
            sees = f"torch {torch.__version__} sees none"
            arguments_of.error(f"--device: cuda needs a GPU, and {sees}; --device cpu shows that the code works")

    options = []
    for name in ("device", "model", "heads", "medusa", "questions", "sanitizer"):
        if (given := getattr(arguments, name)) is not None:
            options += [f"--{name}", str(given)]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1"}  # for the logs
    processes.end_when_told()
    arguments.out.mkdir(parents=True, exist_ok=True)
    record = {
        "schema": 1,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(["python bench/gpu", *(Path(part).name for part in sys.argv[1:])]),
        "device": arguments.device,
        "budget": arguments.budget,
    }
    plans = [plan for plan in PLANS if arguments.stages is None or plan.name in arguments.stages]
    run_stages(plans, arguments.budget, arguments.out, options, record)
    wrong = failed_checks(record)
    print(report.summary(record))
    print(f"{arguments.out / 'gpu.md'}; not right: {', '.join(wrong)}" if wrong else arguments.out / "gpu.md")
    return int(bool(wrong))
