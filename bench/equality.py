"""Is the text the same with and without drafts? On the default model, over MT-Bench questions.

    python bench/equality.py --questions mt_bench.jsonl --dtype float32  --out equality-f32.jsonl
    python bench/equality.py --questions mt_bench.jsonl --dtype bfloat16 --out equality-bf16.jsonl

float32: against model.generate(do_sample=False), for all heads, trees and gates; other kernels round differently, so a
mismatch is reported with the gap between the model's two largest logits there. bfloat16 and float16: against `decode`
with the gate never open, bit for bit, with drafts as by default, trees of several sizes, random heads and a random
gate. --op-by-op: against `decode` without fused steps, bit for bit. Oracle heads must be accepted to the full depth.
Ends with status 1 if anything differs. Stopped and started again, it goes on where it was. CERBERUS_ISA chooses a lower
level of the CPU's instructions.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cerberus_ext
from cerberus_ext import AlwaysClosed, AlwaysOpen, StaticPolicy
from cerberus_ext.drafting.static_policy import default_tree
from cerberus_ext.evaluation.results import Results
from cerberus_ext.evaluation.texts import difference
from cerberus_ext.evaluation.timing import timed
from cerberus_ext.evaluation.ways import DecodeWay, GenerateWay
from cerberus_ext.io.machine import describe_machine
from cerberus_ext.io.prompts import encode_chat, read_questions

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_tests" / "helpers"))
from stand_ins import AdversarialHeads, OracleHeads, RandomGate, RandomHeads  # noqa: E402

STAND_INS = {"random": RandomHeads, "adversarial": AdversarialHeads, "oracle": OracleHeads}
HEADS = ["trained", *STAND_INS]
TREES = ["chain", "static-16", "static-64", "one"]
GATES = {"open": AlwaysOpen, "random": RandomGate, "closed": AlwaysClosed}
# Of a 16-bit type: (heads, tree, gate). A number: a DynamicPolicy of so many nodes.
SIXTEEN_BITS = [
    ("trained", "default", "open"),
    ("trained", "8", "open"),
    ("trained", "16", "open"),
    ("trained", "32", "open"),
    ("random", "16", "open"),
    ("trained", "16", "random"),
]


def make_tree(name: str, heads: Any) -> StaticPolicy | int | None:
    if name == "default":
        return None
    if name.isdecimal():
        return int(name)
    if name in ("chain", "one"):
        return StaticPolicy.chain(heads.config.num_heads if name == "chain" else 1)
    return default_tree(heads, torch.device("cpu"), int(name.removeprefix("static-")))


def settings(arguments: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(heads, tree, gate) of every run of a question."""
    if arguments.dtype != "float32" and not (arguments.heads or arguments.trees or arguments.gates):
        return SIXTEEN_BITS
    chosen = product(arguments.heads or HEADS, arguments.trees or TREES, arguments.gates or ["open", "random"])
    return [*([("trained", "static-16", "closed")] if arguments.dtype == "float32" else []), *chosen]


def full_depth(histogram: list[int], depth: int) -> bool:
    """Whether every step accepted `depth` drafts, but the last one, which the text's end may cut."""
    return sum(histogram) - (histogram[depth] if len(histogram) > depth else 0) <= 1


def text_of(ids: Tensor, tokens: list[int]) -> Tensor:
    return torch.cat([ids, ids.new_tensor([tokens])], 1)


def measure(
    model: Any, trained: Any, ids: Tensor, new: int, want: Tensor, names: tuple[str, str, str]
) -> dict[str, Any]:
    """One text with (heads, tree, gate), compared with the one that is wanted."""
    heads_name, tree_name, gate_name = names
    # The text goes on after its end in what stand-ins know; what follows does not matter.
    stand_in = STAND_INS.get(heads_name)
    heads = stand_in(want, trained.config.num_heads, model.config.vocab_size) if stand_in else trained
    tree = make_tree(tree_name, trained)
    options = {"tree": tree, "gate": GATES[gate_name](), "streamer": heads if stand_in else None}
    run = partial(cerberus_ext.decode, model, heads, ids, max_new_tokens=new, **options)
    out, seconds = timed(run, model.device)
    row = {
        "seconds": seconds,
        "tokens_per_step": out.stats.tokens_per_step,
        "exact": out.stats.exact,
        "difference": difference(model, out.sequences, want, ids.shape[1]),
    }
    if (heads_name, gate_name) == ("oracle", "open") and isinstance(tree, StaticPolicy):
        row["full_depth"] = full_depth(out.stats.accepted_histogram, tree.depth)
    return row


def arguments_of() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True, help="JSON lines with question_id and turns")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trained", default="smollm2-135m-instruct", help="packaged name, folder or Hub id of heads")
    parser.add_argument("--heads", nargs="+", choices=HEADS, help="only these")
    parser.add_argument("--trees", nargs="+", help="only these: chain, one, static-N or N nodes")
    parser.add_argument("--gates", nargs="+", choices=list(GATES), help="only these")
    parser.add_argument("--op-by-op", action="store_true", help="against steps that are not fused, in every dtype")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> int:
    arguments = arguments_of()
    model, tokenizer = cerberus_ext.load_default_model(getattr(torch, arguments.dtype), arguments.device)
    trained = cerberus_ext.CerberusHeads.from_pretrained(arguments.trained)
    results = Results(arguments.out)
    identity = {
        "questions": arguments.questions.name,
        "new_tokens": arguments.new_tokens,
        "dtype": arguments.dtype,
        "trained": Path(arguments.trained).name,
        **({"reference": "op by op"} if arguments.op_by_op else {}),
        "machine": describe_machine(model.device),
    }
    results.begin(identity, about={})
    reference: DecodeWay | GenerateWay = GenerateWay("generate", model)
    if arguments.op_by_op or arguments.dtype != "float32":
        own = {"fuse": False} if arguments.op_by_op else {}
        reference = DecodeWay("closed", model, trained, options={"gate": AlwaysClosed(), **own})
    for question in read_questions(arguments.questions, arguments.limit):
        ids = encode_chat(tokenizer, question.turns[:1]).to(arguments.device)
        todo = {f"{question.id}/{'/'.join(names)}": names for names in settings(arguments)}
        todo = {key: names for key, names in todo.items() if key not in results}
        if todo:
            want = text_of(ids, reference.run(ids, arguments.new_tokens)[0])
        for key, names in todo.items():
            results.add(key, **measure(model, trained, ids, arguments.new_tokens, want, names))
            print(results[key], flush=True)
    wrong = [row for row in results.values()
             if row["difference"] is not None or not row["exact"] or not row.get("full_depth", True)]  # fmt: skip
    print(f"{len(results)} texts, {len(wrong)} wrong", *wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
