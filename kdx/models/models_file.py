"""The models file (TOML): the networks of a distillation by reference, with their layers, classes, preprocessing and training."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from torch import nn

from kdx.choices import COVER, NO_BASE, Interpolation, ResizeMode, Resizing
from kdx.disk import parse_toml, write_atomic
from kdx.errors import KdxError, first_line
from kdx.export.graphs import Preprocessing
from kdx.models.layer_pairs import LayerNames
from kdx.models.network import Network, load, untrained
from kdx.models.prepared import prepared, unwrapped
from kdx.roles import READING_ORDER

T = TypeVar("T")


@dataclass(frozen=True)
class ModelsFile:
    """The contents of a models file. Base and teacher are optional. resizing: how images are brought to the networks' size.

    data, fingerprint, split_seed: the data that the networks were trained on, by reference and by content (`Dataset.fingerprint`), and
    the seed of their split. used: a NumPy file beside this one with the keys of the images that were used to fit or to choose the weights
    (`Dataset.image_keys`). Each is None where the file does not state it; files of kdx 0.1.0 have neither fingerprint nor used.
    """

    path: Path
    base: str | None
    student: str
    teacher: str | None = None
    layers: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    data: str | None = None
    fingerprint: str | None = None
    split_seed: int | None = None
    used: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    resizing: Resizing = COVER
    targets: str | None = None
    """What relevance is measured against in place of one-hot labels, as ``kdx explain --target`` takes it. Files are relative to this."""

    @property
    def references(self) -> dict[str, str]:
        """The reference of each role that the file names: teacher, base, student."""
        references = {role: getattr(self, role) for role in READING_ORDER}
        return {role: reference for role, reference in references.items() if reference is not None}

    def with_base(self, base: str | None) -> ModelsFile:
        """The same file without its base for ``none``, and unchanged for None. Raises KdxError for any other text."""
        if base is None:
            return self
        if base != NO_BASE:
            raise KdxError(
                f"The base cannot be {base!r} here.", "Give none, which leaves the base out, or name another base in the models file."
            )
        return replace(self, base=None)

    def load(self, role: str) -> Network:
        """The network of a role (teacher, base, student), with weights relative to the file and the file's preprocessing if it has one.

        Raises KdxError for a base or a teacher that the file does not name.
        """
        if role not in READING_ORDER:
            raise ValueError(f"role is one of {READING_ORDER}, not {role!r}")
        if role not in self.references:
            raise _missing_role(self.path, role)
        return self._prepared(load(self.references[role], classes=len(self.classes) or None, folder=self.path.parent))

    def untrained(self, seed: int, role: str = "student") -> Network:
        """The architecture of a role with random weights (`kdx.models.untrained`) and the file's preprocessing."""
        return self._prepared(untrained(self.references[role], seed=seed, classes=len(self.classes) or None, folder=self.path.parent))

    def _prepared(self, network: Network) -> Network:
        return replace(network, preprocessing=self.preprocessing or network.preprocessing, resizing=self.resizing)


def load_any(model: str) -> tuple[Network, tuple[str, ...]]:
    """The network of a model reference or of ``MODELS.toml:ROLE``, and the names of its classes; without a models file these are ()."""
    if model.endswith(".toml"):
        raise KdxError(f"The models file {model} names several networks.", f"Name one of them: {model}:student.")
    path, colon, role = model.rpartition(":")
    if not (colon and path.endswith(".toml")):
        return load(model), ()
    if role not in READING_ORDER:
        raise KdxError(f"{role!r} in {model!r} is not a role.", f"Choose one of: {', '.join(READING_ORDER)}.")
    file = read_models(path)
    return file.load(role), file.classes


def as_network(network: str | Path | Network | nn.Module) -> Network:
    """A network in eval mode that belongs to the caller: a model reference or ``MODELS.toml:ROLE`` is loaded, and an object is copied,
    because its owner decides its mode and device. `kdx.models.prepared.prepared` describes the copy. A bare module has no preprocessing.
    """
    if isinstance(network, nn.Module):
        network = Network(type(unwrapped(network)).__name__, network, Preprocessing())
    if isinstance(network, Network):
        return replace(network, module=prepared(network.module))
    return load_any(str(network))[0]


def read_models(path: Path | str) -> ModelsFile:
    """Read a models file (TOML).

    ``student`` is a model reference. Optional keys are ``base`` and ``teacher`` (model references), ``layers`` (a list of ``layer``,
    ``student_layer=teacher_layer``, or tables such as ``{student = "layer4", teacher = "blocks.9"}``), ``classes`` (a list of names),
    ``targets`` (a file of class embeddings, or another target of ``kdx explain --target``), and the tables ``[preprocessing]`` (size,
    mean, std, resize, interpolation), ``[data]`` (reference, fingerprint, split_seed, used) and ``[training]`` (anything). kdx 0.1.0 wrote
    split_seed as seed. Raises KdxError for a file that is missing, is not TOML, lacks the student, or has any other key.
    """
    path = Path(path)
    try:
        content = parse_toml(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else first_line(error)
        raise KdxError(
            f"The models file {path} cannot be read: {reason}.", "Give the models.toml that kdx distill wrote, or write one."
        ) from error
    _only_keys(path, "", content, (*READING_ORDER, "layers", "classes", "targets", "preprocessing", "data", "training"))
    if "student" not in content:
        raise _missing_role(path, "student")
    data = _table(path, content, "data", ("reference", "fingerprint", "split_seed", "used", "seed"))
    seed = "split_seed" if "split_seed" in data else "seed"
    return ModelsFile(
        path,
        base=_reference(path, content, "base"),
        student=_check(path, "student", content["student"], str),
        teacher=_reference(path, content, "teacher"),
        layers=_layers(path, content),
        classes=_strings(path, content, "classes"),
        preprocessing=_preprocessing(path, content),
        data=None if "reference" not in data else _check(path, "data.reference", data["reference"], str),
        fingerprint=None if "fingerprint" not in data else _check(path, "data.fingerprint", data["fingerprint"], str),
        split_seed=None if seed not in data else _check(path, f"data.{seed}", data[seed], int),
        used=None if "used" not in data else _check(path, "data.used", data["used"], str),
        training=_check(path, "training", content.get("training", {}), dict),
        resizing=_resizing(path, content),
        targets=_reference(path, content, "targets"),
    )


def write_models(
    path: Path | str,
    *,
    base: str | None = None,
    student: str,
    teacher: str | None = None,
    layers: Sequence[str] = (),
    classes: Sequence[str] = (),
    targets: str | None = None,
    preprocessing: Preprocessing | None = None,
    data: str | None = None,
    fingerprint: str | None = None,
    split_seed: int | None = None,
    used: str | None = None,
    training: Mapping[str, Any] | None = None,
    resizing: Resizing = COVER,
) -> ModelsFile:
    """Write a models file atomically and return its contents, as ``read_models`` reads them. Entries that are None are left out."""
    lines = [f"{role} = {_toml(value)}" for role, value in zip(READING_ORDER, (teacher, base, student), strict=True) if value is not None]
    lines += [f"{key} = {_toml(list(values))}" for key, values in (("layers", layers), ("classes", classes)) if values]
    lines += [f"targets = {_toml(targets)}"] if targets is not None else []
    values: dict[str, Any] = {}
    if preprocessing is not None:
        values = {"size": preprocessing.size, "mean": preprocessing.mean, "std": preprocessing.std}
    if resizing != COVER:
        values |= {"resize": resizing.mode, "interpolation": resizing.interpolation}
    lines += _toml_table("preprocessing", values)
    lines += _toml_table("data", {"reference": data, "fingerprint": fingerprint, "split_seed": split_seed, "used": used})
    lines += _toml_table("training", training or {})
    path = Path(path)
    write_atomic(path, ("\n".join(lines) + "\n").encode())
    return read_models(path)


def _missing_role(path: Path, role: str) -> KdxError:
    return KdxError(f"The models file {path} names no {role}.", f'Add a line such as {role} = "timm:resnet18@w.pt".')


def _only_keys(path: Path, table: str, content: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(known)}."
            raise KdxError(f"The models file {path} has an unknown key {table}{key!r}.", hint)


def _check(path: Path, key: str, value: Any, kind: type[T]) -> T:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise KdxError(f"{key!r} in the models file {path} is not {_KINDS[kind]}.", "See the example of a models file in the README.")
    return value


_KINDS: dict[type, str] = {str: "text", int: "a whole number", dict: "a table", list: "a list"}


def _strings(path: Path, content: Mapping[str, Any], key: str) -> tuple[str, ...]:
    return tuple(_check(path, key, value, str) for value in _check(path, key, content.get(key, []), list))


def _reference(path: Path, content: Mapping[str, Any], role: str) -> str | None:
    return _check(path, role, content[role], str) if role in content else None


def _layers(path: Path, content: Mapping[str, Any]) -> tuple[str, ...]:
    """The layers as text. A table has a layer per role."""
    layers = []
    for layer in _check(path, "layers", content.get("layers", []), list):
        names = layer if isinstance(layer, dict) else {"": layer}
        named = {role: _check(path, "layers", name, str) for role, name in names.items()}
        layers.append(str(LayerNames.of(named)) if isinstance(layer, dict) else layer)
    return tuple(layers)


def _table(path: Path, content: Mapping[str, Any], key: str, known: Sequence[str]) -> dict[str, Any]:
    table: dict[str, Any] = _check(path, key, content.get(key, {}), dict)
    _only_keys(path, f"{key}.", table, known)
    return table


def _preprocessing(path: Path, content: Mapping[str, Any]) -> Preprocessing | None:
    table = _table(path, content, "preprocessing", ("size", "mean", "std", "resize", "interpolation"))
    if not table.keys() & {"size", "mean", "std"} and ("preprocessing" not in content or table):
        return None  # each network's own
    size: Any = table.get("size")
    mean: Any = table.get("mean", [0.0])
    std: Any = table.get("std", [1.0])
    valid = size is None or (isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size))
    for values in (mean, std):
        valid = valid and isinstance(values, list) and len(values) in (1, 3) and all(isinstance(value, (int, float)) for value in values)
    if not valid or 0 in std:
        raise KdxError(
            f"The table [preprocessing] of the models file {path} is not valid.",
            "Write size = [height, width], and mean and std with one number or one per channel, where no std is 0.",
        )
    return Preprocessing(None if size is None else (size[0], size[1]), tuple(map(float, mean)), tuple(map(float, std)))


def _resizing(path: Path, content: Mapping[str, Any]) -> Resizing:
    table = content.get("preprocessing", {})
    chosen = {"mode": table.get("resize", "cover"), "interpolation": table.get("interpolation", "bicubic")}
    for key, choices in (("mode", get_args(ResizeMode)), ("interpolation", get_args(Interpolation))):
        if chosen[key] not in choices:
            raise KdxError(f"The models file {path} has an unknown resize {chosen[key]!r}.", f"Choose one of: {', '.join(choices)}.")
    return Resizing(**chosen)


def _toml_table(name: str, values: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{key if re.fullmatch(r'[A-Za-z0-9_-]+', key) else _toml(key)} = {_toml(value)}"
        for key, value in values.items()
        if value is not None
    ]
    return ["", f"[{name}]", *lines] if lines else []


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(float(value))  # float() because NumPy's repr contains the type; Python's inf and nan are valid TOML
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml(str(key))} = {_toml(item)}" for key, item in value.items() if item is not None) + "}"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML has JSON's escapes, and also requires one for DEL
    return str(int(value))
