"""What a new process of `cerberus generate` needs until its first word: seconds, and the most memory that it has had.

    python bench/start.py [--runs 5] [--out start.json] [-- --model FILE.gguf --heads none]

What follows -- are arguments of `cerberus generate`; without any it is the default model with its heads. The first word
is what it writes first, a token or two behind the first one. memory is what the process has resident, pages of files
that it shares with others included: the most of its life, answer included. Then the same work in one process, part by
part: how long each took, and what was resident at its end (`now`), of which so much is pages of files (`of files`), and
at most so far (`peak`). Files are in the system's cache already: run it twice where they may not be.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

PROMPT, NEW_TOKENS = "Why is the sky blue?", 64
PARTS = "--parts"  # how this file is called for the second half


def start(arguments: list[str]) -> tuple[float, float]:
    """Seconds to the first word, and MB at most, of one process."""
    command = [sys.executable, "-m", "cerberus_ext.cli", "generate", "--max-new-tokens", str(NEW_TOKENS)]
    environment = os.environ | {"PYTHONSAFEPATH": "1"}  # the installed package, also where a checkout is
    begin = time.perf_counter()
    with subprocess.Popen([*command, *arguments, PROMPT], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - begin
        process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join([*command, *arguments])} ended with {process.returncode}")
    return seconds, used.ru_maxrss / 1024


def memory() -> dict[str, float]:
    """MB of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"now": "VmRSS", "of files": "RssFile", "peak": "VmHWM"}
    return {name: int(lines[label].split()[0]) / 1024 for name, label in names.items()}


class Parts:
    """Of the work of a process, in order."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self._begin = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.found[name] = {"seconds": round(now - self._begin, 3)} | {k: round(v, 1) for k, v in memory().items()}
        self._begin = time.perf_counter()


def parts(arguments: list[str]) -> dict[str, dict[str, float]]:
    """What the command does, one after the other. arguments: --model and --heads alone are looked at."""
    options = argparse.ArgumentParser()
    for name in ("--model", "--heads"):
        options.add_argument(name)
    given, done = options.parse_known_args(arguments)[0], Parts()
    import torch  # noqa: F401

    done.end("import torch")
    from cerberus_ext.cli.shared import load_heads, load_target, uncollected

    done.end("import cerberus_ext")
    with uncollected():
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

        from cerberus_ext import Decoder
        from cerberus_ext.engine import checks  # noqa: F401
        from cerberus_ext.io.prompts import encode_chat

        done.end("import transformers")
        model, tokenizer = load_target(given.model, None, None, None)
        done.end("load the model")
        heads = None if given.heads == "none" else load_heads(given.heads, model)
        done.end("load the heads")
    from cerberus_ext.runtime.runtime import runtime_of

    decoder = Decoder(model, heads)
    runtime_of(model).capability()
    done.end("try its steps")
    stream = decoder.stream(encode_chat(tokenizer, [PROMPT]), max_new_tokens=NEW_TOKENS)
    next(stream)
    done.end("fuse them, first token")
    for _ in stream:
        pass
    done.end("the other tokens")
    return done.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("arguments", nargs="*")
    options = parser.parse_args()
    # This process imports nothing large before they have ended: it would count as the most that a child has had.
    runs = [start(options.arguments) for _ in range(options.runs)]
    command = [sys.executable, __file__, PARTS, *options.arguments]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    seconds, most = ([run[place] for run in runs] for place in (0, 1))
    print(f"{len(runs)} processes: first word after {statistics.median(seconds):.2f} s, {max(most):.0f} MB at most")
    for name, part in found.items():
        print(f"  {name:24}" + "  ".join(f"{label} {value:6.1f}" for label, value in part.items()))
    if options.out is not None:
        sys.path.insert(0, str(Path(__file__).resolve().parent / "shared"))
        import machine

        told = {
            "date": date.today().isoformat(), "machine": machine.describe(), "arguments": options.arguments,
            "seconds_to_first_word": [round(value, 3) for value in seconds],
            "peak_MB": [round(value, 1) for value in most], "parts": found,
        }  # fmt: skip
        options.out.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == [PARTS]:
        print(json.dumps(parts(sys.argv[2:])))
    else:
        main()
