"""Which images an image is compared with: the choice between the geometries ``whole``, ``reference`` and ``batch``."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from kdx.data.batches import check_labels
from kdx.errors import KdxError, about
from kdx.features.arrays import check_images
from kdx.runs.cost import SetCost
from kdx.runs.feature_files import Shapes
from kdx.runs.plan import MAX_MINUTES, Plan
from kdx.runtimes.choice import is_file


@dataclass(frozen=True)
class Geometry:
    """The kind, ``whole``, ``reference`` or ``batch``, and the reason in words."""

    kind: str
    reason: str


def requested_geometry(plan: Plan) -> Geometry | None:
    """The geometry where the request leaves no choice. Raises KdxError for a request that cannot be met, and for classes of the images, of
    their batches or of the reference images that have no geometry."""
    check_labels(plan.dataset.labels[plan.indices])
    geometry = _requested(plan)
    if geometry is not None and geometry.kind == "reference":
        with about("the reference images"):
            check_images(plan.reference_count)
            check_labels(plan.dataset.labels[plan.references()])
    if geometry is not None and geometry.kind != "whole":
        _ = plan.batches
    return geometry


def _requested(plan: Plan) -> Geometry | None:
    options = plan.options
    if is_file(plan.models.path):
        if options.geometry == "whole":
            raise KdxError(
                "An explainer file compares an image only with the other images of its batch.",
                "For the geometry whole give the networks themselves, or a models file that names them.",
            )
        return Geometry("batch", "an explainer file contains the geometry of a batch")
    if options.features == "salient":
        if options.geometry == "whole":
            raise KdxError(
                "Salient features have the geometry batch or reference.", "Give --geometry batch, or choose raw features (--features raw)."
            )
        if options.geometry == "auto" and not options.reference_images:
            return Geometry("batch", "salient features are compared within a batch")
    if options.reference_images or options.geometry == "reference":
        few = f" (all that there are, instead of {options.reference_images:,})" if options.reference_images > plan.reference_count else ""
        return Geometry("reference", f"UniCAM's maps compare every image with {plan.reference_count:,} reference images{few}")
    return Geometry("batch", "as requested") if options.geometry == "batch" else None


def choose_geometry(plan: Plan, shapes: Shapes, folder: Path, shared_bytes: int = 0) -> Geometry:
    """`geometry_within` for the images of the plan, with the free space of the disk of ``folder`` and the speed of this machine.

    shared_bytes: the size of features that other runs have stored. They count as free space, so that the choice is that of a single run.
    """
    free = shutil.disk_usage(folder).free + shared_bytes + sum(file.stat().st_size for file in folder.rglob("*.npy"))
    return geometry_within(plan, shapes, len(plan.indices), free, folder, products_per_second)


def geometry_within(plan: Plan, shapes: Shapes, n: int, free: float, place: object, speed: Callable[[], float]) -> Geometry:
    """``whole`` if it was requested and the features fit on the disk; for ``auto``, ``whole`` within the limits, otherwise ``reference``.

    n: the number of images. free: the bytes of free space. place: its folder, for the error. speed: the operations per second.

    Raises KdxError, with the figures, if ``whole`` was requested and its files do not fit on the disk.
    """
    options = plan.options
    cost = SetCost.of(n, shapes, options.stored_precision, options.pooled)
    limit = free / 2 if options.max_disk is None else min(free, options.max_disk * 1e9)
    needed = f"features and distances of {n:,} images take {size_text(cost.bytes)}"
    if options.geometry == "whole":
        available = free if options.max_disk is None else limit
        if cost.bytes > available:
            bound = f"{size_text(free)} are available in {place}" if available == free else f"the limit is {size_text(limit)} (--max-disk)"
            raise KdxError(
                f"The features and distances of {n:,} images take {size_text(cost.bytes)}, and {bound}.",
                "Free some space, choose --store float16 or --project 64, or use --geometry reference.",
            )
        return Geometry("whole", f"as requested; the {needed}")
    if cost.bytes > limit:
        return Geometry("reference", f"the {needed}, and the limit is {size_text(limit)} (--max-disk)")
    minutes = cost.operations / speed() / 60
    most = MAX_MINUTES if options.max_minutes is None else options.max_minutes
    if minutes > most:
        estimate = f"the sweeps over all pairs would take about {minutes:,.0f} minutes"
        return Geometry("reference", f"{estimate}, and the limit is {most:,.0f} (--max-minutes)")
    return Geometry("whole", f"every image is compared with all others; the {needed}")


def size_text(count: float) -> str:
    """A number of bytes in words."""
    if count >= 1e12:
        return f"{count / 1e12:,.1f} TB"
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def products_per_second() -> float:
    """Operations per second of a float32 matrix product on this machine: the best of three."""
    x = torch.ones(512, 4096)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        _ = x @ x.T
        best = min(best, time.perf_counter() - start)
    return 2 * 512 * 512 * 4096 / best
