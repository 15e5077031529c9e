"""The calls that check and time the CUDA kernels: one per wrapper, with the result that its definition gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdx.choices import ObjectiveName
from kdx.explain import layer
from kdx.features.target import Target
from kdx.kernels import decomposition, fused, fused_maps, fused_sums, geometry, imputation, moments, reference
from kdx.kernels.cuda import Backend
from kdx.kernels.fused_shares import PositionSquares
from kdx.kernels.moments import Influences
from tests.oracle import TOLERANCE, error

OBJECTIVES: tuple[ObjectiveName, ...] = ("relevance", "uniqueness")

BANDWIDTH_SHARE = 0.8
"""The goal of the kernels that mainly read: a share of a copy's bandwidth."""

IMPUTATION_TOLERANCE = 1e-4
"""Largest difference from the exact solution, for pixels in [0, 1]."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a batch.

    explained, given: the shapes (C, H, W) of the two networks' features. picture: height and width. stack: the number of matrices or
    pictures in a kernel that takes a stack of them. permutations: of the images, in a kernel that permutes them.
    """

    images: int
    explained: tuple[int, int, int]
    given: tuple[int, int, int]
    picture: tuple[int, int]
    stack: int
    classes: int
    permutations: int = 7


CHECKED = (
    Sizes(9, (5, 1, 1), (3, 2, 1), (5, 3), stack=1, classes=2),
    Sizes(19, (33, 7, 7), (11, 5, 3), (31, 33), stack=5, classes=4),
    Sizes(65, (130, 5, 3), (64, 4, 4), (20, 17), stack=2, classes=4),
)
"""Small enough for the definitions, which are slow; large enough that a residual is more than rounding, which `geometry.laplacian` sets
to zero and the definition turns into a map."""

RESNET50 = Sizes(256, (2048, 7, 7), (2048, 7, 7), (224, 224), stack=128, classes=10, permutations=999)
"""Two ResNet-50 networks at layer4."""


@dataclass(frozen=True)
class KernelCase:
    """A call of the kernels and its expected result.

    bytes: the least bytes that it must move, if it has a lower bound. library_call: the call of another library that it needs as well.
    goal: the share of a copy's bandwidth that it should reach.
    """

    name: str
    run: Callable[[], Sequence[Tensor]]
    expected: Callable[[], Sequence[Tensor]]
    tolerance: float = TOLERANCE["float32"]
    bytes: int | None = None
    library_call: Callable[[], object] | None = None
    goal: float | None = None


@dataclass(frozen=True)
class Check:
    """The largest error of a case's results, divided by the largest expected value. It holds within the tolerance."""

    name: str
    error: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return self.error <= self.tolerance  # false for NaN


def check(case: KernelCase) -> Check:
    errors = [error(actual.cpu(), expected.cpu()) for actual, expected in zip(case.run(), case.expected(), strict=True)]
    return Check(case.name, max(errors, key=lambda value: (value != value, value)), case.tolerance)  # NaN is the largest error


# ---- definitions ----


@dataclass(frozen=True)
class Batch:
    """Features x of the explained and y of the given network [n, C, H, W], the target [n, e], and their float32 distances [3, n, n]."""

    x: Tensor
    y: Tensor
    target: Tensor
    distances: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, target: Tensor) -> Batch:
        return cls(x, y, target, torch.stack([geometry.distances(values.flatten(1), torch.float32) for values in (x, y, target)]))

    def subset(self, images: Tensor) -> Batch:
        return Batch(self.x[images], self.y[images], self.target[images], self.distances[:, images][:, :, images])


@dataclass(frozen=True)
class KernelReference:
    """Functions that compute the expected results.

    distances: of float64 rows. products: inner products of float64 distances. weights: a batch's score and channel weights by an
    objective. imputed: images [n, c, h, w]. shares: of features [n, C, P], in float64, by their distances and a U-centred matrix. centred:
    U-centred matrices [k, n, n] of float64 distances. permuted: inner products [p, k] of these with one more, under permutations [p, n].
    """

    distances: Callable[[Tensor], Tensor]
    products: Callable[[Tensor], Tensor]
    weights: Callable[[Batch, ObjectiveName], tuple[Tensor, Tensor]]
    imputed: Callable[[Tensor, Tensor], Tensor]
    shares: Callable[[Tensor, Tensor, Tensor], Tensor]
    centred: Callable[[Tensor], Tensor]
    permuted: Callable[[Tensor, Tensor, Tensor], Tensor]


def _reference_products(d: Tensor) -> Tensor:
    batches = [[reference.u_centered(matrix) for matrix in batch] for batch in d.cpu()]
    return torch.stack([torch.stack([torch.stack([reference.inner(a, b) for b in batch]) for a in batch]) for batch in batches])


def _reference_weights(batch: Batch, objective: ObjectiveName) -> tuple[Tensor, Tensor]:
    score, weights, _ = reference.unicam(batch.x.cpu(), batch.y.cpu(), batch.target.cpu(), objective)
    return score, weights


def _reference_imputed(images: Tensor, kept: Tensor) -> Tensor:
    return torch.stack([reference.imputed(image, mask) for image, mask in zip(images.cpu(), kept.cpu(), strict=True)])


def _reference_shares(features: Tensor, _: Tensor, matrix: Tensor) -> Tensor:
    return reference.shares(features.cpu(), matrix.cpu())


def _reference_centred(d: Tensor) -> Tensor:
    return torch.stack([reference.u_centered(matrix) for matrix in d.cpu()])


def _reference_permuted(centred: Tensor, permuted: Tensor, table: Tensor) -> Tensor:
    rows = [[reference.inner(matrix, permuted.cpu()[order][:, order]) for matrix in centred.cpu()] for order in table.cpu()]
    return torch.tensor(rows, dtype=torch.float64)


def _closed_products(d: Tensor) -> Tensor:
    return geometry.products(geometry.u_centered(d))


def _closed_weights(batch: Batch, objective: ObjectiveName) -> tuple[Tensor, Tensor]:
    """From exactly the distances that the kernels receive: with other rounding, uniqueness may select the other of two nearly equal
    maxima."""
    d = batch.distances.double()
    a, b, g = geometry.u_centered(d)
    laplacian = geometry.laplacian(d[0], a, b, g, geometry.OBJECTIVES[objective])
    return laplacian.score, geometry.gradient(laplacian.lap, geometry.gap(batch.x))


def _torch_imputed(images: Tensor, kept: Tensor) -> Tensor:
    return imputation.impute(images.double(), kept, backend="torch")


DEFINED = KernelReference(
    reference.distances,
    _reference_products,
    _reference_weights,
    _reference_imputed,
    _reference_shares,
    _reference_centred,
    _reference_permuted,
)
IN_PYTORCH = KernelReference(
    geometry.distances,
    _closed_products,
    _closed_weights,
    _torch_imputed,
    decomposition.shares,
    geometry.u_centered,
    geometry.permuted_products,
)
"""For sizes at which the definitions do not fit into memory. The tests compare it with them."""


# ---- the cases ----


def cases(sizes: Sizes, device: torch.device, seed: int, kernel_reference: KernelReference = DEFINED) -> Iterator[KernelCase]:
    """A case for each wrapper, on inputs drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    n, (channels, height, width) = sizes.images, sizes.explained
    labels = (torch.arange(n) % sizes.classes).to(device)
    x, y = (draw(n, *shape).add_(labels[:, None, None, None]).relu_() for shape in (sizes.explained, sizes.given))
    batch = Batch.of(x, y, torch.nn.functional.one_hot(labels).float())
    yield from _distance_cases(centred(x), kernel_reference)
    orders = [torch.randperm(n, generator=generator).to(device) for _ in range(sizes.stack)]
    yield _products_case(torch.stack([batch.distances[:, order][:, :, order] for order in orders]), kernel_reference)
    table = torch.stack([torch.randperm(n, generator=generator) for _ in range(sizes.permutations)]).to(device)
    yield from _centred_cases(batch.distances.double(), labels, table, kernel_reference)
    yield _layer_case(x, y, labels, table)
    for objective in OBJECTIVES:
        yield _weights_case(batch, objective, kernel_reference)
        yield _query_case(batch, objective, kernel_reference)
    weights = draw(n, channels)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        yield _means_case(x.to(dtype))
        yield _cam_case(x.to(dtype), weights)
        yield _shares_case(x.to(dtype), batch.distances[2], kernel_reference)
    yield _imputation_case(draw(sizes.stack, 3, *sizes.picture).sigmoid(), draw(sizes.stack, height, width), kernel_reference)


def centred(features: Tensor) -> Tensor:
    """Features as rows minus their mean, as `fused.distances` takes them."""
    rows = features.flatten(1).float()
    return rows - rows.mean(0)


def _distance_cases(rows: Tensor, kernel_reference: KernelReference) -> Iterator[KernelCase]:
    n, norms = len(rows), rows.square().sum(1)
    first, second = slice(0, -(-n // 2)), slice(-(-n // 2), n)

    def tile() -> tuple[Tensor]:
        return (fused.centred_distances(rows[first], rows[second], norms[first], norms[second]),)

    yield KernelCase(
        "pairwise",
        lambda: (fused.distances(rows),),
        lambda: (kernel_reference.distances(rows.double()),),
        bytes=6 * 4 * n * n,
        library_call=lambda: rows @ rows.T,
    )
    yield KernelCase(
        "pairwise, a tile",
        tile,
        lambda: (kernel_reference.distances(rows.double())[first, second],),
        bytes=2 * 4 * (n // 2) * -(-n // 2),
        library_call=lambda: rows[first] @ rows[second].T,
    )


def _products_case(d: Tensor, kernel_reference: KernelReference) -> KernelCase:
    def expected() -> tuple[Tensor]:
        return (kernel_reference.products(d.double()),)

    return KernelCase("products", lambda: (fused.products(d).inner,), expected, bytes=d.nbytes, goal=BANDWIDTH_SHARE)


def _centred_cases(d: Tensor, labels: Tensor, table: Tensor, kernel_reference: KernelReference) -> Iterator[KernelCase]:
    """The U-centred matrices of float64 distances [k, n, n], and the results that are computed from these."""
    centred = geometry.u_centered(d)
    count, n, _ = d.shape
    rows = centred.reshape(count * n, n)

    def influences() -> tuple[Tensor, ...]:
        return _tensors(fused_sums.influences(centred))

    yield KernelCase(
        "products, centred",
        lambda: (fused_sums.u_centered(d, fused.products(d[None])),),
        lambda: (kernel_reference.centred(d),),
        bytes=3 * d.nbytes,
    )
    yield KernelCase(
        "permuted",
        lambda: (fused_sums.permuted_products(centred, centred[-1], table),),
        lambda: (kernel_reference.permuted(centred, centred[-1], table),),
        bytes=d.nbytes + table.nbytes + 8 * len(table) * count,
    )
    yield KernelCase(
        "permuted, labels",
        lambda: (fused_sums.permuted_label_products(centred, labels, table),),
        lambda: (kernel_reference.permuted(centred, geometry.u_centered(2**0.5 * (labels[:, None] != labels).double()), table),),
        bytes=d.nbytes + table.nbytes + 8 * len(table) * count,
    )
    # The PyTorch geometry computes the influences from sums of rows, and its tests leave out images.
    yield KernelCase(
        "influences",
        influences,
        lambda: _tensors(moments.matrix_influences(centred)),
        bytes=8 * n * n * (count + count**2 + count * (count + 1) // 2),
        library_call=lambda: rows @ rows.T,
    )


def _layer_case(x: Tensor, y: Tensor, labels: Tensor, table: Tensor) -> KernelCase:
    """The maps, channel weights and inner products of two networks at a layer, as `kdx explain` computes them, against float64."""

    def measured(features: Mapping[str, Tensor], backend: Backend) -> list[Tensor]:
        result = layer.measure(features, Target.of(labels), table, layer.LayerMethod(shares=False), backend=backend)
        maps = [part.double() for value in result.maps.values() for part in (value.maps, value.weights)]
        return [*maps, result.products, *result.permuted.values()]

    features = {"student": x, "base": y}
    wide = {role: values.double() for role, values in features.items()}
    return KernelCase("a layer", lambda: measured(features, "auto"), lambda: measured(wide, "torch"))


def _tensors(influences: Influences | None) -> tuple[Tensor, ...]:
    return () if influences is None else tuple(part for part in (influences.first, influences.second) if part is not None)


def _weights_case(batch: Batch, objective: ObjectiveName, kernel_reference: KernelReference) -> KernelCase:
    means = geometry.gap(batch.x)

    def run() -> tuple[Tensor, Tensor]:
        d, given, target = batch.distances[:, None]
        weights = fused.weights(d, given, target, means[None], objective)
        return weights.score[0], weights.channel_weights[0]

    moved = batch.distances.nbytes + 2 * means.nbytes
    return KernelCase(f"weights, {objective}", run, lambda: kernel_reference.weights(batch, objective), bytes=moved)


def _query_case(batch: Batch, objective: ObjectiveName, kernel_reference: KernelReference) -> KernelCase:
    """The last images as queries, each placed among the first images."""
    n, device = len(batch.x), batch.x.device
    m = max(5, n // 2)
    means = geometry.gap(batch.x)
    inside, border = batch.distances[:, :m, :m].contiguous(), batch.distances[:, m:, :m].contiguous()

    def run() -> tuple[Tensor, Tensor]:
        among, to = (inside[0], inside[1], inside[2]), (border[0], border[1], border[2])
        weights = fused.query_weights(among, to, means[m:], means[:m], objective)
        return weights.score, weights.channel_weights

    def expected() -> tuple[Tensor, Tensor]:
        references = torch.arange(m, device=device)
        sets = (torch.cat([references, torch.tensor([query], device=device)]) for query in range(m, n))
        scores, weights = zip(*(kernel_reference.weights(batch.subset(images), objective) for images in sets), strict=True)
        return torch.stack(scores), torch.stack([query_weights[-1] for query_weights in weights])

    moved = inside.nbytes + border.nbytes + means.nbytes + means[m:].nbytes
    return KernelCase(f"weights of queries, {objective}", run, expected, bytes=moved)


def _means_case(features: Tensor) -> KernelCase:
    kind = str(features.dtype).removeprefix("torch.")
    moved = features.nbytes + 8 * features.shape[0] * features.shape[1]
    expected = lambda: (features.double().mean((2, 3)),)  # noqa: E731
    return KernelCase(f"means, {kind}", lambda: (fused_maps.means(features),), expected, bytes=moved, goal=BANDWIDTH_SHARE)


def _cam_case(features: Tensor, weights: Tensor) -> KernelCase:
    def expected() -> tuple[Tensor]:
        return (torch.einsum("nc,nchw->nhw", weights.double(), features.double()).relu(),)

    n, _, height, width = features.shape
    moved = features.nbytes + weights.nbytes + 4 * n * height * width
    kind = str(features.dtype).removeprefix("torch.")
    # The features are exact in their own type, and everything after them is float32.
    return KernelCase(f"cam, {kind}", lambda: (fused_maps.cam(features, weights),), expected, bytes=moved, goal=BANDWIDTH_SHARE)


def _shares_case(features: Tensor, target: Tensor, kernel_reference: KernelReference) -> KernelCase:
    """Without a lower bound: the time is that of float32 operations, whose rate no copy shows."""
    flat = features.flatten(2)
    matrix = geometry.u_centered(target.double())

    def run() -> tuple[Tensor, Tensor]:
        positions = PositionSquares.of(flat)
        return positions.distances, positions.shares(matrix[None], [slice(0, len(flat))])[0, 0]

    def expected() -> tuple[Tensor, Tensor]:
        distances = kernel_reference.distances(flat.double().flatten(1))
        return distances, kernel_reference.shares(flat.double(), distances, matrix)

    kind = str(features.dtype).removeprefix("torch.")
    return KernelCase(f"shares, {kind}", run, expected)


def _imputation_case(images: Tensor, saliency: Tensor, kernel_reference: KernelReference) -> KernelCase:
    """Half of each picture is kept, as the upper half of a saliency map is."""
    relevance = torch.nn.functional.interpolate(saliency[:, None], images.shape[2:], mode="bilinear")[:, 0].flatten(1)
    kept = (relevance >= relevance.median(1, keepdim=True).values).unflatten(1, images.shape[2:])

    def run() -> tuple[Tensor]:
        return (imputation.impute(images, kept, backend="cuda"),)

    return KernelCase("imputation", run, lambda: (kernel_reference.imputed(images, kept),), IMPUTATION_TOLERANCE)
