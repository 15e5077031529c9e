"""Imputation of 32 images of 224 x 224 with half of the pixels kept, against sparse direct solvers.

First scipy.sparse.linalg.spsolve as it comes, an image after the other, from its equations to its three right sides. Then the best of
SciPy's SuperLU: its matrices assembled beforehand, the fastest of the orderings and types of number that it offers for these masks,
on one core and with a thread a core. kdx is timed whole, from images to images. A mask is the top half of a random map of side x side
resized bilinearly, as saliency maps are; of a map as large as the image it keeps pixels at random.
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

from benchmarks.subject import Run, Subject, Work, demand_agreement
from kdx.kernels.imputation import impute

IMAGES, SIDE, SHARE, NEIGHBOURS = 32, 224, 0.5, 8
WITHIN, WITHIN_SINGLE = 1e-4, 1e-3
"""Of spsolve's solution, every imputed pixel: kdx's, and that of a direct solution which may be in float32."""


@dataclass(frozen=True)
class Ordering:
    """How SuperLU goes about it: a column ordering, its mode for symmetric matrices, and single or double precision."""

    columns: str
    symmetric: bool
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.columns}{', symmetric mode' if self.symmetric else ''}, {self.dtype}"

    def solve(self, system: System) -> NDArray[Any]:
        """The imputed pixels [unknown, c] of an image."""
        options = {"SymmetricMode": True, "DiagPivotThresh": 0.0} if self.symmetric else {}
        matrix, right = system.matrix.astype(self.dtype), system.right.astype(self.dtype)
        found: NDArray[Any] = splu(matrix, permc_spec=self.columns, options=options).solve(right)
        return found


ORDERINGS = [
    Ordering(columns, symmetric, dtype)
    for columns, symmetric in (("MMD_AT_PLUS_A", True), ("MMD_AT_PLUS_A", False), ("MMD_ATA", False), ("COLAMD", False))
    for dtype in ("float64", "float32")
]


@dataclass(frozen=True)
class System:
    """The equations of one image: a matrix [unknown, unknown] and what the kept pixels add on the right [unknown, c]."""

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
    """Images and masks, cut from maps of this side."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(IMAGES, 3, SIDE, SIDE, generator=generator)
    coarse = torch.rand(IMAGES, 1, side, side, generator=generator)
    maps = torch.nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")[:, 0].flatten(1)
    highest = maps.argsort(dim=1, descending=True)[:, : round(SHARE * maps.shape[1])]
    return images, torch.zeros_like(maps, dtype=torch.bool).scatter(1, highest, True).reshape(-1, SIDE, SIDE)


def fastest(systems: list[System]) -> Ordering:
    """By the best of three images."""

    def seconds(ordering: Ordering) -> float:
        found = []
        for system in systems[:3]:
            start = time.perf_counter()
            ordering.solve(system)
            found.append(time.perf_counter() - start)
        return min(found)

    return min(ORDERINGS, key=seconds)


def subject(_: Path, *, side: int) -> Subject:
    images, kept = draw(side)

    def assembled() -> tuple[Ordering, list[System]]:
        systems = [System.of(*each) for each in zip(images, kept, strict=True)]
        return fastest(systems), systems

    def spsolved() -> list[NDArray[Any]]:
        found = []
        for image, mask in zip(images, kept, strict=True):
            system = System.of(image, mask)
            found.append(spsolve(system.matrix, system.right))
        return found

    def in_turn(_: ExitStack) -> Run:
        ordering, systems = assembled()
        return lambda: [ordering.solve(system) for system in systems]

    def on_threads(held: ExitStack) -> Run:
        ordering, systems = assembled()
        pool = held.enter_context(ThreadPoolExecutor(torch.get_num_threads()))
        return lambda: list(pool.map(ordering.solve, systems))

    def by_kdx() -> list[NDArray[Any]]:
        return [found[:, ~mask].numpy().T for found, mask in zip(impute(images, kept), kept, strict=True)]

    return Subject(
        {
            "spsolve": lambda _: spsolved,
            "the fastest ordering": in_turn,
            "the same, a thread a core": on_threads,
            "kdx": lambda _: by_kdx,
        },
        _alike,
        # Of a pixel's equation every product and sum, once for each that is not kept; pixels read and written.
        lambda: Work(2.0 * NEIGHBOURS * images[:, :, 0, 0].numel() * (1 - SHARE) * SIDE**2, 2.0 * images.nbytes),
    )


def _alike(results: Mapping[str, list[NDArray[Any]]]) -> dict[str, float]:
    direct = results["spsolve"]
    figures = {
        f"a pixel of {name}": float(np.max([np.abs(one - known).max() for one, known in zip(found, direct, strict=True)]))
        for name, found in results.items()
        if found is not direct
    }
    demand_agreement({name: value for name, value in figures.items() if name.endswith("kdx")}, WITHIN)
    demand_agreement(figures, WITHIN_SINGLE)
    return figures
