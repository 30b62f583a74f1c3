"""Stage "sanitizer" of a GPU session: compute-sanitizer over small launches of every kernel (launch_kernels.py)."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import processes
import stage

SCRIPT = Path(__file__).resolve().parents[1] / "launch_kernels.py"
PROOF = "memcheck of an invalid read"
TOOLS = {"memcheck": 1.0, "racecheck": 1.3, "synccheck": 0.7}  # tool -> its part of the time
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) err.*, (\d+) warn")
_LAUNCHED = re.compile(r"launched (\d+) calls(, all of them)?")


def find(given: str | None) -> str:
    """compute-sanitizer's path. Raises stage.Skipped where there is none."""
    toolkits = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda"]
    places = [given] if given else ["compute-sanitizer", *(f"{toolkit}/bin/compute-sanitizer" for toolkit in toolkits)]
    found = next(filter(None, map(shutil.which, places)), None)
    if found is None:
        raise stage.Skipped(f"compute-sanitizer is not there: looked for {', '.join(dict.fromkeys(places))}")
    return found


def command(sanitizer: str, tool: str) -> list[str]:
    # Only this project's kernels are watched: their mangled names begin with its namespace.
    return [sanitizer, "--tool", tool, "--kernel-name", "kns=cerberus", "--print-limit", "20"]


def read(output: str) -> dict[str, Any]:
    """What a tool's output says: its errors and hazards, the first lines about them, how much of the script it saw."""
    said = _SUMMARY.findall(output)
    launched = _LAUNCHED.search(output)
    lines = [line.removeprefix("=========").strip() for line in output.splitlines() if line.startswith("=========")]
    told = [line for line in lines if line and "SUMMARY" not in line and not line.startswith("COMPUTE-SANITIZER")]
    return {
        "errors": sum(int(number or 0) for match in said for number in match) if said else None,
        "launched": int(launched[1]) if launched else None,
        "all": launched is not None and launched[2] is not None,
        "said": told[:20],
    }


def run_tool(prefix: list[str], device: str, seconds: float, log: Path) -> dict[str, Any]:
    """What a tool says of the launches; what it prints is in `log`."""
    # The script stops launching in time for the tool to write its summary.
    until = time.time() + 0.75 * seconds
    script = [sys.executable, str(SCRIPT), "--device", device, "--until", f"{until:.1f}"]
    # Without the caching allocator every tensor is an allocation of its own, so that memcheck sees where it ends.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    log.unlink(missing_ok=True)
    begin = time.monotonic()
    status = processes.run([*prefix, *script], seconds, log, environment)
    output = log.read_text(errors="replace")
    found = read(output)
    if status is None:
        outcome = "timed out"
    elif prefix and (found["errors"] is None or "Device not supported" in output):
        outcome = "could not run"
    elif found["errors"] or found["launched"] is None:
        outcome = "failed"
    else:
        outcome = "passed"
    if outcome != "passed" and not found["said"]:
        found["said"] = output.strip().splitlines()[-6:]
    return {"status": outcome, "seconds": round(time.monotonic() - begin, 1), **found}


def proof(prefix: list[str], seconds: float, log: Path) -> dict[str, Any]:
    """Whether memcheck sees this project's kernels: they are told to read where no memory is, and it has to say so.

    Were the filter by name to fit none of them, every other result would look clean.
    """
    begin = time.monotonic()
    log.unlink(missing_ok=True)
    status = processes.run([*prefix, sys.executable, str(SCRIPT), "--invalid"], seconds, log, dict(os.environ))
    found = read(log.read_text(errors="replace"))
    outcome = "timed out" if status is None else "passed" if found["errors"] else "failed"
    return {"status": outcome, "seconds": round(time.monotonic() - begin, 1), **found}


def body(run: stage.Stage) -> None:
    processes.end_when_told()
    prefixes = {tool: [] if run.on_cpu else command(find(run.arguments.sanitizer), tool) for tool in TOOLS}
    if run.on_cpu:  # shows that the launches are right; there is nothing for the sanitizer to see
        prefixes = {"no tool": []}
    tools = run.result.setdefault("tools", {})
    if not run.on_cpu and PROOF not in tools:
        log = run.arguments.out.with_name("invalid_read.log")
        tools[PROOF] = proof(prefixes["memcheck"], min(60.0, 0.2 * run.left), log)
        if tools[PROOF]["status"] == "failed":
            run.problems.append(f"memcheck does not see an invalid read in a kernel of cerberus_ext, see {log.name}")
        run.save()
    parts = {tool: TOOLS.get(tool, 1.0) for tool in prefixes}
    for tool, prefix in prefixes.items():
        ahead = sum(part for name, part in parts.items() if name not in tools)
        log = run.arguments.out.with_name(f"{tool.replace(' ', '_')}.log")
        found = run_tool(prefix, run.device, run.left * parts[tool] / ahead, log)
        tools[tool] = found
        if found["status"] == "failed":
            run.problems.append(f"{tool}, errors {found['errors']}: {' / '.join(found['said'][:3])}")
        elif found["status"] != "passed":
            run.unfinished = f"{tool} {found['status']}"
        elif not found["all"]:
            run.unfinished = f"{tool} saw only {found['launched']} calls in its time"
        run.save()
    if run.on_cpu and not run.problems:
        raise stage.Skipped("compute-sanitizer is for CUDA; its launches ran on the CPU without it")
