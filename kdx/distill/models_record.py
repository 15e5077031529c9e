"""The models file of a finished distillation, which records how its networks were trained and how accurate they are."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdx.data.dataset import located
from kdx.disk import write_atomic
from kdx.distill import loop
from kdx.distill.networks import Distillation
from kdx.distill.pairing import Pair
from kdx.distill.settings import ADDED_LATER
from kdx.models import models_file

USED_IMAGES = "used_images.npy"


def write_models_file(path: Path, distillation: Distillation, pairs: Sequence[Pair], probe: int | None) -> None:
    """Measure the accuracies on the test split, and write the models file and the keys of the used images beside it."""
    settings, test = distillation.settings, distillation.images["test"]
    accuracies = {}
    for role in ("teacher", "base", "student") if distillation.has_base else ("teacher", "student"):
        accuracy, _ = loop.evaluate(distillation.graph(distillation.trained_network(role)), test, distillation.device)
        accuracies[f"{role}_accuracy"] = round(accuracy, 6)
    models_file.write_models(
        path,
        teacher=str(distillation.teacher.with_weights("teacher.safetensors")),
        base=str(distillation.student.with_weights("base.safetensors")) if distillation.has_base else None,
        student=str(distillation.student.with_weights("student.safetensors")),
        layers=[pair[0] if pair[0] == pair[1] else "=".join(pair) for pair in pairs],
        classes=distillation.dataset.classes,
        preprocessing=distillation.preprocessing,
        data=located(distillation.dataset.reference),
        fingerprint=distillation.dataset.fingerprint,
        split_seed=settings.split_seed,
        used=_write_used_images(distillation),
        training={
            **{
                key: value
                for key, value in vars(settings).items()
                if key not in ("split_seed", "image_size", "max_unreadable", "resizing", "save_minutes", *ADDED_LATER) and value is not None
            },
            **settings.later_entries(),
            **accuracies,
            "test_images": len(test),
            "unreadable_images": len(distillation.unreadable),
            **_logged_probe(distillation, probe),
        },
        resizing=settings.resizing,
    )


def _logged_probe(distillation: Distillation, probe: int | None) -> dict[str, str | int]:
    """The entries about the scores of probe images: the file beside the models file that has them, and the number of images."""
    file = distillation.folder / "student.csv"
    if not probe or not file.exists():  # the student may have been finished by a run without a probe
        return {}
    return {"probe": file.name, "probe_images": min(probe, len(distillation.images["validation"]))}


def _write_used_images(distillation: Distillation) -> str | None:
    """Write the keys of the images of train and validation, by which `kdx explain` recognises them in other folders; the file's name.

    None for data whose images share files.
    """
    keys = distillation.dataset.image_keys
    if keys is None:
        return None
    content = io.BytesIO()
    np.save(content, np.unique(np.concatenate([keys[distillation.images[name].indices] for name in ("train", "validation")])))
    write_atomic(distillation.folder / USED_IMAGES, content.getvalue())
    return USED_IMAGES
