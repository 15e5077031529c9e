"""Applies `docs.docstrings` to the API reference. mkdocstrings loads this file into griffe, which reads source without importing it."""

from __future__ import annotations

from typing import Any

import griffe

from docs.docstrings import as_markdown


class Docstrings(griffe.Extension):  # type: ignore[misc, unused-ignore]
    def on_package(self, *, pkg: Any, **_: Any) -> None:
        self._visit(pkg)

    def _visit(self, source: Any) -> None:
        if source.docstring:
            source.docstring.value = as_markdown(source.docstring.value, _parameters(source))
        for member in source.members.values():
            if not member.is_alias:
                self._visit(member)


def _parameters(source: Any) -> set[str]:
    """The parameters of a function, or the fields of a class and the parameters of its constructor."""
    if source.is_function:
        return {parameter.name for parameter in source.parameters}
    if not source.is_class:
        return set()
    names = {name for name, member in source.members.items() if not member.is_alias and member.is_attribute}
    constructor = source.members.get("__init__")
    return names | ({parameter.name for parameter in constructor.parameters} if constructor else set())
