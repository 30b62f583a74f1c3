"""The ways to generate that are compared, those that are built in and those that a user brings in a file.

A way is anything with a `name` and a `run`. To add some, write a file with a function

    def ways(context: Context) -> list[Way]

and give it to `cerberus bench --way FILE.py`, or `--way FILE.py:ARGUMENT`, which `context.argument` then is. Next to
`name` a way may have `description`, one line for the report, `expected`, tokens a second that somebody expects, and
`not_compared`, why its texts may be others than those of the other ways.

Those that are built in, and what each of them is, are in `built_in_ways`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..drafting.drafter import HeadsLike
from ..drafting.dynamic_policy import DynamicPolicy
from ..drafting.gate import AlwaysOpen, EntropyGate
from ..drafting.heads import CerberusHeads
from ..drafting.static_policy import StaticPolicy, default_tree
from ..drafting.tree import TreePolicy
from ..engine.calibration_store import Calibration, find
from ..engine.decode import decode
from ..engine.plan import default_policy
from ..runtime.stats import DecodeStats

AUTOREGRESSIVE = "autoregressive"  # what every other way has to be faster than, and must have the same text as
GENERATE = "generate"
LOOKUP = "prompt-lookup"
ASSISTED = "assisted"
MEDUSA = "medusa"
SUFFIX = "suffix"
STATIC = "cerberus-static"
DYNAMIC = "cerberus-dynamic"
BOTH = "cerberus"
ENTROPY = "cerberus-entropy"
CALIBRATED = "cerberus-calibrated"
LLAMA_CPP = LLAMA_BF16, LLAMA_Q4_1 = "llama.cpp bf16", "llama.cpp q4_1"
NO_CALIBRATION = "no calibration is stored for this machine, see cerberus calibrate"


class Way(Protocol):
    """name: unique, without "/"."""

    name: str

    def run(self, ids: Tensor, new_tokens: int) -> tuple[list[int], DecodeStats | None]:
        """ids (1, S): the prompt -> the new tokens, at most `new_tokens`, chosen greedily; and what `decode` counted.

        The whole call is timed. A way that returns statistics ran in `decode`, whose texts are the same to the bit on
        a CPU; one without may, in bfloat16 and float16, go another way at near ties.
        """


@dataclass(frozen=True)
class Context:
    """What ways are made of. tree_size: nodes that the user wants trees to have; None: what is usual."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    heads: CerberusHeads
    tree_size: int | None = None
    argument: str | None = None  # what followed FILE.py: in --way

    def dynamic_tree(self) -> DynamicPolicy:
        """A tree of its own for every step: as calibration stored, else the default; of the user's size."""
        stored = self.calibration()
        tree = None if stored is None else stored.tree
        tree = tree if isinstance(tree, DynamicPolicy) else default_policy(self.model.device)
        return tree if self.tree_size is None else replace(tree, size=self.tree_size)

    def suffix_tree(self) -> DynamicPolicy:
        """The same without heads, and so without what is known of theirs."""
        return replace(self.dynamic_tree(), platt=None)

    def calibration(self) -> Calibration | None:
        """What `cerberus calibrate` stored with the heads for this device, dtype and number of threads."""
        return find(self.heads, self.model.device, self.model.dtype, torch.get_num_threads())


@dataclass
class DecodeWay:
    """`decode` with heads, or None. options: of `decode`, its own choice where left out; tree, gate and so on."""

    name: str
    model: PreTrainedModel
    heads: HeadsLike | None
    description: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    expected: float | None = None

    def run(self, ids: Tensor, new_tokens: int) -> tuple[list[int], DecodeStats | None]:
        out = decode(self.model, self.heads, ids, max_new_tokens=new_tokens, **self.options)
        return out.sequences[0, ids.shape[1] :].tolist(), out.stats


@dataclass
class GenerateWay:
    """transformers' `generate`."""

    name: str
    model: PreTrainedModel
    description: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, ids: Tensor, new_tokens: int) -> tuple[list[int], DecodeStats | None]:
        model: Any = self.model
        text = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,  # one row: nothing is padded
            **self.options,
        )
        return text[0, ids.shape[1] :].tolist(), None


def built_in_ways(
    context: Context,
    medusa: CerberusHeads | None = None,
    draft: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    entropy_threshold: float | None = None,
    llama_cpp: Sequence[Way] = (),
) -> tuple[list[Way], dict[str, str]]:
    """Those that there is everything for, and the others: name -> what is missing.

    What is static has one tree for all steps, what is not a tree of its own for every step.
    entropy_threshold: of the entropy gate, in nats; None: there is none. llama_cpp: see llama_cpp.py.
    """
    model, heads = context.model, context.heads
    stored, dynamic = context.calibration(), context.dynamic_tree()
    static = default_tree(heads, model.device, context.tree_size)
    found: dict[str, Way | str] = {  # in the order of the report; a text says what is missing
        AUTOREGRESSIVE: plain_way(AUTOREGRESSIVE, "this loop, which never drafts", context, stored),
        GENERATE: GenerateWay(GENERATE, model, "transformers' generate"),
        LOOKUP: GenerateWay(LOOKUP, model, "generate, prompt lookup of 10 tokens", {"prompt_lookup_num_tokens": 10}),
        ASSISTED: "no draft model was given",
        MEDUSA: "no heads of that kind were given",
        SUFFIX: open_way(SUFFIX, "the text's own past", context, None, context.suffix_tree()),
        STATIC: open_way(STATIC, "heads", context, heads, static),
        DYNAMIC: open_way(DYNAMIC, "heads", context, heads, dynamic, proposers=()),
        BOTH: open_way(BOTH, "heads and the text's own past", context, heads, dynamic),
        ENTROPY: "there is no threshold",
        CALIBRATED: NO_CALIBRATION,
        **dict.fromkeys(LLAMA_CPP, "no Python with xllamacpp was given"),
        **{way.name: way for way in llama_cpp},
    }
    if draft is not None:
        about = f"generate, assisted by {model_name(draft[0])}"
        found[ASSISTED] = GenerateWay(ASSISTED, model, about, assistant(context, *draft))
    if medusa is not None:
        tree = default_tree(medusa, model.device, context.tree_size)
        found[MEDUSA] = open_way(MEDUSA, "Medusa's heads", context, medusa, tree)
    if entropy_threshold is not None:
        about = f"heads, {describe(static)} where the hidden state's entropy is < {entropy_threshold:.4g}"
        options = {"tree": static, "gate": EntropyGate(entropy_threshold)}
        found[ENTROPY] = DecodeWay(ENTROPY, model, heads, about, options)
    if stored is not None:
        found[CALIBRATED] = calibrated_way(CALIBRATED, context, stored)
    missing = {name: one for name, one in found.items() if isinstance(one, str)}
    return [one for one in found.values() if not isinstance(one, str)], missing


def plain_way(name: str, about: str, context: Context, calibration: Calibration | None) -> DecodeWay:
    """`decode` without drafts."""
    expected = None if calibration is None else calibration.expected.plain_tokens_per_second
    return DecodeWay(name, context.model, context.heads, about, {"tree": StaticPolicy.root()}, expected=expected)


def open_way(name: str, what: str, context: Context, heads: Any, tree: TreePolicy, **options: Any) -> DecodeWay:
    """`decode` with drafts at every step. what: whose they are, for the description."""
    about = f"{what}, {describe(tree)}, drafts at every step"
    return DecodeWay(name, context.model, heads, about, {"tree": tree, "gate": AlwaysOpen(), **options})


def calibrated_way(name: str, context: Context, calibration: Calibration) -> DecodeWay:
    """What `decode` does by itself."""
    always_open = isinstance(calibration.gate, AlwaysOpen)
    gate = "drafts at every step" if always_open else type(calibration.gate).__name__
    about, expected = f"as calibrated, {describe(calibration.tree)}, {gate}", calibration.expected.tokens_per_second
    return DecodeWay(name, context.model, context.heads, about, expected=expected)


def describe(tree: TreePolicy) -> str:
    return f"{'dynamic ' if tree.looks else ''}tree of {tree.size} nodes"


def model_name(model: PreTrainedModel) -> str:
    """Of a folder its own name, without where it is."""
    return Path(str(model.name_or_path)).name


def assistant(context: Context, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The arguments of assisted generation, by a model of the same vocabulary or of another one."""
    if tokenizer.get_vocab() == context.tokenizer.get_vocab():
        return {"assistant_model": model}
    return {"assistant_model": model, "tokenizer": context.tokenizer, "assistant_tokenizer": tokenizer}


def ways_of_file(argument: str) -> Callable[[Context], list[Way]]:
    """argument: FILE.py or FILE.py:ARGUMENT -> what calls the file's `ways`. The file is run here.

    Raises ValueError where there is no such file or it has no such function.
    """
    name, _, rest = argument.partition(".py:")
    file = Path(f"{name}.py" if rest else argument)
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"bench: way must be FILE.py or FILE.py:ARGUMENT, got {argument}, and there is no file {file}")
    spec = importlib.util.spec_from_file_location(f"cerberus_bench_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "ways", None)):
        raise ValueError(f"bench: way must name a file with a function ways(context), {file.name} has none")
    return lambda context: list(module.ways(replace(context, argument=rest or None)))


def select(ways: Sequence[Way], missing: dict[str, str], names: Sequence[str] | None) -> list[Way]:
    """The ways of these names, in their own order, and always the autoregressive one; None: all.

    Raises ValueError on a name twice, and on one that is not there, with the reason.
    """
    known = [way.name for way in ways]
    if len(set(known)) < len(known) or any("/" in name or not name for name in known):
        raise ValueError(f'bench: ways must have names of their own, without "/", got {", ".join(known)}')
    for name in names or ():
        if name in missing:
            raise ValueError(f"bench: ways must not name {name} here: {missing[name]}")
        if name not in known:
            raise ValueError(f"bench: ways must be of {', '.join(known)}, got {name}")
    if names is None:
        return list(ways)
    wanted = {*names, AUTOREGRESSIVE}
    return [way for way in ways if way.name in wanted]
