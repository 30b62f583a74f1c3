"""vLLM with drafts of each text's own past: speed, what is drafted and taken, and whether the texts stay the same.

    for way in none ngram cerberus; do
      python bench/in_vllm.py --way $way --model FOLDER --questions mt_bench.jsonl --out vllm.jsonl
    done
    python bench/in_vllm.py --summary vllm.jsonl

Runs where vLLM is installed, one engine in this process per run. `none` is vLLM without speculation, `ngram` and
`suffix` its own methods as by default; `suffix` needs the package arctic-inference. The file is added to, so that the
ways can take turns on shares of the questions (--first, --count). Greedy. OMP_NUM_THREADS: the threads of a step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

WAYS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "ngram": {"method": "ngram"},
    "suffix": {"method": "suffix"},
    "cerberus": {"method": "custom_class", "model": "cerberus_ext.vllm.SuffixProposer"},
}
SETTING = ("questions", "dtype", "concurrency", "drafts", "tokens", "compile")
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # all in this process
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def start(arguments: argparse.Namespace) -> Any:
    """The engine of a way."""
    os.environ.update({name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()})
    from vllm import LLM  # after the environment, which it reads now

    method = WAYS[arguments.way]
    return LLM(
        str(arguments.model),
        dtype=arguments.dtype,
        max_model_len=arguments.context,
        max_num_seqs=max(arguments.concurrency),
        enforce_eager=not arguments.compile,
        enable_prefix_caching=False,  # every prompt is read
        per_request_spec_decode_metrics="summary" if method else "none",
        speculative_config={**method, "num_speculative_tokens": arguments.drafts} if method else None,
    )


def read_prompts(arguments: argparse.Namespace) -> list[list[int]]:
    """Token ids of the questions' first turns."""
    from transformers import AutoTokenizer

    from cerberus_ext.io.prompts import encode_chat, read_questions

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    questions = read_questions(arguments.questions)[arguments.first :][: arguments.count]
    return [encode_chat(tokenizer, question.turns[:1])[0].tolist() for question in questions]


def measure(engine: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """All of these at once. texts: a fingerprint of each."""
    from vllm import SamplingParams

    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    begin = time.perf_counter()
    done = engine.generate(requests, SamplingParams(temperature=0.0, max_tokens=tokens), use_tqdm=False)
    seconds = time.perf_counter() - begin
    outputs = [request.outputs[0] for request in done]
    counts = [output.spec_decode_metrics for output in outputs if output.spec_decode_metrics is not None]
    return {
        "seconds": seconds,
        "generated": sum(len(output.token_ids) for output in outputs),
        "drafted": sum(count.num_draft_tokens for count in counts),
        "accepted": sum(length * times for count in counts for length, times in enumerate(count.histogram)),
        "texts": [hashlib.sha256(str(list(output.token_ids)).encode()).hexdigest()[:12] for output in outputs],
    }


def run(arguments: argparse.Namespace) -> None:
    """Adds a line for every batch of requests."""
    prompts, engine = read_prompts(arguments), start(arguments)
    measure(engine, prompts[:1], 8)  # warm
    with arguments.out.open("a") as out:
        for concurrency in arguments.concurrency:
            setting = vars(arguments) | {"questions": arguments.questions.stem, "concurrency": concurrency}
            for first in range(0, len(prompts), concurrency):
                found = measure(engine, prompts[first : first + concurrency], arguments.tokens)
                row = {name: setting[name] for name in ("way", *SETTING)} | {"first": arguments.first + first} | found
                print(json.dumps(row), file=out, flush=True)


def summarize(file: Path) -> None:
    """A table for every setting, of the batches that all of its ways have."""
    settings: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for row in map(json.loads, file.read_text().splitlines()):
        setting = ", ".join(f"{name} {row[name]}" for name in SETTING)
        settings.setdefault(setting, {}).setdefault(row["way"], {})[row["first"]] = row
    for setting, ways in settings.items():
        if "none" not in ways:
            continue
        batches = sorted(set.intersection(*(set(rows) for rows in ways.values())))
        print(
            f"\n{setting}\n\n| way | tokens/s | over none | tokens per step | drafts per step | taken | texts differ |"
        )
        print("|---|---|---|---|---|---|---|")
        speeds = {}
        for way, rows in sorted(ways.items(), key=lambda item: item[0] != "none"):
            tokens, seconds, drafted, accepted = (
                sum(rows[first][name] for first in batches) for name in ("generated", "seconds", "drafted", "accepted")
            )
            speeds[way] = tokens / seconds
            steps = tokens - accepted
            pairs = [
                pair
                for first in batches
                for pair in zip(rows[first]["texts"], ways["none"][first]["texts"], strict=True)
            ]
            print(
                f"| {way} | {speeds[way]:.1f} | {speeds[way] / speeds['none']:.2f}x | {tokens / steps:.2f}"
                f" | {drafted / steps:.2f} | {accepted / max(1, drafted):.0%}"
                f" | {sum(one != other for one, other in pairs)} of {len(pairs)} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summary", type=Path, metavar="FILE", help="print what a file says, and measure nothing")
    parser.add_argument("--way", choices=WAYS)
    parser.add_argument("--model", type=Path, help="a folder as transformers saves it")
    parser.add_argument("--questions", type=Path, help="JSON lines, as for `cerberus bench`")
    parser.add_argument("--first", type=int, default=0, help="question to begin with")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8], help="requests at a time")
    parser.add_argument("--tokens", type=int, default=96, help="the most of a text")
    parser.add_argument("--drafts", type=int, default=8, help="num_speculative_tokens")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=2048, help="max_model_len")
    parser.add_argument("--compile", action="store_true", help="as vLLM does by default; starts later")
    parser.add_argument("--out", type=Path, default=Path("vllm.jsonl"))
    arguments = parser.parse_args()
    if arguments.summary:
        return summarize(arguments.summary)
    if not (arguments.way and arguments.model and arguments.questions):
        parser.error("--way, --model and --questions, or --summary")
    run(arguments)


if __name__ == "__main__":
    main()
