"""README and docs hold: their Python runs, their commands have these options, their links and paths exist."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from eight_bits import through_eight_bits
from tiny_chat import save_heads, save_model
from torch import Tensor, cat
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import cerberus_ext
from cerberus_ext import AlwaysOpen, CerberusHeads, StaticPolicy
from cerberus_ext.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    """The text of the page's fenced blocks of a language."""
    return [text for name, text in FENCE.findall(page.read_text()) if name == language]


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command of the page's shell blocks, comments left out."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while "&&" in words:
                yield words[: words.index("&&")]
                words = words[words.index("&&") + 1 :]
            if words:
                yield words


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[PreTrainedModel, CerberusHeads]:
    """A tiny model and heads, which README's first lines load in the place of the default ones."""
    save_model(tmp_path / "model")
    save_heads(tmp_path / "heads")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    model.generation_config.eos_token_id = None
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = "w5 w9 w14 {% for message in messages %}{{ message.content }}{% endfor %}"
    heads = CerberusHeads.from_pretrained(tmp_path / "heads")
    monkeypatch.setattr(cerberus_ext, "load_default_model", lambda: (model, tokenizer))
    monkeypatch.setattr(CerberusHeads, "from_pretrained", lambda name: heads)
    return model, heads


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 200


@pages
def test_words(page: Path) -> None:
    assert not re.findall(r"guess|made anew|base model|whatever is|be it\b|TODO|<!--", page.read_text(), re.IGNORECASE)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", page.read_text())):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


@pages
def test_paths(page: Path) -> None:
    """What looks like a file or a folder of the repository is there; a source distribution has no results."""
    folders = "cerberus_ext|csrc|python_tests|bench|docs"
    for path in re.findall(rf"(?<![\w/])(?:{folders})/[\w./-]*[\w/]", page.read_text()):
        if path.startswith("bench/results/") and not (ROOT / "bench" / "results").exists():
            continue
        assert (ROOT / path).exists() or "my_op" in path, path


@pages
def test_names(page: Path) -> None:
    """`name` in `file` is defined there; files of a room of the package are there."""
    text, package = page.read_text(), Path(cerberus_ext.__file__).parent
    for file in re.findall(r"(?<![\w/.])((?:[a-z]+/)[a-z_]+\.py)", text):
        assert (package / file).exists() or (ROOT / file).exists(), file
    for name, file in re.findall(r"`(\w+)(?:\(\w*\))?` in\s+`([\w/]+\.\w+)`", text):
        found = [one for one in (*package.rglob("*.py"), *ROOT.glob("csrc/**/*.*")) if str(one).endswith(f"/{file}")]
        assert any(re.search(rf"\b{name}\b", one.read_text()) for one in found), (name, file)


@pages
def test_commands(page: Path) -> None:
    """Every option of a `cerberus` command exists, and of a script."""
    group: Any = typer.main.get_command(app)
    for words in commands(page):
        if words[0] == "python":
            files = [ROOT / words[1]] if words[1].endswith(".py") else list((ROOT / words[1]).glob("*.py"))
            text = "".join(file.read_text() for file in files)
            assert text and all(f'"{word}"' in text for word in words if word.startswith("--")), words
            continue
        if "-m" in words and "cerberus_ext.cli" in words:
            words = words[words.index("cerberus_ext.cli") :]
        elif words[0] != "cerberus":
            continue
        known = {name for option in group.commands[words[1]].params for name in (*option.opts, *option.secondary_opts)}
        assert {word for word in words if word.startswith("--")} <= known, words


def test_options_of_tables() -> None:
    """The options in the tables of docs/training.md, calibration.md and benchmarks.md exist."""
    group: Any = typer.main.get_command(app)
    for page, command in (("training", "train"), ("calibration", "calibrate"), ("benchmarks", "bench")):
        text = FENCE.sub("", (ROOT / "docs" / f"{page}.md").read_text())
        known = {name for option in group.commands[command].params for name in (*option.opts, *option.secondary_opts)}
        others = {"--help", "--stages"}  # of every command; of the GPU session alone
        options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) - others
        assert options and options <= known, options - known


def test_table_of_arguments() -> None:
    """README's table names the arguments of `decode`, and only these."""
    table = README.read_text().partition("| argument | meaning |")[2].partition("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(inspect.signature(cerberus_ext.decode).parameters) - {"model"}


def test_readme_runs(tiny: tuple[PreTrainedModel, CerberusHeads], capsys: pytest.CaptureFixture[str]) -> None:
    """All of its Python, in one namespace and from top to bottom, as a reader would."""
    namespace: dict[str, Any] = {}
    for block in blocks(README, "python"):
        exec(compile(block, str(README), "exec"), namespace)
    ids, model = namespace["ids"], tiny[0]
    out = namespace["out"]  # of the last call, with the proposer
    greedy = {"do_sample": False, "max_new_tokens": 256, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    assert out.sequences.equal(model.generate(ids, **greedy))
    assert len(capsys.readouterr().out.splitlines()) > 3


def forward(model: PreTrainedModel, text: list[Any], tokens: list[Any], parents: list[int]) -> tuple[Tensor, Tensor]:
    """Hidden states (N, D) and logits (N, V) of the nodes: every path is a row of its own."""
    paths = [[tokens[0]]]
    for node in range(1, len(tokens)):
        paths.append([*paths[parents[node]], tokens[node]])
    last = torch.tensor([len(text) + len(path) - 1 for path in paths])
    rows = torch.zeros(len(paths), int(last.max()) + 1, dtype=torch.int64)
    for row, path in zip(rows, paths, strict=True):
        row[: len(text) + len(path)] = torch.tensor([int(token) for token in (*text, *path)])
    with torch.inference_mode():
        output = model(rows, output_hidden_states=True)
    return output.hidden_states[-1][range(len(rows)), last], output.logits[range(len(rows)), last]


def test_readme_step_is_decodes(tiny: tuple[PreTrainedModel, CerberusHeads]) -> None:
    """README's step drafts what the heads draft, accepts what `decode` accepts, and writes the same text."""
    model, heads = tiny
    with torch.no_grad():  # every term of the formula counts
        for parameter, value in ((heads.weight, 0.2), (heads.bias, 0.5)):
            parameter.normal_(std=value, generator=torch.Generator().manual_seed(3))
        for weight in (heads.weight, model.get_output_embeddings().weight):  # on a CPU these are drafted with
            weight.copy_(through_eight_bits(weight))
        heads.anchor_scale.fill_(1.7)
    policy, drafter = StaticPolicy.from_widths([16, 2, 1]), heads.bind(model)
    paths = [[0]]
    for node in range(1, policy.size):
        paths.append([*paths[policy.parents[node]], node])
    depth, rank, seen = policy.tree.depths.tolist(), policy.ranks, []

    def run(text: list[Any], tokens: list[Any], parents: list[int]) -> tuple[Tensor, Tensor]:
        seen.append([int(token) for token in tokens])
        return forward(model, text, tokens, parents)

    namespace: dict[str, Any] = {
        "cat": cat, "silu": silu, "P": policy.useful_drafts, "N": policy.size, "parents": policy.parents,
        "depth": depth, "rank": rank, "path": paths, "K": heads.config.num_heads, "L": heads.config.num_layers,
        "weight": heads.weight, "bias": heads.bias, "scale": heads.anchor_scale, "forward": run,
        "embed": model.get_input_embeddings().weight.detach(), "lm_head": model.get_output_embeddings().weight.detach(),
    }  # fmt: skip
    (block,) = [block for block in blocks(README, "python") if "def decoding_step" in block]
    exec(compile(block, str(README), "exec"), namespace)
    prompt, new = [5, 9, 14, 20, 33], 40
    text: list[Any] = prompt
    states, logits = forward(model, text[:-1], text[-1:], [-1])
    hidden, pending, lengths, end = states[0], logits[0].argmax(), [], len(text) + new
    while len(text) < end:
        before, (ids, _) = len(text), drafter.draft(hidden[None], pending[None], policy.useful_drafts)
        want = [int(pending), *(int(ids[0, depth[i] - 1, rank[i]]) for i in range(1, policy.size))]
        text, hidden, pending = namespace["decoding_step"](text, hidden, pending)
        assert seen[-1] == want
        lengths.append(len(text) - before - 1)
    out = cerberus_ext.decode(model, heads, prompt, max_new_tokens=new, tree=policy, gate=AlwaysOpen())
    assert [int(token) for token in text[:end]] == out.sequences[0].tolist()
    taken = [len(path) for _, path in out.stats.trace]
    assert lengths[: len(taken) - 1] == taken[:-1] and max(taken) > 1  # the last step is cut at the end of the text


def test_gate_of_design(tiny: tuple[PreTrainedModel, CerberusHeads]) -> None:
    (block,) = blocks(ROOT / "docs" / "design.md", "python")
    namespace: dict[str, Any] = {}
    exec(compile(block, "design.md", "exec"), namespace)
    model, heads = tiny
    ids = torch.tensor([[5, 9, 14, 20, 33]])
    out = cerberus_ext.decode(model, heads, ids, max_new_tokens=24, tree=16, gate=namespace["FirstHalf"]())
    assert out.sequences.equal(cerberus_ext.decode(model, None, ids, max_new_tokens=24).sequences)
    assert {nodes for nodes, _ in out.stats.trace} <= {1, *range(2, 9)} and out.stats.open_steps
