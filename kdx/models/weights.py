"""Weights files: safetensors, and PyTorch files that contain tensors only."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdx.errors import KdxError, first_line


def load_weights(module: nn.Module, path: Path) -> None:
    """Copy a weights file into ``module``. Raises KdxError if the file is missing, unreadable, or belongs to another network."""
    weights = _read_weights(path)
    expected = module.state_dict()
    # Old files lack the batch counters of BatchNorm, which no prediction uses.
    missing = [name for name in expected if name not in weights and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in weights if name not in expected]
    differing = [
        f"{name} is {list(weights[name].shape)} in the file and {list(tensor.shape)} in the network"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    faults = [_excerpt("it lacks", missing), _excerpt("it also has", unexpected), _excerpt("shapes differ:", differing)]
    if any(faults):
        raise KdxError(
            f"{path} does not contain this network's weights: {'; '.join(filter(None, faults))}.",
            "Name the architecture the weights were saved from, with its arguments (such as the number of classes).",
        )
    module.load_state_dict(weights, strict=False)


def _excerpt(heading: str, items: Sequence[str], count: int = 3) -> str:
    if not items:
        return ""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return f"{heading} {', '.join(items[:count])}{more}"


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise KdxError(f"{path.name!r} is not a weights file that kdx can read.", "Give a .safetensors, .pt or .pth file.")
    if not path.is_file():
        raise KdxError(
            f"There is no weights file {path}.",
            "Check the path after the @, which is relative to the models file or to the current folder.",
        )
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise KdxError(
            f"{path} does not contain a state dict.", "Save the network's state_dict(), by itself or under the key state_dict or model."
        )
    parallel = all(name.startswith("module.") for name in loaded)  # saved from a DataParallel wrapper
    return {name.removeprefix("module.") if parallel else name: value for name, value in loaded.items()}


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
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise KdxError(
            f"{path} cannot be read as tensors: {first_line(error)}.",
            "Save only the state dict, because kdx does not unpickle objects; copy the file again if it is damaged.",
        ) from error
