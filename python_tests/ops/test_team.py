"""The threads of CPU ops, where the system gives none."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cerberus_ext.ops import libraries

WITHOUT_THREADS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch
from cerberus_ext import ops

torch.set_num_threads(1)
x, weight = torch.ones(4, 512), torch.ones(1024, 512)
ops.linear(x, weight, None)
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, ((used << 10) + (4 << 20),) * 2)  # a thread's stack takes more
torch.set_num_threads(2)
print((ops.linear(x, weight, None) == 512).all().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is limited here by its /proc and rlimits")
def test_without_another_thread():
    """The calling one does all the work."""
    command = [sys.executable, "-c", WITHOUT_THREADS, str(libraries.PACKAGE.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("True", 0), done.stderr
