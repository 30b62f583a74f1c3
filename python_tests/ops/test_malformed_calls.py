"""Malformed calls of every op in processes of their own: no crash, no hang, and every refusal names an argument.

CERBERUS_MALFORMED_CALLS=30000 makes more of them in the slow test, CERBERUS_ISA chooses the level of the instruction
set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import malformed_calls
import pytest
import torch
from step_codes import experts_step

from cerberus_ext import ops
from cerberus_ext.ops import libraries
from cerberus_ext.ops.native import native

WORKER = Path(malformed_calls.__file__)
CALLS = int(os.environ.get("CERBERUS_MALFORMED_CALLS", "3000"))
WORKERS = 2


def start(first: int, count: int) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(WORKER.parent), str(libraries.PACKAGE.parent)])
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(first), str(count)],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("calls", [600, pytest.param(CALLS, marks=pytest.mark.slow)])
def test_malformed_calls(calls):
    share = -(-calls // WORKERS)
    workers = [start(first, share) for first in range(0, calls, share)]
    accepted = refused = 0
    wrong: list[str] = []
    for worker in workers:
        out, errors = worker.communicate()
        lines = out.splitlines()
        if worker.returncode != 0:
            last = malformed_calls.describe(int(lines[-1])) if lines else "before the first call"
            wrong.append(f"ended with {worker.returncode} in {last}\n{errors[-2000:]}")
            continue
        found = json.loads(lines[-1])
        accepted, refused = accepted + found["accepted"], refused + found["refused"]
        wrong += found["wrong"]
    assert not wrong, f"{len(wrong)} of {calls} calls:\n" + "\n".join(wrong[:10])
    # Neither all correct nor refused at the first glance.
    assert accepted > calls / 20 and refused > calls / 2, (accepted, refused)


def test_a_worker_is_ended_by_a_crash_or_a_hang(tmp_path: Path):
    """What the test above relies on: another return code, and the number of the call."""
    path = os.pathsep.join([str(WORKER.parent), str(libraries.PACKAGE.parent)])
    for last_words in ("os.abort()", "[None for _ in iter(int, 1)]"):
        text = "import os, malformed_calls as m; m.SECONDS = 0.5\n"
        text += f"for op in m.EXAMPLES: setattr(m.ops, op, lambda **arguments: {last_words})\n"
        text += f"m.native_calls.call = lambda op, arguments: {last_words}\nm.run(3, 9)"
        environment = os.environ | {"PYTHONPATH": path}
        command = [sys.executable, "-c", text]  # elsewhere: `-c` puts the current folder on sys.path
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode < 0 and done.stdout.splitlines() == ["3"]


@pytest.mark.parametrize("message", ["linear: weight must be (O, I), got (3,)", "... for argument 'bias' but ..."])
def test_a_refusal_that_names_an_argument(message):
    assert malformed_calls.names_an_argument("linear", message)
    assert not malformed_calls.names_an_argument("hidden_entropy", message)


# ---------------------------------------------------------------- found this way, or reported


def test_commit_cache_of_very_many_planes_without_elements(device):
    cache = torch.zeros(2**40, 1, 0, 3, 2, device=device)
    length = torch.tensor([1], device=device)
    path, accepted = (torch.zeros(shape, dtype=torch.int32, device=device) for shape in ((1, 1), (1,)))
    ops.commit_cache(cache, length, path, accepted)
    assert length.item() == 2


def test_write_cache_of_very_many_nodes_without_elements(device):
    cache, new = torch.zeros(1, 2, 2**40, 0, device=device), torch.zeros(1, 2**40, 2, 0, device=device)
    ops.write_cache(cache, cache.clone(), new, new, torch.tensor([0], device=device))


@pytest.mark.parametrize("length", [-(2**63), -1, 2**31, 2**63 - 1])
@pytest.mark.parametrize("accepted", [-(2**31), -1, 0, 2**31 - 1])
def test_commit_cache_of_any_values(length, accepted, device):
    """Nothing is moved from or to where there is no slot; length wraps around at worst."""
    cache = torch.arange(24.0, device=device).view(1, 1, 2, 4, 3)
    before = cache.clone()
    lengths = torch.tensor([length], device=device)
    path = torch.tensor([[0, 2**31 - 1, -(2**31)]], dtype=torch.int32, device=device)
    ops.commit_cache(cache, lengths, path, torch.tensor([accepted], dtype=torch.int32, device=device))
    assert torch.equal(cache, before)


def test_results_that_do_not_fit_into_memory():
    message = (
        r"linear: input must be so small that \(1099511627776, 5\) elements fit into memory, got \(1099511627776, 0\)"
    )
    with pytest.raises(RuntimeError, match=message):
        ops.linear(torch.zeros(2**40, 0), torch.zeros(5, 0), None)


def test_linear_of_very_many_rows_without_outputs():
    got = ops.linear(torch.zeros(2**62, 0), torch.zeros(0, 0), None)
    assert got.shape == (2**62, 0)


@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
def test_layouts_around_a_step(layout):
    """Asking whether such a tensor is contiguous, or where it lies, was an error of torch's that named no argument."""
    other = getattr(torch.ones(4, 64), layout)()
    calls = {
        "make_step: tensors": lambda: native.make_step([other], torch.zeros(3, dtype=torch.int64)),
        "pack_weights: packed": lambda: native.pack_weights([torch.ones(4, 64)], other),
        "pack_blocks: packed": lambda: native.pack_blocks([torch.ones(4, 64).bfloat16()], other),
        "prefer_large_pages: memory": lambda: native.prefer_large_pages(other),
        "release_mapped: memory": lambda: native.release_mapped(other),
    }
    for named, call in calls.items():
        with pytest.raises(RuntimeError, match=rf"^{named} must be a tensor of layout torch.strided, got torch\."):
            call()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64, torch.complex64])
def test_a_constant_of_another_dtype_is_not_read_as_float32(dtype):
    tensors, code = experts_step(torch.float32, False)
    tensors[3] = tensors[3].to(dtype)
    with pytest.raises(RuntimeError, match=f"^make_step: tensors must be torch.float32, .* or packed, got {dtype}"):
        native.make_step(tensors, torch.tensor(code))
