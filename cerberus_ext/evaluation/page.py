"""The summary as one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .plots import TITLES
from .results import Results
from .tables import equality_lines, facts, number, tables
from .tokens import Draft, drafts_of
from .ways import AUTOREGRESSIVE, BOTH

STYLE = """
:root { color-scheme: light dark; --text: #1c1c1e; --soft: #6a6a70; --line: #dcdce0; --page: #fff; --bad: #b3261e }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6ea; --soft: #9d9da6; --line: #3a3a40; --page: #161618; --bad: #ff8a80 }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem }
h1, h2, h3 { line-height: 1.25 } h2 { margin-top: 2.5rem } h3 { margin: 1.5rem 0 .3rem }
p.note, dt, figcaption { color: var(--soft) } .bad { color: var(--bad); font-weight: 600 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem } dd { margin: 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
img { max-width: 100%; background: #fff; border-radius: 6px } figure { margin: 1rem 0 }
details { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .9rem; margin: .6rem 0 }
summary { cursor: pointer } .asked { color: var(--soft); white-space: pre-wrap }
.text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75 }
.text span { padding: .12em 0 } .text .first { border-left: 1px solid var(--soft) }
.key span { padding: .1em .5em; border-radius: 3px }
"""


def html(summary: dict[str, Any], results: Results, plots: Mapping[str, bytes]) -> str:
    """The whole page. plots: name -> PNG."""
    found = tables(summary)
    shown = views(summary, results)
    style = STYLE + "".join(f".{name} {{ background: {colour} }}\n" for name, _, colour in legend(shown))
    bad = summary["equality"]["violations"]
    parts = [
        "<h1>cerberus bench</h1>",
        '<p class="bad">Texts differ that must not, see Equality.</p>' if bad else "",
        "<dl>" + "".join(f"<dt>{escape(name)}<dd>{code(text)}" for name, text in facts(summary).items()) + "</dl>",
        *section(*found[0]),
        "<h2>Plots</h2>",
        *(figure(TITLES[name], image) for name, image in plots.items()),
        *(line for one in found[1:] for line in section(*one)),
        "<h2>Equality</h2>",
        *(f"<p>{code(line.replace('**', ''))}</p>" for line in equality_lines(summary["equality"])),
        *texts(shown),
        "<h2>Ways</h2>",
        "<dl>" + "".join(f"<dt>{escape(k)}<dd>{escape(v)}" for k, v in summary["settings"]["ways"].items()) + "</dl>",
        *(f"<p>Left out: {escape(k)}: {escape(v)}.</p>" for k, v in summary["about"]["left_out"].items()),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>cerberus bench: {escape(summary['settings']['model'])}</title>\n<style>{style}</style>\n</head>\n"
        "<body>\n" + "\n".join(part for part in parts if part) + "\n</body>\n</html>\n"
    )


def code(text: str) -> str:
    """Escaped, and what stands in backquotes as code."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))


def section(title: str, note: str, rows: list[list[str]]) -> list[str]:
    head, *body = rows
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in body)
    columns = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return [
        f"<h2>{escape(title)}</h2>",
        f'<p class="note">{escape(note)}</p>' if note else "",
        f'<div class="wide"><table>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{lines}</tbody>\n</table></div>',
    ]


def figure(title: str, image: bytes) -> str:
    data = base64.b64encode(image).decode()
    return f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{data}"></figure>'


# ---------------------------------------------------------------- who drafted which token

HEAD_HUES = (215, 150, 45, 10, 320, 240)  # from blue over green and orange to red
SOURCE_HUES = (280, 185, 75)  # between those of the heads

View = dict[str, Any]  # question, asked, ways: name -> [(piece, Draft)], and the tokens a step


def views(summary: dict[str, Any], results: Results) -> list[View]:
    """The texts to show, of the ways with drafts."""
    found = []
    for row in list(results):
        if not row.get("pieces"):
            continue
        ways = {}
        for name, pieces in row["pieces"].items():
            if pieces is None or name == AUTOREGRESSIVE:
                continue
            stats = results[f"{row['key']}/{name}"]["stats"]
            drafts = drafts_of(stats["trace"], stats.get("trace_proposers"), len(pieces))
            ways[name] = (list(zip(pieces, drafts, strict=True)), stats["step_tokens"] / max(1, stats["steps"]))
        if ways:
            question, turn, _ = row["key"].split("/")
            category = results[f"{row['key']}/{AUTOREGRESSIVE}"]["category"]
            title = " ".join(filter(None, [category, f"question {question}, turn {turn}"]))
            found.append({"title": title, "asked": row["asked"], "ways": ways})
    return found


def legend(shown: list[View]) -> list[tuple[str, str, str]]:
    """(class, what it means, colour) of all who drafted: heads by depth, then other proposers."""
    drafts = [draft for view in shown for text, _ in view["ways"].values() for _, draft in text]
    heads = range(1, max((draft.head for draft in drafts), default=0) + 1)
    proposers = range(1, max((draft.proposer for draft in drafts), default=0) + 1)
    return [
        *((f"h{head}", f"head {head}", tint(HEAD_HUES, head)) for head in heads),
        *((f"p{proposer}", f"proposer {proposer}", tint(SOURCE_HUES, proposer)) for proposer in proposers),
    ]


def tint(hues: Sequence[int], number: int) -> str:
    """Of head or proposer `number`, counted from 1. See-through, so that it reads on a light and on a dark page."""
    return f"hsl({hues[(number - 1) % len(hues)]} 85% 50% / .32)"


def texts(shown: list[View]) -> list[str]:
    if not shown:
        return []
    named = [f'<span class="{name}">{meaning}</span>' for name, meaning, _ in legend(shown)]
    lines = [
        "<h2>Who drafted which token</h2>",
        f'<p class="key">{" ".join(["<span>no colour: the target model itself</span>", *named])}</p>',
        '<p class="note">A thin line begins a step; point at a token for its step and its node of the tree. Proposers'
        " are those of <code>decode</code> besides the heads; the built-in ways have one, the text's own past.</p>",
    ]
    for index, view in enumerate(shown):
        lines += [f"<h3>{escape(view['title'])}</h3>", f'<p class="asked">{escape(view["asked"])}</p>']
        for name, (text, per_step) in view["ways"].items():
            favourite = BOTH if BOTH in view["ways"] else next(iter(view["ways"]))
            opened = " open" if index == 0 and name == favourite else ""
            spans = "".join(span(piece, draft, before) for (piece, draft), before in zip(
                text, [None, *(draft for _, draft in text)], strict=False
            ))  # fmt: skip
            lines.append(
                f"<details{opened}><summary>{escape(name)}: {number(per_step, '{:.2f}')} tokens a step</summary>"
                f'<div class="text">{spans}</div></details>'
            )
    return lines


def span(piece: str, draft: Draft, before: Draft | None) -> str:
    """One token. before: the draft of the token before it."""
    classes, who = [], "target model"
    if draft.head:
        classes, who = [f"h{draft.head}"], f"head {draft.head}, node {draft.node} of {draft.nodes}"
    elif draft.proposer:
        classes, who = [f"p{draft.proposer}"], f"proposer {draft.proposer}, node {draft.node} of {draft.nodes}"
    if before is not None and before.step != draft.step:
        classes.append("first")
    title = f"step {draft.step}: {who}" if draft.step else "from the prompt's forward"
    attribute = f' class="{" ".join(classes)}"' if classes else ""
    return f'<span{attribute} title="{title}">{escape(piece)}</span>'
