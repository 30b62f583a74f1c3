"""bench/gpu, the unattended session on a GPU: it works from end to end, outlives its stages and tells the truth."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench" / "gpu"
sys.path.insert(0, str(BENCH))  # its files import each other as scripts do

import report  # noqa: E402
import session as gpu  # noqa: E402
import stage  # noqa: E402
import targets  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(BENCH / "stages"))
import sanitizer as gpu_sanitizer  # noqa: E402


def run_gpu(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, BENCH, *arguments], capture_output=True, text=True, check=False)


# ---------------------------------------------------------------- the whole of it


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("session")
    return out, run_gpu("--device", "cpu", "--out", str(out), "--budget", "400")


@pytest.mark.slow
def test_every_stage_runs_on_the_cpu(session):
    out, done = session
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((out / "gpu.json").read_text())
    outcomes = {name: found["status"] for name, found in record["stages"].items()}
    assert outcomes == {plan.name: "passed" for plan in gpu.PLANS} | {"sanitizer": "skipped"}, done.stdout
    results = {name: found["result"] for name, found in record["stages"].items()}
    assert results["machine"]["versions"]["torch"] == torch.__version__
    assert results["machine"]["copy_bytes_per_second"] > 0 < results["machine"]["read_bytes_per_second"]
    assert results["tests"]["passed"] == results["tests"]["selected"] > 5
    assert results["sanitizer"]["tools"]["no tool"]["all"] is True
    kernels = results["kernels"]["rows"].values()
    ops = {row["op"] for row in kernels}
    assert {"head_stack", "draft_topk", "tree_attention", "choose_tokens", "verify_tree", "commit_cache"} <= ops
    assert all(row["ours_us"] > 0 and row["eager_us"] > 0 for row in kernels)
    assert {row["nodes"] for row in results["steps"]["rows"].values()} == {1, 8, 16, 32, 64}
    assert [row["texts_differ"] for row in results["exactness"]["rows"].values()] == [0] * 4
    ways = {row["way"]: row["tokens_per_second"] for row in results["end_to_end"]["ways"]}
    assert {"generate", "generate, prompt lookup", "loop, eager", "cerberus, eager, 8 nodes"} <= set(ways)
    assert all(speed > 0 for speed in ways.values())
    assert results["compiled"]["over_generate"] > 0


@pytest.mark.slow
def test_the_markdown_has_every_table(session):
    out, _ = session
    text = (out / "gpu.md").read_text()
    for title in ("Stages", "Targets", *(title for title, _ in report.SECTIONS.values())):
        assert f"\n## {title}" in text
    tables = text.split("\n## ")[1:]
    assert all("|---|" in table for table in tables), text
    assert "The times mean nothing" in text


@pytest.mark.slow
def test_targets_are_not_measured_on_a_cpu(session):
    out, _ = session
    text = report.all_targets(json.loads((out / "gpu.json").read_text()))
    assert text.count("not measured") == len(targets.TARGETS)


def test_some_stages(tmp_path):
    done = run_gpu("--device", "cpu", "--out", str(tmp_path), "--stages", "machine", "exactness")
    assert done.returncode == 0, done.stdout + done.stderr
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert {name: found["status"] for name, found in stages.items()} == {"machine": "passed", "exactness": "passed"}
    assert [row["texts_differ"] for row in stages["exactness"]["result"]["rows"].values()] == [0] * 4
    assert "\n## Stages" in (tmp_path / "gpu.md").read_text()


# ---------------------------------------------------------------- arguments


def test_unknown_stage(tmp_path):
    done = run_gpu("--device", "cpu", "--out", str(tmp_path), "--stages", "kernels", "colonel")
    assert done.returncode == 2 and "argument --stages: invalid choice: 'colonel'" in done.stderr


def test_missing_folder(tmp_path):
    done = run_gpu("--device", "cpu", "--out", str(tmp_path), "--model", str(tmp_path / "nothing"))
    assert done.returncode == 2 and "--model: there is no" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path):
    done = run_gpu("--out", str(tmp_path / "out"))
    assert done.returncode == 2 and "--device: cuda needs a GPU" in done.stderr
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- stages that go wrong

# Three rows, of which one kills the process the first time that it is tried.
ROWS = """
def body(run):
    for key in ("a", "b", "c"):
        if run.begin(key, limit=2):
            BAD
            run.add(key, {"model": key})
"""
FINE = "def body(run): run.result.update(found=1)"


def plan(folder: Path, name: str, body: str, checks: bool = True) -> gpu.Plan:
    script = folder / f"{name}_stage.py"
    script.write_text("import os, stage, sys, time\n" + body)
    return gpu.Plan(name, script, 1, checks)


def run_plans(folder: Path, *plans: gpu.Plan, budget: float = 300) -> dict[str, dict]:
    record = {"device": "cpu"}
    made_up = {plan.name: (plan.name, lambda record: "") for plan in plans}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "SECTIONS", made_up)
        gpu.run_stages(plans, budget, folder, ["--device", "cpu"], record)
    assert json.loads((folder / "gpu.json").read_text()) == record
    return record["stages"]


def test_a_crash_is_reported_and_the_others_survive(tmp_path):
    crash = "print('about to die'); sys.stdout.flush(); os.abort()"
    stages = run_plans(
        tmp_path, plan(tmp_path, "first", FINE), plan(tmp_path, "second", crash), plan(tmp_path, "third", FINE)
    )
    assert [found["status"] for found in stages.values()] == ["passed", "crashed", "passed"]
    assert "signal 6" in stages["second"]["reason"] and "about to die" in stages["second"]["reason"]
    assert stages["first"]["result"] == stages["third"]["result"] == {"found": 1}
    assert gpu.failed_checks({"stages": stages}) == ["second"]


def test_a_hang_is_ended_and_keeps_its_rows(tmp_path):
    hang = ROWS.replace("BAD", "key == 'b' and time.sleep(600)").replace("limit=2", "limit=600")
    stages = run_plans(
        tmp_path,
        plan(tmp_path, "first", hang, checks=False),
        plan(tmp_path, "second", FINE),
        budget=16,
    )
    assert stages["first"]["status"] == "timed out" and stages["first"]["result"]["rows"] == {"a": {"model": "a"}}
    assert "at b" in stages["first"]["reason"] and stages["first"]["seconds"] < 12
    assert stages["second"]["status"] == "passed"
    assert gpu.failed_checks({"stages": stages}) == []  # it checks nothing


@pytest.mark.parametrize("bad", ["os.abort()", "time.sleep(600)"], ids=["crash", "hang"])
def test_a_stage_goes_on_behind_the_row_that_killed_it(tmp_path, bad):
    stages = run_plans(tmp_path, plan(tmp_path, "first", ROWS.replace("BAD", f"key == 'b' and {bad}")))
    rows = stages["first"]["result"]["rows"]
    assert rows["a"] == {"model": "a"} and rows["c"] == {"model": "c"}
    assert "the process died" in rows["b"]["error"]
    assert stages["first"]["status"] == "failed" and stages["first"]["problems"] == ["b: the process died"]


def test_problems_skips_and_rests_are_told_apart(tmp_path):
    stages = run_plans(
        tmp_path,
        plan(tmp_path, "first", "def body(run): run.problems.append('2 + 2 is 5')"),
        plan(tmp_path, "second", "def body(run): raise stage.Skipped('no tool')"),
        plan(tmp_path, "third", "def body(run): run.begin('a', needed=1e9)"),
    )
    assert [(found["status"], found["reason"]) for found in stages.values()] == [
        ("failed", "2 + 2 is 5"),
        ("skipped", "no tool"),
        ("incomplete", "out of time"),
    ]
    assert gpu.failed_checks({"stages": stages}) == ["first"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "found.json"
    stage.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        stage.write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}


# ---------------------------------------------------------------- what compute-sanitizer says

CLEAN = "========= COMPUTE-SANITIZER\nlaunched 12 calls, all of them\n========= ERROR SUMMARY: 0 errors\n"
WRONG = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at head_stack_kernel+0x10
launched 7 calls
========= ERROR SUMMARY: 3 errors
"""
RACE = "launched 12 calls, all of them\n========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"
NO_RACE = "launched 12 calls, all of them\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"


@pytest.mark.parametrize(
    ("output", "errors", "launched"), [(CLEAN, 0, 12), (WRONG, 3, 7), (RACE, 2, 12), (NO_RACE, 0, 12), ("", None, None)]
)
def test_sanitizer_output(output, errors, launched):
    found = gpu_sanitizer.read(output)
    assert found["all"] == (launched == 12)
    assert (found["errors"], found["launched"]) == (errors, launched)
    assert bool(found["said"]) == (output == WRONG)


def test_sanitizer_stage(tmp_path):
    """With tools that only print: one that finds nothing, one that finds errors, one that cannot work here."""
    for name, says, status in (("clean", CLEAN, 0), ("wrong", WRONG, 1), ("useless", "Device not supported\n", 1)):
        tool = tmp_path / name
        tool.write_text(f"#!/bin/sh\ncat <<'END'\n{says}END\nexit {status}\n")
        tool.chmod(0o755)
        found = gpu_sanitizer.run_tool([str(tool)], "cpu", 60, tmp_path / "log")
        assert found["status"] == {"clean": "passed", "wrong": "failed", "useless": "could not run"}[name]


@pytest.mark.parametrize(("says", "status"), [(CLEAN, "failed"), (WRONG, "passed"), ("", "failed")])
def test_sanitizer_has_to_see_an_invalid_read(tmp_path, says, status):
    """A tool that finds nothing where there is something is of no use."""
    tool = tmp_path / "tool"
    tool.write_text(f"#!/bin/sh\ncat <<'END'\n{says}END\n")
    tool.chmod(0o755)
    assert gpu_sanitizer.proof([str(tool)], 60, tmp_path / "log")["status"] == status


def test_missing_sanitizer():
    with pytest.raises(stage.Skipped, match="is not there: looked for /nowhere/compute-sanitizer"):
        gpu_sanitizer.find("/nowhere/compute-sanitizer")


# ---------------------------------------------------------------- the report

HEAD_STACK = {
    "op": "head_stack", "model": "8B", "dtype": "bfloat16", "rows": 1, "bytes": 537_000_000, "copies": 1, "cold": True,
    "ours_us": 200.0, "ours_graph_us": 200.0, "ours_alone_us": 211.04, "eager_us": 400.0, "eager_graph_us": 400.0,
    "eager_alone_us": 500.0, "library_graph_us": 250.0, "gigabytes_per_second": 2685.0, "share_of_copy": 0.895,
    "over_best_pytorch": 1.25,
}  # fmt: skip
RECORD = {
    "device": "cuda",
    "started": "2026-01-02T03:04:05Z",
    "command": "python bench/gpu --out out",
    "stages": {
        "machine": {
            "status": "passed",
            "seconds": 9.0,
            "result": {"gpu": {"name": "Some GPU"}, "copy_bytes_per_second": 3e12, "read_bytes_per_second": 3.1e12},
        },
        "kernels": {
            "status": "failed",
            "seconds": 60.0,
            "reason": "one row differs",
            "result": {
                "rows": {
                    "a": HEAD_STACK,
                    "b": {**HEAD_STACK, "model": "135M", "ours_us": 11.5, "ours_graph_us": 11.5},
                    "c": {"error": "the process died here"},
                }
            },
        },
        "steps": {
            "status": "incomplete",
            "seconds": 90.0,
            "reason": "out of time",
            "result": {
                "rows": {
                    "8B 2048 64": {
                        "model": "8B", "dtype": "bfloat16", "context": 2048, "nodes": 64, "milliseconds": 5.75,
                        "floor_milliseconds": 5.0, "share_of_floor": 0.87, "over_autoregressive": 1.15,
                        "graphed": True, "graphed_steps": 47, "capture_seconds": 0.5,
                    }
                }
            },
        },
        "end_to_end": {"status": "not started"},
    },
}  # fmt: skip


def test_report_from_a_stored_session(tmp_path):
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(RECORD))
    done = subprocess.run([sys.executable, BENCH / "report.py", file], capture_output=True, text=True, check=True)
    text = done.stdout
    assert "| name | Some GPU |" in text and "| copy, read + write | 3000 GB/s, measured |" in text
    assert "| kernels | failed | 60 s | one row differs |" in text
    assert (
        "| head_stack | 8B | bfloat16 | rows 1 | 200.0 | 211.0 | 2685 | 90% | 400.0 | 500.0 | 250.0 | 1.25x | memory |"
        " ≥ 90 % of a copy: **missed** |" in text
    )
    assert "| 8B, random weights | 2048 | 64 | 5.750 | – | 5.000 | 87% | 1.15x | 47 graphed | 0.50 s |" in text
    assert "| head_stack at 8B | ≥ 90 % of a copy | 0.895 | missed |" in text
    assert "| head_stack at D = 576 | ≤ 12 us | 11.5 | met |" in text
    assert "| draft_topk at 8B | ≥ 90 % of a copy | – | not measured |" in text
    assert "step of 64 nodes with its heads | ≤ 1.15x the autoregressive one | 1.15 | met |" in text
    assert "## End to end\n\nNot measured." in text


def test_a_target_is_met_only_when_all_its_rows_are_there():
    topk = next(target for target in targets.TARGETS if target.what == "draft_topk at 8B")
    row = {"op": "draft_topk", "model": "8B", "dtype": "bfloat16", "rows": 1, "share_of_copy": 0.93}
    assert topk.overall([row]) == targets.UNKNOWN
    assert topk.overall([row, row]) == targets.MET
    assert topk.overall([row, {**row, "share_of_copy": None}]) == targets.UNKNOWN
    assert topk.overall([{**row, "share_of_copy": 0.5}]) == targets.MISSED
    assert topk.overall([{**row, "dtype": "float32"}] * 2) == targets.UNKNOWN
