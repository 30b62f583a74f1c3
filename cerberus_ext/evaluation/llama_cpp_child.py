"""Run by a Python that has xllamacpp, see llama_cpp.py: serves GGUF files until the other process is gone.

Lines of JSON: to {} it answers {"version": ...}, to {"files": [...], "threads": ...} then {"addresses": [...]}, where
each file's server listens. With "slots" and "context" it answers so many at once, with so many tokens in all.
"""

import ctypes
import json
import os
import signal
import sys

ctypes.CDLL(None).prctl(
    1, signal.SIGKILL
)  # PR_SET_PDEATHSIG: it ends with the other process, also where that is killed
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # llama.cpp prints to standard output

try:
    import xllamacpp
except ImportError as error:
    sys.exit(f"{error}; get it with {sys.executable} -m pip install xllamacpp")

sys.stdin.readline()
print(json.dumps({"version": xllamacpp.__version__}), file=answers, flush=True)
order = json.loads(sys.stdin.readline())
servers = []
for file in order["files"]:
    parameters = xllamacpp.CommonParams()
    parameters.model.path = file
    parameters.n_parallel = order.get("slots", 1)
    parameters.n_ctx = order.get("context", 0)  # of all slots together; 0: as much as the model can
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = order["threads"]
    servers.append(xllamacpp.Server(parameters))
print(json.dumps({"addresses": [server.listening_address for server in servers]}), file=answers, flush=True)
sys.stdin.read()
