"""The teacher's outputs for the training images: computed in every step, or once, in memory or into files that every student reads."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from kdx.data.dataset import Indices
from kdx.disk import lock_file, unwritable
from kdx.distill.data import CACHE_BYTES
from kdx.distill.losses import Observed, Outputs
from kdx.distill.networks import Distillation
from kdx.distill.number_formats import autocast
from kdx.distill.settings import TrainingSettings
from kdx.errors import KdxError

TeacherOutputs = Callable[[Tensor, Tensor], Outputs]
"""The teacher's outputs for images [n, 3, H, W] and their positions [n] among the training images."""

_ROWS = 256

Rows = np.ndarray[Any, Any]
"""Outputs of the teacher of one kind, [images, ...]."""


def check_cache(settings: TrainingSettings, cache: Path | None) -> None:
    """Raise KdxError for a folder that cannot store the teacher's outputs, before a teacher is trained: augmentation changes the images, so
    that the outputs for an image differ from epoch to epoch, or the folder cannot be written."""
    if cache is None:
        return
    if settings.images_vary:
        raise KdxError(
            "The teacher's outputs cannot be stored, because augmentation changes the images in every epoch.",
            "Leave out the augmentation, or --teacher-cache.",
        )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        if not (cache.is_dir() and any(cache.glob("[!.]*"))):  # a folder that is only read may contain what is needed
            raise unwritable(cache, error) from error


def teacher_outputs(distillation: Distillation, teacher: Observed, weights_hash: str, cache: Path | None) -> TeacherOutputs:
    """The teacher's outputs without gradients, from files in ``cache`` if there is such a folder.

    Without a folder they are computed once and kept in memory if images do not change, if they take fewer bytes than ``CACHE_BYTES``,
    and if every process would otherwise compute more of them. `check_cache` has accepted the folder.
    """
    teacher.graph.eval()
    settings = distillation.settings
    if cache is not None:
        return StoredOutputs(distillation, teacher, StoredOutputs.location(distillation, teacher, weights_hash, cache))
    if settings.images_vary or settings.epochs <= distillation.processes.count:
        return partial(_computed, teacher)
    stored: list[TeacherOutputs] = []

    def in_memory(images: Tensor, positions: Tensor) -> Outputs:
        if not stored:  # a student that is finished never gets here
            fits = _bytes_per_image(distillation, teacher) * len(distillation.images["student"]) < CACHE_BYTES
            stored.append(StoredOutputs(distillation, teacher) if fits else partial(_computed, teacher))
        return stored[0](images, positions)

    return in_memory


def _computed(teacher: Observed, images: Tensor, _positions: Tensor) -> Outputs:
    with torch.no_grad():
        return teacher(images)


class StoredOutputs:
    """The teacher's outputs for all training images: one array [images, ...] per logits, feature and pre-activation.

    They are in memory, or in files that are written once, as a whole, by the first process, and read through memory maps: float32, or
    float64 for a network in it. Batches are always the same, so that a training that is resumed computes the same outputs. These differ
    by rounding from those of other batches.
    """

    def __init__(self, distillation: Distillation, teacher: Observed, folder: Path | None = None) -> None:
        self._distillation, self._teacher = distillation, teacher
        self._count = len(distillation.images["student"])
        if folder is None:
            self._arrays = self._in_memory()
        else:
            if distillation.processes.is_main and not folder.is_dir():
                try:
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    # Another training may be writing the same outputs. The folder may also be OUT, whose .lock this process has locked.
                    with lock_file(folder.parent / ".teacher.lock", wait=True):
                        if not folder.is_dir():
                            self._write(folder)
                except OSError as error:
                    raise unwritable(folder, error) from error
            distillation.processes.wait()
            self._arrays = {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}
        self._head = _outputs(distillation, teacher, distillation.images["student"].first(2)[0]).head if teacher.requirements.head else None

    def __call__(self, _images: Tensor, positions: Tensor) -> Outputs:
        """The stored rows of these images."""
        rows, device = positions.cpu().numpy(), self._distillation.device
        arrays = {name: torch.from_numpy(array[rows]).to(device) for name, array in self._arrays.items()}

        def numbered(kind: str) -> tuple[Tensor, ...]:
            count = sum(name.startswith(f"{kind}-") for name in arrays)
            return tuple(arrays[f"{kind}-{index}"] for index in range(count))

        return Outputs(arrays["logits"], numbered("features"), numbered("pre_activations"), self._head)

    @staticmethod
    def location(distillation: Distillation, teacher: Observed, weights_hash: str, cache: Path) -> Path:
        """``cache``/KEY.

        The key contains what the outputs depend on: the weights, the images in their order and how they are prepared, the layers, and the
        number format.
        """
        requirements = teacher.requirements
        images, preprocessing = distillation.images["student"], distillation.preprocessing
        parts: dict[str, Any] = {
            "architecture": str(distillation.teacher.with_weights(None)),
            "weights": weights_hash,
            "data": distillation.dataset.fingerprint,
            "images": hashlib.sha256(np.ascontiguousarray(images.indices).tobytes()).hexdigest(),
            "preprocessing": [preprocessing.size, preprocessing.mean, preprocessing.std],
            "resizing": [distillation.settings.resizing.mode, distillation.settings.resizing.interpolation],
            "layers": teacher.graph.layers,
            "pre_activations": requirements.pre_activations,
            "precision": distillation.settings.precision,
        }
        return cache / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def _write(self, folder: Path) -> None:
        """Write the files in order, because a full disk would end a process that writes to a memory map without any message."""
        for leftover in folder.parent.glob(f".{folder.name}.*"):  # of a killed process
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            with ExitStack() as stack:
                files: dict[str, IO[bytes]] = {}
                for _, outputs in self._by_chunk():
                    for name, rows in outputs.items():
                        if name not in files:
                            files[name] = stack.enter_context((temporary / f"{name}.npy").open("wb"))
                            header = np.lib.format.header_data_from_array_1_0(rows) | {"shape": (self._count, *rows.shape[1:])}
                            np.lib.format.write_array_header_1_0(files[name], header)
                        files[name].write(rows.data)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _in_memory(self) -> dict[str, Rows]:
        arrays: dict[str, Rows] = {}
        for positions, outputs in self._by_chunk():
            for name, rows in outputs.items():
                arrays.setdefault(name, np.empty((self._count, *rows.shape[1:]), rows.dtype))[positions] = rows
        return arrays

    def _by_chunk(self) -> Iterator[tuple[Indices, dict[str, Rows]]]:
        """Consecutive positions and the outputs for them, which are zeros for images that cannot be read."""
        for positions in np.array_split(np.arange(self._count), math.ceil(self._count / min(_ROWS, self._distillation.settings.batch))):
            outputs, kept = _of_images(self._distillation, self._teacher, positions)
            computed = {name: tensor.cpu().numpy()[: len(kept)] for name, tensor in _named(outputs).items()}
            all_rows = {name: np.zeros((len(positions), *array.shape[1:]), array.dtype) for name, array in computed.items()}
            for name, array in computed.items():
                all_rows[name][kept - positions[0]] = array
            yield positions, all_rows


def _bytes_per_image(distillation: Distillation, teacher: Observed) -> int:
    outputs = _outputs(distillation, teacher, distillation.images["student"].first(2)[0])
    return sum(tensor[0].nbytes for tensor in _named(outputs).values())


def _of_images(distillation: Distillation, teacher: Observed, positions: Indices) -> tuple[Outputs, Indices]:
    """The computed outputs for the images that can be read, at least one, and the positions of these images."""
    images, _, kept = distillation.images["student"].read(positions)
    if not len(kept):  # networks need not take zero images; the rows of one that can be read are not used
        images = distillation.images["student"].first(1)[0]
    return _outputs(distillation, teacher, images), kept


def _outputs(distillation: Distillation, teacher: Observed, images: Tensor) -> Outputs:
    with torch.no_grad(), autocast(distillation.settings, distillation.device):
        return teacher(images.to(distillation.device)).wide()


def _named(outputs: Outputs) -> dict[str, Tensor]:
    """The tensors with one row per image, by the names of their files."""
    named = {"logits": outputs.logits}
    for kind, tensors in (("features", outputs.features), ("pre_activations", outputs.pre_activations)):
        named |= {f"{kind}-{index}": tensor for index, tensor in enumerate(tensors)}
    return named
