"""The geometry of one batch on a GPU: by the kernels alone, by the published method, and as kdx computes it around them, part by part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from benchmarks import eager
from benchmarks.gpu_clock import Clock
from benchmarks.kernel_cases import Check, Sizes, centred
from kdx.explain import layer
from kdx.features.target import Target
from kdx.kernels import fused, geometry
from kdx.kernels.fused_shares import PositionSquares
from kdx.scores import uncertainty
from tests.oracle import TOLERANCE, error

PERMUTATIONS = 999


@dataclass(frozen=True)
class Batch:
    """The inputs of one batch. levels [n, 3, H, W] uint8 and labels [n] on the host; features [n, C, h, w] of both networks elsewhere."""

    levels: Tensor
    labels: NDArray[np.int64]
    student: Tensor
    base: Tensor
    seed: int

    @classmethod
    def drawn(cls, sizes: Sizes, device: torch.device, seed: int) -> Batch:
        """Random features, which are not negative, as after a ReLU, and differ between classes."""
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(sizes.images) % sizes.classes
        shape = (sizes.images, *sizes.explained)
        student, base = (
            torch.randn(shape, generator=generator).add_(labels[:, None, None, None] / sizes.classes).relu_() for _ in range(2)
        )
        levels = torch.randint(0, 256, (sizes.images, 3, *sizes.picture), generator=generator, dtype=torch.uint8)
        if device.type == "cuda":
            levels = levels.pin_memory()
        return cls(levels, labels.numpy(), student.to(device), base.to(device), seed)

    @property
    def device(self) -> torch.device:
        return self.student.device

    @property
    def one_hot(self) -> Tensor:
        return functional.one_hot(torch.from_numpy(self.labels)).float().to(self.device)


def explained(student: Tensor, base: Tensor, target: Tensor) -> list[Tensor]:
    """Everything that the kernels compute from features [n, C, H, W] of two networks and a target [n, e].

    Returns the channel weights of the distilled and of the residual maps [2, n, C], their scores [2], every inner product, and both maps.
    """
    return _explained(student, base, torch.stack([fused.distances(centred(values)) for values in (student, base, target)]))


def _explained(student: Tensor, base: Tensor, d: Tensor) -> list[Tensor]:
    means = torch.stack([fused.means(student), fused.means(base)])
    weights = fused.weights(d[[0, 1]], d[[1, 0]], d[[2, 2]], means)
    pairs = zip((student, base), weights.channel_weights, strict=True)
    maps = [fused.cam(features, channel_weights) for features, channel_weights in pairs]
    return [weights.channel_weights, weights.score, fused.products(d[None]).inner, *maps]


def decomposed(student: Tensor, base: Tensor, target: Tensor) -> list[Tensor]:
    """The results of `explained`, and the shares [n, H W] of both networks in their inner products with the target."""
    positions = [PositionSquares.of(features.flatten(2)) for features in (student, base)]
    matrix = fused.distances(centred(target))
    d = torch.stack([*(each.distances.float() for each in positions), matrix])
    centred_matrix = geometry.u_centered(matrix.double())[None]
    shares = [each.shares(centred_matrix, [slice(0, len(student))])[0, 0] for each in positions]
    return [*_explained(student, base, d), *shares]


def published(student: Tensor, base: Tensor, target: Tensor) -> Tensor:
    """The channel weights [2, n, C] of both maps by the published method, with one call per map."""
    return torch.stack([eager.published_geometry(x, y, target)[0] for x, y in ((student, base), (base, student))])


def compare(student: Tensor, base: Tensor, target: Tensor) -> Check:
    """Compare the channel weights of `explained` with those of `published`, whose float32 differences and backward pass also round."""
    actual, expected = explained(student, base, target)[0], published(student, base, target)
    return Check("the published method", error(actual.cpu(), expected.cpu()), 10 * TOLERANCE["float32"])


# ---- part by part ----


def upload(batch: Batch) -> Tensor:
    """The levels on the device, as pixels in [0, 1]."""
    return batch.levels.to(batch.device, non_blocking=True).float().div_(255)


def target(batch: Batch) -> tuple[Target, Tensor]:
    """The target and the table of permutations on the device."""
    labels = torch.from_numpy(batch.labels).to(batch.device)
    return Target.of(labels).checked(), uncertainty.permutation_table(len(labels), PERMUTATIONS, batch.seed, batch.device)


def results(measurement: layer.LayerMeasurement) -> list[Any]:
    """What a run stores of a measurement, on the host: maps, shares, and inner products."""
    maps = [value.maps.float().numpy(force=True) for value in measurement.maps.values()]
    shares = [value.float().numpy(force=True) for value in measurement.shares.values()]
    permuted = [value.numpy(force=True) for value in measurement.permuted.values()]
    return [*maps, *shares, measurement.products.numpy(force=True), *permuted]


def full_path(batch: Batch) -> list[Any]:
    """Everything beside the two passes: upload, target and permutations, checks, maps, scores, and results on the host."""
    upload(batch)
    batch_target, table = target(batch)
    return results(layer.measure({"student": batch.student, "base": batch.base}, batch_target, permutations=table))


def time_batch(clock: Clock, batch: Batch) -> dict[str, list[float]]:
    """Samples of the kernels alone (by the clock's device), and of everything beside the passes (wall-clock), part by part."""
    one_hot, features = batch.one_hot, {"student": batch.student, "base": batch.base}
    batch_target, table = target(batch)
    without = table[:0]
    measured = layer.measure(features, batch_target, permutations=table)
    return {
        "geometry": clock.seconds(lambda: explained(batch.student, batch.base, one_hot)),
        "geometry and decomposition maps": clock.seconds(lambda: decomposed(batch.student, batch.base, one_hot)),
        "maps and scores, 0 permutations": clock.seconds(lambda: layer.measure(features, batch_target, permutations=without)),
        "maps and scores, 999 permutations": clock.seconds(lambda: layer.measure(features, batch_target, permutations=table)),
        "upload": clock.wall_seconds(lambda: upload(batch)),
        "target and permutations": clock.wall_seconds(lambda: target(batch)),
        "results to the host": clock.wall_seconds(lambda: results(measured)),
        "full path": clock.wall_seconds(lambda: full_path(batch)),
    }


def time_published(clock: Clock, batch: Batch, memory: int) -> tuple[dict[str, list[float]], int, Check]:
    """Samples of the published method and of the kernels on the same images, on as many as fit into ``memory``; the number of these images;
    and the difference of the results."""
    n, image_bytes = len(batch.student), batch.student[0].nbytes
    # All differences exist five times at once (`eager.published`), beside the memory that PyTorch keeps.
    few = next((n // divisor for divisor in (1, 2, 4, 8, 16) if 6 * (n // divisor) ** 2 * image_bytes < memory), n // 16)
    student, base, one_hot = batch.student[:few], batch.base[:few], batch.one_hot[:few]
    difference = compare(student, base, one_hot)
    samples = {
        "published": clock.seconds(lambda: published(student, base, one_hot)),
        "geometry beside published": clock.seconds(lambda: explained(student, base, one_hot)),
    }
    return samples, few, difference
