"""The summary as one HTML page, of page.html, that needs no other file and no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from .plots import TITLES
from .results import Results
from .tables import equality_lines, facts, number, tables
from .tokens import Draft, drafts_of
from .ways import AUTOREGRESSIVE, BOTH

HEAD_HUES = (215, 150, 45, 10, 320, 240)  # from blue over green and orange to red
PROPOSER_HUES = (280, 185, 75)  # between those of the heads


def html(summary: dict[str, Any], results: Results, plots: Mapping[str, bytes]) -> str:
    """The whole page. plots: name -> PNG."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    pages.filters["code"] = code
    shown = views(results)
    return pages.get_template("page.html").render(
        settings=summary["settings"],
        about=summary["about"],
        equality=summary["equality"],
        facts=facts(summary),
        tables=tables(summary),
        plots={TITLES[name]: base64.b64encode(image).decode() for name, image in plots.items()},
        equality_lines=list(equality_lines(summary["equality"])),
        views=shown,
        legend=legend([token["draft"] for view in shown for way in view["ways"] for token in way["tokens"]]),
    )


def code(text: str) -> Markup:
    """Escaped, and what stands in backquotes as code."""
    pieces = str(escape(text)).split("`")
    return Markup("".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces)))


def views(results: Results) -> list[dict[str, Any]]:
    """The texts that are shown token by token, of the ways with drafts."""
    found: list[dict[str, Any]] = []
    for key, row in results.items():
        pieces = {name: some for name, some in (row.get("pieces") or {}).items() if some and name != AUTOREGRESSIVE}
        if not pieces:
            continue
        question, turn, _ = key.split("/")
        category = results[f"{key}/{AUTOREGRESSIVE}"]["category"]
        favourite = BOTH if BOTH in pieces else next(iter(pieces))
        ways = [
            {
                "name": name,
                "open": not found and name == favourite,
                "per_step": number(stats["step_tokens"] / max(1, stats["steps"]), "{:.2f}"),
                "tokens": tokens(some, drafts_of(stats["trace"], stats["trace_proposers"], len(some))),
            }
            for name, some in pieces.items()
            for stats in [results[f"{key}/{name}"]["stats"]]
        ]
        title = " ".join(filter(None, [category, f"question {question}, turn {turn}"]))
        found.append({"title": title, "asked": row["asked"], "ways": ways})
    return found


def tokens(pieces: Sequence[str], drafts: Sequence[Draft]) -> list[dict[str, Any]]:
    """One entry for each token of a text: how it reads, who drafted it, and where a step begins."""
    found = []
    for piece, draft, before in zip(pieces, drafts, [drafts[0], *drafts], strict=False):
        who, name = "target model", ""
        if draft.head or draft.proposer:
            kind, number = ("head", draft.head) if draft.head else ("proposer", draft.proposer)
            who, name = f"{kind} {number}, node {draft.node} of {draft.nodes}", f"{kind[0]}{number}"
        classes = " ".join(filter(None, [name, "first" if before.step != draft.step else ""]))
        title = f"step {draft.step}: {who}" if draft.step else "from the prompt's forward"
        found.append({"piece": piece, "draft": draft, "classes": classes, "title": title})
    return found


def legend(drafts: Sequence[Draft]) -> list[tuple[str, str, str]]:
    """(class, what it means, colour) of all who drafted: heads by depth, then other proposers.

    Colours are see-through, to read on a light and on a dark page.
    """
    kinds = (("head", HEAD_HUES), ("proposer", PROPOSER_HUES))
    return [
        (f"{kind[0]}{number}", f"{kind} {number}", f"hsl({hues[(number - 1) % len(hues)]} 85% 50% / .32)")
        for kind, hues in kinds
        for number in range(1, max((getattr(draft, kind) for draft in drafts), default=0) + 1)
    ]
