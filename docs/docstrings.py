"""Makes Markdown of kdx's docstrings, which are plain text with formulas, for the API reference."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection
from pathlib import Path

_CODE = re.compile(r"(``.+?``|`[^`]+`)", re.S)

PUBLISHED = re.findall(r"^::: (\S+)", Path(__file__).with_name("api.md").read_text("utf-8"), re.M)
"""The names that the API reference has."""


def as_markdown(text: str, parameters: Collection[str] = ()) -> str:
    """A docstring as Markdown: doctests become code blocks, and the description of each parameter becomes an entry of a list.

    A sentence that begins with names of parameters and a colon begins such an entry. Formulas keep their brackets and
    asterisks, and a name in single backticks becomes a link if the reference has it.
    """
    blocks = re.split(r"\n\s*\n", text.strip("\n"))
    return "\n\n".join(_block(block, parameters) for block in blocks)


def _block(block: str, parameters: Collection[str]) -> str:
    if block.lstrip().startswith(">>>"):
        return f"```pycon\n{textwrap.dedent(block)}\n```"
    if all(line.startswith("    ") for line in block.splitlines()):
        return block  # Markdown shows an indented block as it is
    name = "|".join(map(re.escape, sorted(parameters, key=len, reverse=True)))
    entries = re.split(rf"(?:^|(?<=[.;)]))\s*((?:{name})(?:,\s(?:{name}))*):\s", block) if name else [block]
    before, *rest = (_text(part) for part in entries)
    listed = [f"- **{names}**: {text}" for names, text in zip(rest[::2], rest[1::2], strict=True)]
    return "\n\n".join(part for part in (before, "\n".join(listed)) if part)


def _text(text: str) -> str:
    joined = " ".join(line.strip() for line in text.strip().splitlines())
    return "".join(_inline(part) for part in _CODE.split(joined))


def _inline(part: str) -> str:
    if part.startswith("``"):
        return part[1:-1]
    if part.startswith("`"):
        named = [name for name in PUBLISHED if part[1:-1] in (name, name.removeprefix("kdx."))]
        return f"[{part}][{named[0]}]" if named else part
    return part.replace("&", "&amp;").replace("<", "&lt;").replace("*", r"\*").replace("_", r"\_")
