"""The teacher's outputs for the training images, computed in every step or once, into files that every student reads."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from kdx.disk import lock_file, unwritable
from kdx.distill.losses import Observed, Outputs
from kdx.distill.networks import Distillation
from kdx.distill.number_formats import autocast
from kdx.errors import KdxError

TeacherOutputs = Callable[[Tensor, Tensor], Outputs]
"""The teacher's outputs for images [n, 3, H, W] and their positions [n] among the training images."""

_ROWS = 256


def teacher_outputs(distillation: Distillation, teacher: Observed, weights_hash: str, cache: Path | None) -> TeacherOutputs:
    """The teacher's outputs without gradients, from files in ``cache`` if there is such a folder.

    Raises KdxError if augmentation changes the images, because the outputs for an image then differ from epoch to epoch.
    """
    teacher.graph.eval()
    if cache is None:

        def computed(images: Tensor, _positions: Tensor) -> Outputs:
            with torch.no_grad():
                return teacher(images)

        return computed
    if distillation.settings.images_vary:
        raise KdxError(
            "The teacher's outputs cannot be stored, because augmentation changes the images in every epoch.",
            "Leave out the augmentation, or --teacher-cache.",
        )
    return StoredOutputs(distillation, teacher, weights_hash, cache)


class StoredOutputs:
    """The teacher's outputs for all training images, in ``cache``/KEY: one array [images, ...] per logits, feature and pre-activation.

    The key contains what the outputs depend on: the weights, the images in their order and how they are prepared, the layers, and the
    number format. Files are float32, or float64 for a network in it, and are read through memory maps. They are written once, as a
    whole, by the first process. Outputs differ by rounding from those of other batches.
    """

    def __init__(self, distillation: Distillation, teacher: Observed, weights_hash: str, cache: Path) -> None:
        self._distillation, self._teacher = distillation, teacher
        self.folder = cache / self._key(weights_hash)
        if distillation.processes.is_main and not self.folder.is_dir():
            try:
                cache.mkdir(parents=True, exist_ok=True)
                with lock_file(cache / ".lock", wait=True):  # another training may be writing the same outputs
                    if not self.folder.is_dir():
                        self._write()
            except OSError as error:
                raise unwritable(self.folder, error) from error
        distillation.processes.wait()
        self._arrays = {path.stem: np.load(path, mmap_mode="r") for path in sorted(self.folder.glob("*.npy"))}
        self._head = self._outputs(np.arange(2))[0].head if teacher.requirements.head else None

    def __call__(self, _images: Tensor, positions: Tensor) -> Outputs:
        """The stored rows of these images."""
        rows, device = positions.cpu().numpy(), self._distillation.device
        arrays = {name: torch.from_numpy(array[rows]).to(device) for name, array in self._arrays.items()}

        def numbered(kind: str) -> tuple[Tensor, ...]:
            count = sum(name.startswith(f"{kind}-") for name in arrays)
            return tuple(arrays[f"{kind}-{index}"] for index in range(count))

        return Outputs(arrays["logits"], numbered("features"), numbered("pre_activations"), self._head)

    def _key(self, weights_hash: str) -> str:
        distillation, requirements = self._distillation, self._teacher.requirements
        images, preprocessing = distillation.images["student"], distillation.preprocessing
        parts: dict[str, Any] = {
            "architecture": str(distillation.teacher.with_weights(None)),
            "weights": weights_hash,
            "data": distillation.dataset.fingerprint,
            "images": hashlib.sha256(np.ascontiguousarray(images.indices).tobytes()).hexdigest(),
            "preprocessing": [preprocessing.size, preprocessing.mean, preprocessing.std],
            "resizing": [distillation.settings.resizing.mode, distillation.settings.resizing.interpolation],
            "layers": self._teacher.graph.layers,
            "pre_activations": requirements.pre_activations,
            "precision": distillation.settings.precision,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def _write(self) -> None:
        """Write the files in order, because a full disk would end a process that writes to a memory map without any message."""
        for leftover in self.folder.parent.glob(f".{self.folder.name}.*"):  # of a killed process
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{self.folder.name}.", dir=self.folder.parent))
        try:
            with ExitStack() as stack:
                count = len(self._distillation.images["student"])
                files: dict[str, IO[bytes]] = {}
                for positions in np.array_split(np.arange(count), math.ceil(count / _ROWS)):
                    outputs, kept = self._outputs(positions)
                    for name, tensor in _named(outputs).items():
                        array = tensor.cpu().numpy()
                        rows = np.zeros((len(positions), *array.shape[1:]), array.dtype)
                        rows[kept - positions[0]] = array
                        if name not in files:
                            files[name] = stack.enter_context((temporary / f"{name}.npy").open("wb"))
                            header = np.lib.format.header_data_from_array_1_0(rows) | {"shape": (count, *array.shape[1:])}
                            np.lib.format.write_array_header_1_0(files[name], header)
                        files[name].write(rows.data)
            temporary.rename(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _outputs(self, positions: np.ndarray[Any, Any]) -> tuple[Outputs, np.ndarray[Any, Any]]:
        """The computed outputs for the images that can be read, and their positions."""
        images, _, kept = self._distillation.images["student"].read(positions)
        with torch.no_grad(), autocast(self._distillation.settings, self._distillation.device):
            return self._teacher(images.to(self._distillation.device)).wide(), kept


def _named(outputs: Outputs) -> dict[str, Tensor]:
    """The tensors with one row per image, by the names of their files."""
    named = {"logits": outputs.logits}
    for kind, tensors in (("features", outputs.features), ("pre_activations", outputs.pre_activations)):
        named |= {f"{kind}-{index}": tensor for index, tensor in enumerate(tensors)}
    return named
