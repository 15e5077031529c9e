"""The geometry of one batch on a GPU: the kernels alone, the published method, and all parts of the computation in kdx."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from benchmarks import eager
from benchmarks.gpu_clock import Clock
from benchmarks.kernel_cases import Check, KernelCase, Sizes, centred, check
from kdx.data import as_pixels
from kdx.errors import KdxError
from kdx.explain import layer
from kdx.explain.batch_target import BatchTarget
from kdx.explain.layer_graphs import CudaCapture, LayerGraphs
from kdx.kernels import cuda, fused, fused_maps, geometry
from kdx.kernels.fused_shares import PositionSquares
from kdx.runtimes.transfers import Transfers
from tests.oracle import TOLERANCE, error

PERMUTATIONS = 999

GRAPH, GRAPH_BY_CLOCK = "maps and scores, one CUDA graph", "maps and scores, one CUDA graph, by the clock"
"""The names of the samples of `time_graph`."""


@dataclass(frozen=True)
class Batch:
    """The inputs of one batch. levels [n, 3, H, W] uint8 and labels [n] on the host; features [n, C, h, w] of both networks on the
    device."""

    levels: Tensor
    labels: NDArray[np.int64]
    student: Tensor
    base: Tensor
    seed: int

    @classmethod
    def drawn(cls, sizes: Sizes, device: torch.device, seed: int) -> Batch:
        """Random features that are not negative, as after a ReLU, and differ between classes."""
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
    means = torch.stack([fused_maps.means(student), fused_maps.means(base)])
    weights = fused.weights(d[[0, 1]], d[[1, 0]], d[[2, 2]], means)
    pairs = zip((student, base), weights.channel_weights, strict=True)
    maps = [fused_maps.cam(features, channel_weights) for features, channel_weights in pairs]
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


# ---- part by part, as `kdx explain` computes it ----


@dataclass(frozen=True)
class Results:
    """The results of a batch and a layer that a run stores, and the numbers that the checks read."""

    maps: dict[str, Tensor]
    shares: dict[tuple[str, str], Tensor]
    products: Tensor
    permuted: dict[str, Tensor]
    numbers: Tensor


def upload(batch: Batch, transfers: Transfers) -> Tensor:
    """The levels on the device, as pixels in [0, 1]."""
    return as_pixels(transfers.upload(batch.levels))


def target(batch: Batch, transfers: Transfers) -> BatchTarget:
    """The distances of the labels and the permutations, on their way to the device."""
    computed = BatchTarget.of(torch.from_numpy(batch.labels), PERMUTATIONS, batch.seed)
    return computed.moved(transfers.staged).moved(transfers.upload_together)


def maps_and_scores(
    batch: Batch, moved: BatchTarget, permutations: int = PERMUTATIONS, graphs: LayerGraphs | None = None
) -> layer.PendingMeasurement:
    """The measurement of the batch, which a GPU may still be computing. graphs: as in `layer.begin`."""
    features = {"student": batch.student, "base": batch.base}
    return layer.begin(features, moved.target, permutations=moved.permutations[:permutations], graphs=graphs)


def to_host(pending: layer.PendingMeasurement, transfers: Transfers) -> Results:
    """The results on the host, with the checks' numbers in the same copy."""
    measured = pending.result()
    maps = {name: value.maps.float() for name, value in measured.maps.items()}
    shares = {name: value.float() for name, value in measured.shares.items()}
    return transfers.download(Results(maps, shares, measured.products, measured.permuted, pending.numbers)).result()


def full_path(batch: Batch, transfers: Transfers, graphs: LayerGraphs) -> Results:
    """Everything except the two passes, one step after another: upload, target and permutations, maps, scores and checks, and results."""
    upload(batch, transfers)
    return to_host(maps_and_scores(batch, target(batch, transfers), graphs=graphs), transfers)


def time_batch(clock: Clock, batch: Batch) -> dict[str, list[float]]:
    """Samples of the kernels alone, and of maps and scores, on the device; by the clock, of maps and scores and of everything except the
    passes."""
    one_hot, transfers, graphs = batch.one_hot, Transfers(batch.device), LayerGraphs()
    moved = target(batch, transfers)
    pending = maps_and_scores(batch, moved)
    return {
        "geometry": clock.seconds(lambda: explained(batch.student, batch.base, one_hot)),
        "geometry and decomposition maps": clock.seconds(lambda: decomposed(batch.student, batch.base, one_hot)),
        "maps and scores, 0 permutations": clock.seconds(lambda: maps_and_scores(batch, moved, 0)),
        "maps and scores, 999 permutations": clock.seconds(lambda: maps_and_scores(batch, moved)),
        "maps and scores, by the clock": clock.wall_seconds(lambda: maps_and_scores(batch, moved)),
        "upload": clock.wall_seconds(lambda: upload(batch, transfers)),
        "target and permutations": clock.wall_seconds(lambda: target(batch, transfers)),
        "results to the host": clock.wall_seconds(lambda: to_host(pending, transfers)),
        "full path": clock.wall_seconds(lambda: full_path(batch, transfers, graphs)),
    }


def time_graph(clock: Clock, batch: Batch) -> tuple[dict[str, list[float]], Check | None, dict[str, str]]:
    """`graph_samples` as a CUDA graph; without them, the reason by their name."""
    if batch.device.type != "cuda":
        return {}, None, _no_graph("CUDA graphs need a GPU")
    if not cuda.launcher(batch.device).can_be_captured:
        return {}, None, _no_graph("PyCUDA launches the kernels")
    try:
        samples, difference = graph_samples(clock, batch, LayerGraphs(CudaCapture(batch.device)))
    except KdxError as error:  # the other figures do not need them
        return {}, None, _no_graph(error.problem)
    return samples, difference, {}


def _no_graph(reason: str) -> dict[str, str]:
    return dict.fromkeys((GRAPH, GRAPH_BY_CLOCK), reason)


def graph_samples(clock: Clock, batch: Batch, graphs: LayerGraphs) -> tuple[dict[str, list[float]], Check]:
    """Samples of the maps and scores through ``graphs``, which are captured with other features, and the largest difference of their
    results from those of single launches."""
    moved = target(batch, Transfers(batch.device))
    other = replace(batch, student=batch.base, base=batch.student)
    for _ in range(2):
        maps_and_scores(other, moved, graphs=graphs)

    def results(graphs: LayerGraphs | None) -> list[Tensor]:
        measured = maps_and_scores(batch, moved, graphs=graphs).expected
        return [measured.products, *(maps.maps for maps in measured.maps.values()), *measured.shares.values()]

    difference = check(KernelCase("a CUDA graph", lambda: results(graphs), lambda: results(None)))
    samples = {
        GRAPH: clock.seconds(lambda: maps_and_scores(batch, moved, graphs=graphs)),
        GRAPH_BY_CLOCK: clock.wall_seconds(lambda: maps_and_scores(batch, moved, graphs=graphs)),
    }
    graphs.close()
    return samples, difference


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
