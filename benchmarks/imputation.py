"""Imputation of 32 images of 224 x 224 with half of the pixels kept, against sparse direct solvers.

First scipy.sparse.linalg.spsolve as it comes, an image after the other, from its equations to its three right sides. Then the best of
SciPy's SuperLU: its matrices assembled beforehand, the fastest of the orderings and types of number that it offers for these masks,
on one core and with a thread a core. kdx is timed whole, from images to images. Masks: the top half of a random map of 7 x 7 or
14 x 14 resized bilinearly, as saliency maps are, and pixels kept at random. Every solution is compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import sparse
from scipy.sparse.linalg import splu, spsolve
from torch import Tensor

from benchmarks.record import child, paired, quartiles, ratio, store
from kdx.kernels.imputation import impute

IMAGES, SIDE, SHARE = 32, 224, 0.5
WITHIN = 1e-4
"""Of a direct solution, every imputed pixel."""

MASKS = {"top half of a 7 x 7 map": 7, "top half of a 14 x 14 map": 14, "half at random": SIDE}
"""The side of the random map that each kind of mask is cut from."""

CASES = {"spsolve": "spsolve", "direct": "the fastest ordering", "threads": "the same, a thread a core", "kdx": "kdx"}


@dataclass(frozen=True)
class Ordering:
    """How SuperLU goes about it: a column ordering, its mode for symmetric matrices, and single or double precision."""

    columns: str
    symmetric: bool
    dtype: str

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


def measure(mask: str, rounds: int) -> dict[str, Any]:
    images, kept = draw(MASKS[mask])
    systems = [System.of(*each) for each in zip(images, kept, strict=True)]
    ordering = fastest(systems)
    imputed = impute(images, kept)
    worst = 0.0
    for found, unknown, system in zip(imputed, ~kept, systems, strict=True):
        worst = max(worst, float(np.abs(found[:, unknown].numpy().T - ORDERINGS[0].solve(system)).max()))
    if not worst < WITHIN:
        raise SystemExit(f"{mask}: a pixel is {worst:.1e} from the direct solution")

    def threads() -> None:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(ordering.solve, systems))

    def direct() -> None:
        for system in systems:
            ordering.solve(system)

    def plain() -> None:
        for image, mask in zip(images, kept, strict=True):
            system = System.of(image, mask)
            spsolve(system.matrix, system.right)

    samples = paired({"spsolve": plain, "direct": direct, "threads": threads, "kdx": lambda: impute(images, kept)}, rounds)
    return {
        "ordering": f"{ordering.columns}{', symmetric mode' if ordering.symmetric else ''}, {ordering.dtype}",
        "largest_difference": worst,
        "samples": samples,
        "ratios": {name: ratio(samples, name, "kdx") for name in CASES if name != "kdx"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--mask", choices=MASKS, help=argparse.SUPPRESS)  # the child's
    options = parser.parse_args()
    if options.mask is not None:
        print(json.dumps(measure(options.mask, options.rounds)))
        return
    module = "benchmarks.imputation"
    found = {mask: child(module, "--mask", mask, "--rounds", str(options.rounds)) for mask in MASKS}
    record = store("imputation", module, {"case": f"{IMAGES} images of 3 x {SIDE} x {SIDE}, {SHARE:.0%} kept", "masks": found})
    console = Console()
    for mask, part in found.items():
        table = Table("", "lower quartile", "median", "upper quartile", title=f"{record['case']}: {mask}", box=None)
        for name, label in CASES.items():
            table.add_row(label, *(f"{value * 1e3:.0f} ms" for value in quartiles(part["samples"][name])))
        for name, values in part["ratios"].items():
            table.add_row(f"{CASES[name]}, over kdx", *(f"{value:.1f}" for value in values))
        console.print(table)
        console.print(f"Direct: {part['ordering']}. Largest difference of a pixel: {part['largest_difference']:.1e}.\n")
    console.print(record["environment"]["processor"])


if __name__ == "__main__":
    main()
