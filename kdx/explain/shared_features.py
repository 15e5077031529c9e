"""Outputs of networks on disk, so that runs with the same teacher and base on the same images compute them once.

FOLDER/NETWORK/PASS.pt     the logits and features of one pass; PASS is a hash of the pixels
FOLDER/NETWORK/PASS.lock   locked while a process computes the pass, so that other processes wait for it instead of computing it as well
FOLDER/runtime.json        the runtime that computed the first pass, which the runtime ``auto`` keeps

NETWORK is a hash of everything else that the outputs depend on: the weights, the model reference, the source files of a user's own network
(`kdx.models.source_code`), the preprocessing, the layers, the runtime and its version, the device, the precision and the images per pass.
The stored outputs are therefore those that the network would compute again, to the last digit.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdx.disk import lock_file, log, parse_json, replacing, unwritable, write_atomic
from kdx.errors import KdxError, first_line
from kdx.runtimes.runner import NetworkOutputs

_PACKAGES = ("kdx", "torch", "onnxruntime", "openvino", "tensorrt")
_UNREADABLE = (OSError, EOFError, RuntimeError, KeyError, pickle.UnpicklingError)
"""What `torch.load` raises for a file that is missing, cut off or damaged."""


class SharedFeatures:
    """The outputs of networks under ``folder``. Several processes may use it at once, and a killed one leaves nothing that is wrong.

    Passes are stored as long as the folder takes less space than is free on its disk and can be written; other passes are computed each
    time.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(folder, error) from error
        self.folder = folder
        self.bytes = sum(path.stat().st_size for path in folder.rglob("*.pt"))
        """The size of the stored passes, without those that other processes add meanwhile."""
        self._is_full = False

    def outputs(self, network: str, images: str, compute: Callable[[], NetworkOutputs], device: torch.device) -> NetworkOutputs:
        """The outputs of a network (`network_key`) for images (`pixels_key`): the stored ones on ``device``, or those of ``compute``."""
        path = self.folder / network / f"{images}.pt"
        stored = _read(path, device)
        if stored is not None:
            return stored
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(path.with_suffix(".lock"), wait=True):
            stored = _read(path, device)
            if stored is not None:  # another process has computed it meanwhile
                return stored
            outputs = compute()
            self._write(path, outputs)
            return outputs

    def _write(self, path: Path, outputs: NetworkOutputs) -> None:
        size = sum(value.nbytes for value in (outputs.logits, *outputs.features.values()))
        if self.bytes + size > shutil.disk_usage(self.folder).free:
            if not self._is_full:
                log.warning("%s takes half of the free space: further passes of the teacher and the base are not shared.", self.folder)
            self._is_full = True
            return
        try:
            with replacing(path) as temporary, temporary.open("wb") as file:
                torch.save({"logits": outputs.logits, "features": outputs.features}, file)
        except (KdxError, RuntimeError) as error:  # PyTorch raises RuntimeError where the disk is full
            log.warning("%s is not shared: %s", path, error.problem if isinstance(error, KdxError) else first_line(error))
            return
        self.bytes += path.stat().st_size

    def runtime(self) -> str | None:
        """The runtime of the first pass; None if there was none."""
        path = self.folder / "runtime.json"
        return str(parse_json(path.read_text("utf-8"))) if path.exists() else None

    def keep_runtime(self, runtime: str) -> None:
        """Record the runtime, unless one is recorded."""
        if self.runtime() is None:
            write_atomic(self.folder / "runtime.json", json.dumps(runtime).encode())

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read(path: Path, device: torch.device) -> NetworkOutputs | None:
    if not path.exists():
        return None
    try:
        # Mapped: a run that stores its own copy of the features reads each value once.
        content = torch.load(path, map_location=device, mmap=True, weights_only=True)
        return NetworkOutputs(content["logits"], content["features"])
    except _UNREADABLE as error:
        log.warning("%s cannot be read and is computed again: %s", path, error)
        return None


def network_key(description: Mapping[str, Any]) -> str:
    """The name of a network's folder, from a description in JSON's types and the versions and number of threads of this process."""
    known = {**description, "threads": torch.get_num_threads(), "versions": {name: _version(name) for name in _PACKAGES}}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def pixels_key(images: Tensor) -> str:
    """A hash of the pixels [n, 3, h, w], their number type and their shape."""
    digest = hashlib.sha256(f"{images.dtype} {tuple(images.shape)}".encode())
    digest.update(images.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
