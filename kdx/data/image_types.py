"""The types of image files that Pillow decodes here, by suffix, and those that need another package."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Set
from functools import cache

from PIL import Image, ImageFile

_PLUGINS = {"pillow_heif": "register_heif_opener", "pillow_avif": None, "pillow_jxl": None}
"""Packages that add types to Pillow, and the function to call if importing the package is not enough."""

NEEDS = {
    **dict.fromkeys((".heic", ".heif", ".hif"), "pillow-heif"),
    **dict.fromkeys((".avif", ".avifs"), "pillow-avif-plugin"),
    ".jxl": "pillow-jxl-plugin",
}
"""The package that makes Pillow decode a type, for types that it may not decode by itself."""

OTHER = frozenset(
    (
        ".svg",
        ".svgz",
        ".eps",
        ".wmf",
        ".emf",
        ".dng",
        ".cr2",
        ".cr3",
        ".nef",
        ".arw",
        ".raf",
        ".orf",
        ".rw2",
        ".exr",
        ".hdr",
        ".jxr",
        ".xcf",
    )
)
"""Types of images that Pillow does not decode with any of these packages."""

_NOT_DECODED = ("MPEG", "EPS", "WMF")
"""Formats that Pillow lists although it only identifies the files, or draws them by another program, or draws them on Windows only."""


@cache
def decodable_suffixes() -> frozenset[str]:
    """The lower-case suffixes of all files that Pillow decodes here, with its plugins that are installed: ``.jpg``, ``.gif``, ..."""
    for package, function in _PLUGINS.items():
        if importlib.util.find_spec(package):
            module = importlib.import_module(package)
            if function is not None:
                getattr(module, function)()
    return frozenset(suffix.lower() for suffix, name in Image.registered_extensions().items() if _is_decoded(name))


def _is_decoded(name: str) -> bool:
    """Whether Pillow decodes a format, instead of only identifying or writing it."""
    factory = Image.OPEN[name][0] if name in Image.OPEN and name not in _NOT_DECODED else None
    return factory is not None and not (isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile))


def is_image_type(suffix: str) -> bool:
    """Whether files with this lower-case suffix are images, decodable or not."""
    return suffix in decodable_suffixes() or suffix in NEEDS or suffix in OTHER


def decoding_hint(suffixes: Set[str]) -> str:
    """How to make images of types that are not decoded readable: install packages, or convert the files."""
    packages = sorted({NEEDS[suffix] for suffix in suffixes if suffix in NEEDS})
    return f"Install {' and '.join(packages)}, or convert the files to PNG." if packages else "Convert the files to PNG."
