"""Model references: SOURCE:NAME[,key=value,...][@weights[#key]]."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from kdx.errors import KdxError

_GRAMMAR = (
    "Write SOURCE:NAME[,key=value,...][@weights[#key]], for example timm:resnet18,num_classes=10@student.safetensors, "
    "or the path of a .pt2 file."
)

NEW_HEAD = "new_head"
"""The argument of every source for weights whose last layer is for other classes. It belongs to kdx, and no network receives it."""

LOGITS = "logits"
"""The argument of every source that states which output of the network is the logits: a place in a tuple, or a name. It belongs to kdx."""

Value = bool | int | float | str | tuple[int, ...]


@dataclass(frozen=True)
class ModelReference:
    """The parts of a model reference; ``str`` joins them again. A program has the source ``pt2``, and its path as the name."""

    source: str
    name: str
    arguments: Mapping[str, Value] = field(default_factory=dict)
    weights: str | None = None

    def __str__(self) -> str:
        arguments = "".join(f",{key}={_format_value(value)}" for key, value in self.arguments.items())
        source = "" if self.source == "pt2" else f"{self.source}:"
        return f"{source}{self.name}{arguments}" + (f"@{self.weights}" if self.weights else "")

    @property
    def is_trained(self) -> bool:
        """Whether the reference names existing weights: a file, a library's, or a checkpoint's.

        True for a factory, which may have loaded some.
        """
        if self.source in ("timm", "torchvision", "kdx", "hf") and self.weights is None:
            return bool(self.arguments.get("pretrained", self.source == "hf"))
        return True

    @property
    def has_new_head(self) -> bool:
        """Whether the last layer starts with random weights."""
        return self.arguments.get(NEW_HEAD, False) is not False

    def with_classes(self, classes: int) -> ModelReference:
        """The reference with the number of classes as an argument, if its source has such an argument and the reference does not set it."""
        key = {"timm": "num_classes", "torchvision": "num_classes", "kdx": "classes", "hf": "num_labels"}.get(self.source)
        if key is None or key in self.arguments:
            return self
        return replace(self, arguments={**self.arguments, key: classes})

    def with_weights(self, weights: str | None) -> ModelReference:
        """The reference to the same architecture with other weights, without ``pretrained``, so that nothing is downloaded, and without
        ``new_head``, which belongs to the replaced weights."""
        arguments = {key: value for key, value in self.arguments.items() if key not in ("pretrained", NEW_HEAD)}
        return replace(self, arguments=arguments, weights=weights)

    def located(self, folder: Path | None = None) -> ModelReference:
        """The reference with the absolute path of the file or folder that it names. A relative path starts at ``folder``, by default the
        current folder."""
        path = (folder or Path()) / Path(self.name).expanduser()
        if self.source == "pt2" or (self.source == "hf" and (self.name.startswith((".", "/", "~")) or path.is_dir())):
            return replace(self, name=str(path.resolve()))
        return self


def parse_reference(reference: str) -> ModelReference:
    """The parts of ``SOURCE:NAME[,key=value,...][@weights]``, or of a path that ends in .pt2; KdxError if it is neither.

    A value is true or false, an int, a float, whole numbers joined by hyphens (``3-4-6-3``, a tuple), or text.
    """
    head, _, weights = reference.strip().partition("@")
    if head.endswith(".pt2"):
        return ModelReference("pt2", head, {}, weights or None)
    source, colon, rest = head.partition(":")
    name, *pairs = (part.strip() for part in rest.split(","))
    if not (source and colon and name) or (not weights and reference.rstrip().endswith("@")):
        raise KdxError(f"{reference!r} is not a model reference.", _GRAMMAR)
    arguments: dict[str, Value] = {}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not key.isidentifier() or not value or key in arguments:
            raise KdxError(f"{pair!r} in the model reference {reference!r} is not key=value, or repeats a key.", _GRAMMAR)
        arguments[key] = _parse_value(value)
    return ModelReference(source, name, arguments, weights or None)


def _parse_value(text: str) -> Value:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"\d+(-\d+)+", text):
        return tuple(int(part) for part in text.split("-"))
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _format_value(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def file_name(reference: str) -> str:
    """A file name for files made from a model, without a suffix: ``timm:resnet18,num_classes=10@runs/s.safetensors`` -> ``resnet18-s``."""
    parsed = parse_reference(reference)
    name = {"pt2": Path(parsed.name).stem, "hf": Path(parsed.name).name}.get(parsed.source, parsed.name)
    if parsed.weights is not None:
        weights, _, key = parsed.weights.partition("#")
        name = f"{name}-{Path(weights).stem}" + (f"-{key}" if key else "")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
