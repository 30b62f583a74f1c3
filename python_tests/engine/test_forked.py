"""A forked child has none of its parent's OpenMP threads: it decodes with one, says so, and does not hang."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, threading, warnings
import torch
from tiny_models import VOCAB, prompt, tiny_model
from cerberus_ext import CerberusConfig, CerberusHeads, decode

torch.set_num_threads(2)
model = tiny_model("llama")
# Sums of more than one thread, whatever the size of the model.
torch.rand(2000, 2000).sum(), torch.rand(600, 600) @ torch.rand(600, 600)
heads = CerberusHeads(CerberusConfig("tiny", 32, VOCAB))
ids = prompt(length=200)

def text():
    return decode(model, heads, ids, max_new_tokens=12, tree=8).sequences.tolist()

want = text()
child = os.fork()
if child == 0:
    threading.Timer(100, os._exit, [3]).start()  # hanging
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [text(), text()]
    told = [str(one.message) for one in caught if one.category is RuntimeWarning]
    torch.rand(2000, 2000).sum(), torch.rand(600, 600) @ torch.rand(600, 600)
    right = found == [want, want] and torch.get_num_threads() == 1
    right = right and len(told) == 1 and "was forked" in told[0] and "spawn" in told[0]
    if not right:
        print(found == [want, want], torch.get_num_threads(), told)
    sys.stdout.flush()
    os._exit(0 if right else 1)
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
with warnings.catch_warnings():
    warnings.simplefilter("error", RuntimeWarning)
    assert text() == want and torch.get_num_threads() == 2  # the parent goes on as before
sys.exit(status)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_decodes_in_a_forked_child(tmp_path: Path) -> None:
    import cerberus_ext

    paths = [str(Path(cerberus_ext.__file__).parent.parent), str(Path(__file__).parents[1] / "helpers")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", PROGRAM]  # elsewhere: `-c` puts the current folder on sys.path
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, (run.returncode, run.stdout, run.stderr)
