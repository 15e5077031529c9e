"""Reading of weights files: safetensors, and files of ``torch.save``, of which no code runs."""

from __future__ import annotations

import _compat_pickle
import pickle
import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from kdx.disk import parse_json
from kdx.errors import KdxError, first_line
from kdx.export.graphs import Preprocessing

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".tar", ".bin")

_SAVE_AGAIN = "Save the network's state_dict() alone, because kdx runs no code of a file; copy the file again if it is damaged."

_OF_TENSORS = re.compile(r"torch\._utils\.\w+|torch\.\w+|collections\.OrderedDict|torch\.nn\.parameter\.Parameter")
"""The types and functions that make up a state dict."""

_PICKLES_BEFORE_CONTENT = 3
"""The pickles before the content in a file of PyTorch 1.5 or older: a magic number, the protocol's version, the system's sizes."""


class StandIn:
    """The place of an object in a file whose type is not one of PyTorch's. Nothing of that type is imported or runs.

    It drops everything that the object contains: what a file has besides tensors does not matter to kdx.
    """

    type_name = ""

    def __new__(cls, *_args: object, **_keywords: object) -> StandIn:
        return super().__new__(cls)

    def __init__(self, *_args: object, **_keywords: object) -> None: ...

    def __setstate__(self, _state: object) -> None: ...


def _empty_dict(*_args: object) -> dict[Any, Any]:
    return {}


def _empty_list(*_args: object) -> list[Any]:
    return []


_CONTAINERS = {"collections.defaultdict": _empty_dict, "collections.deque": _empty_list}
"""Containers that are filled after they are made, by what makes a plain one in their place."""


def read_checkpoint(path: Path) -> Any:
    """The content of a weights file: tensors, and whatever contains them. An object of another type is a `StandIn`.

    Raises KdxError for a file that is missing, has an unknown suffix, is damaged, or is not a weights file.
    """
    if path.suffix not in (".safetensors", "", *TORCH_SUFFIXES):  # mdistiller's files have no suffix
        raise KdxError(
            f"{path.name!r} is not a weights file that kdx can read.", f"Give a .safetensors file, or one of {', '.join(TORCH_SUFFIXES)}."
        )
    if not path.is_file():
        raise KdxError(
            f"There is no weights file {path}.",
            "Check the path after the @, which is relative to the models file or to the current folder.",
        )
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def read_recipe(path: Path) -> dict[str, Any]:
    """The recipe that `kdx distill` stores in a checkpoint: what its weights depend on; {} for any other file."""
    import safetensors

    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            recipe = parse_json((file.metadata() or {})["recipe"])
    except (safetensors.SafetensorError, OSError, KeyError, ValueError):  # damaged, or another program wrote it
        return {}
    return recipe if isinstance(recipe, dict) else {}


def recorded_preprocessing(path: Path) -> Preprocessing | None:
    """The preprocessing with which `kdx distill` trained the weights in ``path``; None for any other file."""
    recipe = read_recipe(path)
    try:
        height, width = recipe["size"]
        mean, std = (tuple(map(float, recipe[key])) for key in ("mean", "std"))
        return Preprocessing((int(height), int(width)), mean, std)
    except (KeyError, TypeError, ValueError):
        return None


def _read_safetensors(path: Path) -> Any:
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise KdxError(
            f"{path} cannot be read: {first_line(error)}.", "The file is damaged or not safetensors; copy or save it again."
        ) from error


def _read_torch(path: Path) -> Any:
    names = _type_names(path)
    replacements: list[Any] = [(_CONTAINERS.get(name) or type("StandIn", (StandIn,), {"type_name": name}), name) for name in names]
    try:
        with torch.serialization.safe_globals(replacements):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise RuntimeError, EOFError, KeyError, AttributeError and more
        if not isinstance(error, pickle.UnpicklingError) and "weights_only" not in str(error):
            raise KdxError(f"{path} cannot be read as tensors: {first_line(error)}.", _SAVE_AGAIN) from error
        # PyTorch's own message advises to run the file's code.
        types = ", ".join(name for name in names if name not in _CONTAINERS and not _OF_TENSORS.fullmatch(name))
        problem = f"{path} contains objects that cannot be left out, of the types {types}." if types else _damaged(path)
        raise KdxError(problem, _SAVE_AGAIN) from error


def _damaged(path: Path) -> str:
    return f"{path} is damaged, or was not written by torch.save with its default protocol."


def _type_names(path: Path) -> list[str]:
    """The names of the types and functions that the content of a ``torch.save`` file refers to, without those that the user has allowed.

    Nothing is imported. Raises KdxError for a file that torch.save did not write.
    """
    entries = torch.serialization.get_safe_globals()
    allowed = {entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}" for entry in entries}
    try:
        return [name for name in dict.fromkeys(_referred_names(path)) if name not in allowed]
    except (ValueError, OSError, RuntimeError, NotImplementedError, zipfile.BadZipFile, MemoryError, OverflowError, zlib.error) as error:
        raise KdxError(_damaged(path), _SAVE_AGAIN) from error  # a length of many gigabytes in a damaged file raises MemoryError


def _referred_names(path: Path) -> Iterator[str]:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            for _ in range(_PICKLES_BEFORE_CONTENT):
                yield from _referred(file)
            yield from _referred(file)
        return
    with zipfile.ZipFile(path) as archive:
        files = {Path(name).name: name for name in archive.namelist() if name.count("/") == 1}
        if "constants.pkl" in files:
            raise KdxError(f"{path} is a TorchScript program, not weights.", "Save the state_dict() of the network itself.")
        if "data.pkl" in files:
            with archive.open(files["data.pkl"]) as content:
                yield from _referred(content)


def _referred(file: IO[bytes]) -> Iterator[str]:
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL" and isinstance(argument, str):
            module, name = argument.split(" ", 1)
            module, name = _compat_pickle.NAME_MAPPING.get((module, name), (_compat_pickle.IMPORT_MAPPING.get(module, module), name))
            yield f"{module}.{name}"


def left_out(content: Any) -> Iterator[str]:
    """The names of the types whose objects were left out, in the order of the file."""
    if isinstance(content, StandIn):
        yield content.type_name
    if isinstance(content, Mapping):
        for value in content.values():
            yield from left_out(value)
