"""Rows of Markdown tables."""

from __future__ import annotations


def header(*cells: str) -> list[str]:
    return [row(*cells), "| --- " * len(cells) + "|"]


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def joined(lines: list[str]) -> str:
    return "\n".join(lines)


def counted(number: int, noun: str) -> str:
    """The number with the noun in the singular or the plural."""
    return f"{number} {noun}{'s' if number != 1 else ''}"
