"""The cost of a run: operations, bytes of memory and bytes on disk of each stage. docs/scale.md compares these formulas with runs.

For n images, r networks, k = r + 1 matrices with that of the target, features C x P of a network at a layer (P = h w positions), p
permutations of each of q matrices, m shares of a network's maps, and batches of b images:

    stage             operations                    bytes of memory, read or written              bytes on disk
    passes            n sum F                       4 n A EAGER_TOUCHES
    maps and scores   n b sum 2 C P + 2 p b n k     4 (5 n sum C P + 4 n b sum P) + 80 k b n      records of batches
    features                                                                                      f n sum C P
    sweeps            n^2 sum (1 + 2 m) C P         n^2/2 (8 SUMS k + 8 TRANSFORMS k (1 + q)      8 r n^2 / 2 (distances),
                                                    + 4 sum (1 + 4 m) P)                          features: f n sum C P n / side
    results                                                                                       4 n maps P, table

"Maps and scores" is the stage of the geometries batch and reference, "features" and "sweeps" are those of whole. F are the operations of a
pass (a product and a sum count as two), A the numbers that its convolutions and products write, f the bytes of a stored number. Sums are
over networks and layers. The sweeps read the features once per row of tiles of ``side`` images if they do not fit in memory,
otherwise once.

These are counts of the leading terms, not measurements: the seconds that follow from them are estimates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from kdx.choices import StoredPrecision
from kdx.kernels.set_geometry import StoredDistances
from kdx.kernels.tiles import side_for
from kdx.roles import mapped_among, maps_among, permuted_among, roles_among, score_maps_among, shares_among
from kdx.runs import schema
from kdx.runs.feature_files import FeatureFiles, Shapes

EAGER_TOUCHES = 7
"""How often PyTorch writes or reads a number that a convolution or a product writes: it computes normalisation, ReLU and sum as separate
steps."""

SUMS, TRANSFORMS = 9, 6
"""How often the first sweep reads or writes a distance for the sums, and per Fourier transform of a tile for the permutations."""

CHUNK = 4.2e-3
"""Seconds of processor time in which the maps of one kind of a batch are written, with their part of the record; measured on an Intel Xeon
as the rest that runs of tiny networks take besides the other stages (benchmarks/scale.py). One process writes all maps."""

_COLUMN_BYTES, _ID_BYTES = 16, 24
"""Bytes in samples.parquet per image and kind of map (total, strength, stability), and for its name."""


@dataclass(frozen=True)
class Cost:
    """Operations, bytes of memory that are read or written, bytes on disk that are read or written, and chunks of maps that are written."""

    operations: float = 0.0
    memory: float = 0.0
    disk: float = 0.0
    chunks: int = 0


@dataclass(frozen=True)
class SetCost:
    """The cost of the geometry ``whole`` besides the networks: bytes on disk, and operations of the sweeps."""

    bytes: int
    operations: float

    @classmethod
    def of(cls, n: int, shapes: Shapes, precision: StoredPrecision = "float32", pooled: bool = False) -> Self:
        """The cost for n images. The distances of one layer are on disk at a time, the features of all layers."""
        counts = share_counts(tuple(shapes), pooled)
        operations = sum(
            (1 + 2 * counts.get(role, 0)) * n**2 * channels * (1 if pooled else height * width)
            for role, by_layer in shapes.items()
            for channels, height, width in by_layer.values()
        )
        return cls(FeatureFiles.bytes(n, shapes, precision) + StoredDistances.bytes(n, len(shapes)), operations)


def share_counts(roles: Sequence[str], pooled: bool) -> dict[str, int]:
    """The number m of shares of each role whose maps add up to a score."""
    counts: dict[str, int] = {}
    for role, _ in () if pooled else shares_among(roles):
        counts[role] = counts.get(role, 0) + 1
    return counts


def batch_cost(n: int, shapes: Sequence[tuple[int, int]], permutations: int) -> Cost:
    """Maps and scores of one batch of n images at one layer. shapes: (channels, positions) of each network.

    Memory: features are read for norms, means and maps, and written and read once as rows; products of all pairs at all positions are
    written by the matrix product, read and written as squared differences, and read for the shares. Matrices of pairs are float64.
    """
    features = n * sum(channels * positions for channels, positions in shapes)
    pairs = n**2 * sum(positions for _, positions in shapes)
    matrices = len(shapes) + 1
    operations = 2 * n * features + 2 * permutations * n**2 * matrices
    return Cost(operations, 4 * (5 * features + 4 * pairs) + 8 * matrices * n**2 * 10)


@dataclass(frozen=True)
class Pass:
    """A pass of all networks over one image: its operations (a product and a sum count as two), and the numbers that its convolutions and
    products write."""

    operations: float
    activations: float


@dataclass(frozen=True)
class Work:
    """The work of a run, except for its geometry.

    shapes: as stored, after a projection. one_pass: of all networks over one image; None if it is not known. memory: the bytes of memory
    that can keep the features during the sweeps.
    """

    images: int
    shapes: Shapes
    batch: int
    permutations: int
    one_pass: Pass | None = None
    precision: StoredPrecision = "float32"
    pooled: bool = False
    memory: float = float("inf")

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(next(iter(self.shapes.values())))

    @property
    def roles(self) -> tuple[str, ...]:
        return roles_among(self.shapes)

    def positions(self, role: str, layer: str) -> int:
        _, height, width = self.shapes[role][layer]
        return height * width

    # ---- stages ----

    def stages(self, geometry: str) -> dict[str, Cost]:
        """The cost of each stage with a geometry, except decoding."""
        one = self.one_pass or Pass(0, 0)
        stages = {"passes": Cost(self.images * one.operations, 4 * EAGER_TOUCHES * self.images * one.activations)}
        if geometry == "whole":
            stages["features"] = Cost(disk=self.feature_bytes)
            stages["sweeps"] = self.sweeps()
        else:
            stages["maps and scores"] = self.maps_of_batches()
        return stages | {"results": Cost(disk=sum(self.result_bytes().values()), chunks=self._chunks(geometry))}

    def _chunks(self, geometry: str) -> int:
        """The chunks of maps that are written: one per batch, layer and kind."""
        images = schema.MAPS_PER_CHUNK if geometry == "whole" else self.batch
        return -(-self.images // images) * len(self.layers) * self._kinds

    @property
    def _kinds(self) -> int:
        """The number of kinds of maps at a layer."""
        return len(maps_among(self.roles)) + (0 if self.pooled else len(score_maps_among(self.roles)))

    def maps_of_batches(self) -> Cost:
        """The maps and scores of all batches."""
        size = min(self.batch, self.images)
        costs = [batch_cost(size, [self._flat(role, layer) for role in self.roles], self.permutations) for layer in self.layers]
        batches = self.images / size
        return Cost(batches * sum(cost.operations for cost in costs), batches * sum(cost.memory for cost in costs), self.record_bytes)

    def _flat(self, role: str, layer: str) -> tuple[int, int]:
        return self.shapes[role][layer][0], self.positions(role, layer)

    def sweeps(self) -> Cost:
        """Both sweeps of the geometry ``whole`` over all layers."""
        n, counts = self.images, share_counts(self.roles, self.pooled)
        matrices, permuted = len(self.roles) + 1, len(permuted_among(self.roles)) if self.permutations else 0
        memory, disk = 0.0, 0.0
        for layer in self.layers:
            memory += 8 * (SUMS * matrices + (TRANSFORMS * matrices * (1 + permuted) if permuted else 0)) * n**2 / 2
            if not self.pooled:
                memory += sum(4 * self.positions(role, layer) * (1 + 4 * counts.get(role, 0)) for role in self.roles) * n**2 / 2
            disk += self._swept_bytes(layer) + 2 * StoredDistances.bytes(n, len(self.roles))
        return Cost(SetCost.of(n, self.shapes, self.precision, self.pooled).operations, memory, disk)

    def _swept_bytes(self, layer: str) -> float:
        """The bytes of features that the sweeps over a layer read from disk: all once, and if they do not fit in memory, once per row of
        tiles in both sweeps."""
        stored = np.dtype(self.precision).itemsize
        widths = [channels * positions for channels, positions in (self._flat(role, layer) for role in self.roles)]
        total = stored * self.images * sum(widths)
        if self.pooled or total <= self.memory:
            return total
        rows_of_tiles = self.images / side_for(self.images, [4 * width for width in widths])
        return 2 * total * rows_of_tiles / 2

    # ---- sizes ----

    @property
    def feature_bytes(self) -> int:
        """The features on disk that the geometry ``whole`` needs."""
        return FeatureFiles.bytes(self.images, self.shapes, self.precision)

    @property
    def record_bytes(self) -> float:
        """The records of all batches in progress/, which are deleted when the run is complete."""
        roles, shares = self.roles, () if self.pooled else shares_among(self.roles)
        per_image = sum(8 * self.positions(role, layer) for layer in self.layers for role, _ in shares)
        permuted = 8 * len(permuted_among(roles)) * self.permutations * (len(roles) + 1) * len(self.layers)
        return self.images * (per_image + 20 * len(roles)) + -(-self.images // self.batch) * permuted

    def result_bytes(self) -> dict[str, float]:
        """The results that stay: maps before compression, and the table of images."""
        kinds = self._kinds
        maps = sum(4 * kinds * max(self.positions(role, layer) for role in mapped_among(self.roles)) for layer in self.layers)
        table = _ID_BYTES + 12 * len(self.roles) + _COLUMN_BYTES * kinds * len(self.layers)
        return {"maps": self.images * maps, "table": self.images * table}

    def disk(self, geometry: str) -> dict[str, float]:
        """The bytes on disk by kind: maps and table stay, features and scratch are deleted when the run is complete."""
        if geometry != "whole":
            return self.result_bytes() | {"features": 0, "scratch": self.record_bytes}
        results = self.result_bytes()
        scratch = StoredDistances.bytes(self.images, len(self.roles)) + results["maps"] / len(self.layers)
        return results | {"features": self.feature_bytes, "scratch": scratch}

    def growing_memory(self, geometry: str) -> float:
        """The bytes of memory that grow with the number of images: names, columns, and with ``whole`` the sums of one layer."""
        kinds = self._kinds
        # A name is a Python string of about 80 bytes, and a column of a table has 8 bytes.
        per_image = 80 + 24 * kinds * len(self.layers) + 24 * len(self.roles) + 64
        if geometry != "whole":
            return self.images * per_image
        counts = share_counts(self.roles, self.pooled)
        gradients = {role: sum(explained == role for explained, _ in maps_among(self.roles).values()) for role in self.roles}

        def sums(role: str, layer: str) -> float:
            channels, positions = self._flat(role, layer)
            return 8 * (channels * (1 + 2 * gradients[role]) + positions * (2 + 2 * counts.get(role, 0)))

        return self.images * (per_image + max(sum(sums(role, layer) for role in self.roles) for layer in self.layers))
