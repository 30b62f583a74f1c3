"""The ways to generate that are compared, those that are built in and those that a user brings in a file.

A way is anything with a `name` and a `run`. To add some, write a file with a function

    def ways(context: Context) -> list[Way]

and give it to `cerberus bench --way FILE.py`, or `--way FILE.py:ARGUMENT`, which `context.argument` then is. Next to
`name` a way may have `description`, one line for the report, `expected`, tokens a second that somebody foresees,
`compiled`, whether its steps are compiled and so round differently, and `compile_ahead()`, which is called before
anything is timed and returns a DecodeStats that tells what was compiled.

Those that are built in:

    autoregressive        this loop without drafts
    generate              transformers' `generate`; prompt-lookup, assisted: the same with its ways to draft
    medusa                Medusa's heads, the same tree at every step
    suffix                a tree new at every step, of what the text's own past says; no heads
    cerberus-static       the heads, the same tree at every step
    cerberus-dynamic      the heads, a tree new at every step
    cerberus              the heads and the text's own past, a tree new at every step
    cerberus-entropy      as cerberus-static, where the entropy of the hidden state is low (the paper's gate)
    cerberus-calibrated   what `decode` does by itself with what `cerberus calibrate` has stored

and where compiled steps were asked for, autoregressive-compiled, cerberus-compiled and cerberus-calibrated-compiled,
the same with the target model's steps through torch.compile, as calibrated for such steps where that was done.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..drafting.drafter import HeadsLike
from ..drafting.dynamic_policy import DynamicPolicy
from ..drafting.gate import AlwaysOpen, EntropyGate, Gate
from ..drafting.heads import CerberusHeads
from ..drafting.proposers import ProposerFactory
from ..drafting.static_policy import StaticPolicy, default_tree
from ..drafting.tree import TreePolicy
from ..engine.calibration_store import Calibration, find
from ..engine.decode import decode
from ..engine.decoder import Decoder
from ..engine.plan import default_policy
from ..runtime.stats import DecodeStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AUTOREGRESSIVE = "autoregressive"  # what every other way has to be faster than, and must have the same text as
AUTOREGRESSIVE_COMPILED = "autoregressive-compiled"  # the same for the ways with compiled steps
GENERATE = "generate"
MEDUSA = "medusa"
SUFFIX = "suffix"
STATIC = "cerberus-static"
DYNAMIC = "cerberus-dynamic"
BOTH = "cerberus"
BOTH_COMPILED = "cerberus-compiled"
CALIBRATED = "cerberus-calibrated"
CALIBRATED_COMPILED = "cerberus-calibrated-compiled"
COMPILED = (AUTOREGRESSIVE_COMPILED, BOTH_COMPILED, CALIBRATED_COMPILED)
LOOKUP = {"prompt_lookup_num_tokens": 10}  # transformers' usual number
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

    def tree(self, heads: Any) -> StaticPolicy:
        """The same one for every step: of the user's size, else what calibration stored, else the default."""
        stored = self._stored_tree(heads) if self.tree_size is None else None
        if isinstance(stored, StaticPolicy) and stored.size > 1:
            return stored
        return default_tree(heads, self.model.device, self.tree_size)

    def dynamic_tree(self, compiled: bool = False) -> DynamicPolicy:
        """How trees are new at every step: as calibration stored, else the default; of the user's size."""
        stored = self._stored_tree(self.heads, compiled)
        tree = stored if isinstance(stored, DynamicPolicy) else default_policy(self.model.device)
        return tree if self.tree_size is None else replace(tree, size=self.tree_size)

    def suffix_tree(self) -> DynamicPolicy:
        """The same without heads, and so without what is known of theirs."""
        return replace(self.dynamic_tree(), platt=None)

    def _stored_tree(self, heads: Any, compiled: bool = False) -> TreePolicy | None:
        stored = self.calibration(heads, compiled)
        return None if stored is None else stored.tree

    def calibration(self, heads: Any, compiled: bool = False) -> Calibration | None:
        """What `cerberus calibrate` stored with the heads for this device, dtype and number of threads.

        compiled: preferably of compiled steps.
        """
        return find(heads, self.model.device, self.model.dtype, torch.get_num_threads(), compiled)


@dataclass
class DecodeWay:
    """`decode` with heads, or None, and a tree, a gate and proposers, None being `decode`'s own choice."""

    name: str
    model: PreTrainedModel
    heads: HeadsLike | None
    tree: TreePolicy | None = None
    gate: Gate | None = None
    description: str = ""
    expected: float | None = None
    proposers: Sequence[ProposerFactory] | None = None
    compiled: bool = False

    def compile_ahead(self) -> DecodeStats | None:
        if not self.compiled:
            return None
        return Decoder(
            self.model, self.heads, tree=self.tree, gate=self.gate, proposers=self.proposers, compile=True
        ).warm_up()

    def run(self, ids: Tensor, new_tokens: int) -> tuple[list[int], DecodeStats | None]:
        out = decode(
            self.model,
            self.heads,
            ids,
            max_new_tokens=new_tokens,
            tree=self.tree,
            gate=self.gate,
            proposers=self.proposers,
            compile=self.compiled,
        )
        return out.sequences[0, ids.shape[1] :].tolist(), out.stats


@dataclass
class GenerateWay:
    """transformers' `generate`."""

    name: str
    context: Context
    description: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, ids: Tensor, new_tokens: int) -> tuple[list[int], DecodeStats | None]:
        pad = self.context.tokenizer.pad_token_id
        model: Any = self.context.model
        text = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0 if pad is None else pad,  # one row: nothing is padded
            **self.options,
        )
        return text[0, ids.shape[1] :].tolist(), None


def open_way(context: Context, name: str, heads: HeadsLike, what: str) -> DecodeWay:
    """`decode` with heads whose tree is checked at every step. what: they are, for the description."""
    tree = context.tree(heads)
    return DecodeWay(name, context.model, heads, tree, AlwaysOpen(), f"{what}, {describe(tree)}, drafts at every step")


def describe(tree: TreePolicy) -> str:
    return f"{'dynamic ' if isinstance(tree, DynamicPolicy) else ''}tree of {tree.size} nodes"


def dynamic_ways(context: Context) -> list[Way]:
    """Those whose tree is new at every step: of the text's own past, of the heads, and of both."""
    model, heads, tree = context.model, context.heads, context.dynamic_tree()
    about, always = f"{describe(tree)}, drafts at every step", AlwaysOpen()
    return [
        DecodeWay(SUFFIX, model, None, context.suffix_tree(), always, f"the text's own past, {about}"),
        DecodeWay(DYNAMIC, model, heads, tree, always, f"heads, {about}", proposers=()),
        DecodeWay(BOTH, model, heads, tree, always, f"heads and the text's own past, {about}"),
    ]


def built_in_ways(
    context: Context,
    medusa: CerberusHeads | None = None,
    draft: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    entropy_threshold: float | None = None,
    compile: bool = False,
) -> tuple[list[Way], dict[str, str]]:
    """Those that there is everything for, and the others: name -> what is missing.

    entropy_threshold: of the entropy gate, in nats; None: there is none. compile: those with compiled steps, too.
    """
    model, heads = context.model, context.heads
    calibration = context.calibration(heads)
    ways: list[Way] = [
        DecodeWay(
            AUTOREGRESSIVE, model, heads, StaticPolicy.root(), description="this loop, which never drafts",
            expected=None if calibration is None else calibration.expected.plain_tokens_per_second,
        ),
        GenerateWay(GENERATE, context, "transformers' generate"),
        GenerateWay(
            "prompt-lookup", context, "generate, prompt lookup of 10 tokens", LOOKUP
        ),
    ]  # fmt: skip
    missing: dict[str, str] = {}
    if draft is None:
        missing["assisted"] = "no draft model was given"
    else:
        about = f"generate, assisted by {model_name(draft[0])}"
        ways.append(GenerateWay("assisted", context, about, _assistant(context, draft)))
    if medusa is None:
        missing[MEDUSA] = "no heads of that kind were given"
    else:
        ways.append(open_way(context, MEDUSA, medusa, "Medusa's heads"))
    suffix, *with_heads = dynamic_ways(context)
    ways += [suffix, open_way(context, STATIC, heads, "heads"), *with_heads]
    if entropy_threshold is None:
        missing["cerberus-entropy"] = "there is no threshold"
    else:
        tree = context.tree(heads)
        about = f"heads, {describe(tree)} where the hidden state's entropy is < {entropy_threshold:.4g}"
        ways.append(DecodeWay("cerberus-entropy", model, heads, tree, EntropyGate(entropy_threshold), about))
    if calibration is None:
        missing[CALIBRATED] = NO_CALIBRATION
    else:
        ways.append(calibrated_way(context, CALIBRATED, calibration))
    if compile:
        more, lacking = compiled_ways(context)
        return [*ways, *more], missing | lacking
    return ways, missing | dict.fromkeys(COMPILED, "compiled steps were not asked for")


def calibrated_way(context: Context, name: str, calibration: Calibration) -> DecodeWay:
    """What `decode` does by itself."""
    always_open = isinstance(calibration.gate, AlwaysOpen)
    gate = "drafts at every step" if always_open else type(calibration.gate).__name__
    about, expected = f"as calibrated, {describe(calibration.tree)}, {gate}", calibration.expected.tokens_per_second
    return DecodeWay(name, context.model, context.heads, description=about, expected=expected)


def compiled_ways(context: Context) -> tuple[list[Way], dict[str, str]]:
    """As `built_in_ways`, those with compiled steps."""
    model, heads = context.model, context.heads
    calibration = context.calibration(heads, compiled=True)
    tree = context.dynamic_tree(compiled=True)
    about = f"heads and the text's own past, {describe(tree)}, drafts at every step, compiled"
    ways = [
        DecodeWay(AUTOREGRESSIVE_COMPILED, model, heads, StaticPolicy.root(), description="this loop, compiled"),
        DecodeWay(BOTH_COMPILED, model, heads, tree, AlwaysOpen(), about),
    ]
    missing: dict[str, str] = {}
    if calibration is None:
        missing[CALIBRATED_COMPILED] = NO_CALIBRATION
    else:
        way = calibrated_way(context, CALIBRATED_COMPILED, calibration)
        way.description += ", compiled"
        if calibration.compiled:
            ways[0].expected = calibration.expected.plain_tokens_per_second
        else:
            way.description, way.expected = f"{way.description} (calibrated for steps that are not)", None
        ways.append(way)
    for way in ways:
        way.compiled = True
    return list(ways), missing


def model_name(model: PreTrainedModel) -> str:
    """Of a folder its own name, without where it is."""
    return Path(str(model.name_or_path)).name


def _assistant(context: Context, draft: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> dict[str, Any]:
    """The arguments of assisted generation, by a model of the same vocabulary or of another one."""
    model, tokenizer = draft
    if tokenizer.get_vocab() == context.tokenizer.get_vocab():
        return {"assistant_model": model}
    return {"assistant_model": model, "tokenizer": context.tokenizer, "assistant_tokenizer": tokenizer}


def ways_of_file(argument: str, context: Context) -> list[Way]:
    """argument: FILE.py or FILE.py:ARGUMENT -> what the file's `ways` makes.

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
    return list(module.ways(replace(context, argument=rest or None)))


def select(ways: Sequence[Way], missing: dict[str, str], names: Sequence[str] | None) -> list[Way]:
    """The ways of these names, in their own order, and always the autoregressive one; None: all.

    With one whose steps are compiled comes the autoregressive one with such steps, where it is there.

    Raises ValueError on a name twice, and on one that is not there, with the reason.
    """
    known = [way.name for way in ways]
    for name in known:
        if known.count(name) > 1 or "/" in name or not name:
            raise ValueError(f'bench: ways must have names of their own, without "/", got {", ".join(known)}')
    for name in names or ():
        if name in missing:
            raise ValueError(f"bench: ways must not name {name} here: {missing[name]}")
        if name not in known:
            raise ValueError(f"bench: ways must be of {', '.join(known)}, got {name}")
    if names is None:
        return list(ways)
    wanted = {*names, AUTOREGRESSIVE}
    if any(way.name in wanted and is_compiled(way) for way in ways):
        wanted.add(AUTOREGRESSIVE_COMPILED)
    return [way for way in ways if way.name in wanted]


def is_compiled(way: Way) -> bool:
    return getattr(way, "compiled", False)
