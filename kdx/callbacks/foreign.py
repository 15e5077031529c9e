"""Subclasses of classes of packages that kdx does not import itself."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, Self

from torch import nn

from kdx.errors import KdxError, near_names


class ForeignSubclass:
    """A class whose instances are also instances of a class of other packages, which are imported when the first instance is made.

    A framework calls many methods of its callbacks and checks their class, so the base has to be its own.
    """

    packages: ClassVar[Sequence[str]]
    """The modules that have the base class: those that are imported already, or else the first that is installed."""
    base: ClassVar[str]
    """Its name in them."""

    def __new__(cls, *_arguments: Any, **_keywords: Any) -> Self:
        modules = [sys.modules[name] for name in cls.packages if name in sys.modules] or [_installed(cls)]
        bases = tuple(getattr(module, cls.base) for module in modules)
        return super().__new__(cls if issubclass(cls, bases) else _with_bases(cls, bases))  # type: ignore[arg-type]


@cache
def _with_bases(cls: type[Any], bases: tuple[type[Any], ...]) -> type[Any]:
    return type(cls.__name__, (cls, *bases), {"__doc__": cls.__doc__, "__module__": cls.__module__})


def _installed(cls: type[Any]) -> Any:
    for name in cls.packages:
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    package = cls.packages[0].partition(".")[0]
    raise KdxError(f"{cls.__name__} needs the package {package}, which is not installed.", f"Install it with: pip install {package}")


def inner_module(module: nn.Module, path: str | None) -> nn.Module:
    """The module at a dotted path; the module itself without one. Raises KdxError if there is none."""
    if path is None:
        return module
    modules: dict[str, nn.Module] = dict(module.named_modules())
    if path not in modules:
        children = (name for name, _ in module.named_children())
        raise KdxError(f"{type(module).__name__} has no module {path!r}.", f"Existing names: {near_names(path, modules, children)}.")
    return modules[path]
