"""The source code of a user's own networks: stored results depend on it as well as on the weights."""

from __future__ import annotations

import hashlib
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from torch import nn

from kdx.models.reference import parse_reference
from kdx.models.sources import SOURCES


def code_hash(reference: str, module: nn.Module) -> str | None:
    """The SHA-256, in hexadecimal, of the source files that define a network; None where all its code belongs to installed packages.

    reference: the model reference, or any text. The files are that of the factory that the reference names, and those of the classes of all
    submodules. Packages in site-packages are left out, because their versions are recorded elsewhere. Modules that these files import, and
    files that a function reads, are not part of the hash.
    """
    files = sorted({path for path in _files(reference, module) if _is_own(path)})
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _files(reference: str, module: nn.Module) -> Iterator[Path]:
    source = reference.partition(":")[0]
    if source not in SOURCES and source in sys.modules:
        yield from _file(sys.modules[parse_reference(reference).source])
    for kind in {type(part) for part in module.modules()}:
        known = sys.modules.get(kind.__module__)
        if known is not None and kind.__module__.partition(".")[0] != "kdx":
            yield from _file(known)


def _file(module: ModuleType) -> Iterator[Path]:
    name = inspect.getsourcefile(module) if hasattr(module, "__file__") and module.__file__ else None
    if name is not None and (path := Path(name).resolve()).is_file():
        yield path


def _is_own(path: Path) -> bool:
    """Whether a file belongs neither to Python nor to an installed package."""
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False
    return not path.is_relative_to(Path(sysconfig.get_paths()["stdlib"]).resolve())
