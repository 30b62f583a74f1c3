"""Conversations to calibrate with where no file of questions is at hand: three of each of eight kinds.

What a text is worth to drafts depends on what it is about, and on how much of it has been said before: answers that
are long, and second turns, which mostly want something done with the first answer, repeat more than short first ones.
So all have two turns, some bring a text along, and they are asked for in equal shares of each kind.
"""

from __future__ import annotations

from pathlib import Path

from ..io.prompts import read_questions

OWN_QUESTIONS = tuple(read_questions(Path(__file__).with_name("questions.jsonl")))
