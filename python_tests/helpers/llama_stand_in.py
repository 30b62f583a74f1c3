"""A Python that has an xllamacpp, or something else that `cerberus bench --llama-cpp` may be given."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

MODULE = '''
"""In the place of xllamacpp: a server that "generates" the prompt, backwards. It writes down what it is asked."""

import json, os, pathlib, signal, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

__version__ = "1.2.3"
folder, behaviour = pathlib.Path(__file__).parent, "BEHAVIOUR"
(folder / "pid").write_text(str(os.getpid()))


def misbehave(where):
    if behaviour == f"dies {where}":
        sys.stderr.write("some talk\\nout of luck\\n")
        sys.stderr.flush()
        os._exit(3)
    if behaviour == f"hangs {where}":
        time.sleep(1000)


misbehave("at import")
print("llama.cpp says things")


class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch = SimpleNamespace(), SimpleNamespace(), SimpleNamespace()


class Server:
    def __init__(self, parameters):
        misbehave("at loading")
        print("loading")
        facts = {"file": parameters.model.path, "threads": parameters.cpuparams.n_threads}
        facts["batch_threads"] = parameters.cpuparams_batch.n_threads

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with open(folder / "asked.jsonl", "a") as file:
                    print(json.dumps({**facts, **asked, "path": self.path}), file=file)
                misbehave("at a text")
                if behaviour == "interrupts":
                    os.kill(os.getppid(), signal.SIGINT)
                    time.sleep(1000)
                answer = json.dumps({"tokens": asked["prompt"][::-1][: asked["n_predict"]]}).encode()
                if behaviour.startswith("says "):
                    answer = behaviour[5:].encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *arguments):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.listening_address = f"http://127.0.0.1:{server.server_address[1]}"
'''


def python_with_xllamacpp(folder: Path, behaviour: str = "") -> Path:
    """behaviour: "dies ..." or "hangs ..." and where, "says " and what it answers, "interrupts": as Ctrl-C would."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "xllamacpp.py").write_text(MODULE.replace("BEHAVIOUR", behaviour.replace('"', '\\"')))
    return program(folder / "python", f'PYTHONPATH={folder} exec {sys.executable} "$@"')


def program(file: Path, text: str) -> Path:
    """A shell script."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


def asked(python: Path) -> list[dict]:
    """What a Python's xllamacpp was asked."""
    return [json.loads(line) for line in (python.parent / "asked.jsonl").read_text().splitlines()]


def has_ended(pid: int, seconds: float = 10) -> bool:
    """Within so many seconds. Nobody may have been told yet."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False
