"""Imputation of 32 images of 224 x 224 with half of the pixels kept, compared with sparse direct solvers.

The first solver is scipy.sparse.linalg.spsolve with default settings, one image after the other, from the equations to the three
solutions. The second is the best of SciPy's SuperLU: the matrices are assembled beforehand, the ordering and the floating type are the
fastest that it offers for these masks, and it runs on one core or with one thread per core. kdx is timed as a whole, from images to
images. A mask is the top half of a random map of side x side, resized bilinearly as saliency maps are. A map as large as the image keeps
pixels at random.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.linalg import splu, spsolve
from torch import Tensor

from benchmarks.comparison import Comparison, Run, Work, require_agreement
from kdx.kernels import ambient
from kdx.kernels.imputation import impute

IMAGES, SIDE, SHARE, NEIGHBOURS = 32, 224, 0.5, 8
TOLERANCE, TOLERANCE_SINGLE = 1e-4, 1e-3
"""Largest difference of an imputed pixel from spsolve's solution: for kdx, and for a direct solution, which may be in float32."""


@dataclass(frozen=True)
class Ordering:
    """Settings of SuperLU: a column ordering, the mode for symmetric matrices, and single or double precision."""

    columns: str
    symmetric: bool
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.columns}{', symmetric mode' if self.symmetric else ''}, {self.dtype}"

    def solve(self, system: System) -> NDArray[Any]:
        """The imputed pixels [unknown, c] of one image."""
        options = {"SymmetricMode": True, "DiagPivotThresh": 0.0} if self.symmetric else {}
        matrix, right = system.matrix.astype(self.dtype), system.right.astype(self.dtype)
        pixels: NDArray[Any] = splu(matrix, permc_spec=self.columns, options=options).solve(right)
        return pixels


ORDERINGS = [
    Ordering(columns, symmetric, dtype)
    for columns, symmetric in (("MMD_AT_PLUS_A", True), ("MMD_AT_PLUS_A", False), ("MMD_ATA", False), ("COLAMD", False))
    for dtype in ("float64", "float32")
]


@dataclass(frozen=True)
class System:
    """The equations of one image: a matrix [unknown, unknown], and right sides [unknown, c], which the kept pixels contribute."""

    matrix: sparse.csc_array
    right: NDArray[np.float64]

    @classmethod
    def of(cls, image: Tensor, kept: Tensor) -> System:
        pixels, unknown = image.double().flatten(1).numpy().T, ~kept.numpy()
        side = len(unknown)
        place: NDArray[np.int64] = np.arange(unknown.size).reshape(unknown.shape)
        rows, columns, weights = [], [], []
        for y, x in ((0, 1), (1, 0), (1, 1), (1, -1)):
            here = place[: side - y, max(0, -x) : side - max(0, x)].ravel()
            there = here + y * side + x
            rows += [here, there]
            columns += [there, here]
            weights += [np.full(2 * here.size, 1 / 12 if y and x else 1 / 6)]
        coupled = sparse.csr_array((np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))), shape=(unknown.size,) * 2)
        own = sparse.diags_array(coupled.sum(1)[unknown.ravel()])
        part = coupled[unknown.ravel()]
        right = np.ascontiguousarray(part[:, ~unknown.ravel()] @ pixels[~unknown.ravel()])
        return cls(sparse.csc_array(own - part[:, unknown.ravel()]), right)


def draw(side: int) -> tuple[Tensor, Tensor]:
    """Images, and masks that are cut from maps of this side."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(IMAGES, 3, SIDE, SIDE, generator=generator)
    coarse = torch.rand(IMAGES, 1, side, side, generator=generator)
    maps = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")[:, 0].flatten(1)
    highest = maps.argsort(dim=1, descending=True)[:, : round(SHARE * maps.shape[1])]
    return images, torch.zeros_like(maps, dtype=torch.bool).scatter(1, highest, True).reshape(-1, SIDE, SIDE)


def fastest(systems: list[System]) -> Ordering:
    """The ordering with the least time for one of the first three images."""

    def seconds(ordering: Ordering) -> float:
        times = []
        for system in systems[:3]:
            start = time.perf_counter()
            ordering.solve(system)
            times.append(time.perf_counter() - start)
        return min(times)

    return min(ORDERINGS, key=seconds)


def comparison(_: Path, *, side: int) -> Comparison:
    images, kept = draw(side)

    def assembled() -> tuple[Ordering, list[System]]:
        systems = [System.of(image, mask) for image, mask in zip(images, kept, strict=True)]
        return fastest(systems), systems

    def spsolved() -> list[NDArray[Any]]:
        solutions = []
        for image, mask in zip(images, kept, strict=True):
            system = System.of(image, mask)
            solutions.append(spsolve(system.matrix, system.right))
        return solutions

    def on_one_core(_: ExitStack) -> Run:
        ordering, systems = assembled()
        return lambda: [ordering.solve(system) for system in systems]

    def on_all_cores(resources: ExitStack) -> Run:
        ordering, systems = assembled()
        pool = resources.enter_context(ThreadPoolExecutor(torch.get_num_threads()))
        return lambda: list(pool.map(ordering.solve, systems))

    @ambient.neutral()  # as the functions of salient features, which call `impute`
    def by_kdx() -> list[NDArray[Any]]:
        return [imputed[:, ~mask].numpy().T for imputed, mask in zip(impute(images, kept), kept, strict=True)]

    return Comparison(
        {
            "spsolve": lambda _: spsolved,
            "SuperLU, fastest ordering": on_one_core,
            "SuperLU, one thread per core": on_all_cores,
            "kdx": lambda _: by_kdx,
        },
        _check,
        # The products and sums of each unknown pixel's equation, once; pixels are read and written.
        lambda: Work(2.0 * NEIGHBOURS * images[:, :, 0, 0].numel() * (1 - SHARE) * SIDE**2, 2.0 * images.nbytes),
    )


def _check(results: Mapping[str, list[NDArray[Any]]]) -> dict[str, float]:
    """The largest difference of each variant's pixels from those of spsolve."""
    expected = results["spsolve"]
    figures = {
        f"a pixel of {name}": float(np.max([np.abs(image - known).max() for image, known in zip(actual, expected, strict=True)]))
        for name, actual in results.items()
        if actual is not expected
    }
    require_agreement({name: value for name, value in figures.items() if name.endswith("kdx")}, TOLERANCE)
    require_agreement(figures, TOLERANCE_SINGLE)
    return figures
