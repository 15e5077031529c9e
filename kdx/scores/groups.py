"""FSS and RS of single classes and of groups of images.

A class is compared with the rest, and a group is a set of images by itself:

- *Relevance of a class c*, such as RS(S) and RS(S|B): the target is the column "class c against the rest", over all images. It measures
  how well the features separate the class from all others. The inner products with the columns of all classes follow from sums over the
  entries within classes (`kdx.kernels.one_against_rest`).
- *Similarity in a class*, such as FSS(S,T): the images of the class alone, whose distances are centred again. It compares how the
  networks arrange the images within the class. Without a target there is no rest to compare with, and the similarity over all images is
  mainly that between classes.
- *A group*: every score on the images of the group alone, as if they were the data set.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdx.errors import KdxError
from kdx.features import arrays
from kdx.features.arrays import Labels
from kdx.features.rows import Selected, Source, rows_of
from kdx.features.target import Target
from kdx.kernels import ambient, tiles
from kdx.kernels.cuda import Backend
from kdx.kernels.moments import SINGLE_IMAGES, Influences, upper
from kdx.kernels.one_against_rest import ClassMatrices, ClassSums
from kdx.kernels.tiles import Rows
from kdx.roles import CONTRASTS, TARGET, Definition, contrast_name, contrasts_among, pairs_among, roles_among, scores_among
from kdx.scores import uncertainty
from kdx.scores.inner_products import Sampling, check_residual, inner_products
from kdx.scores.score import STATISTICS, Score, estimates

FEWEST = 5
"""A class or group needs this many images: with four, FSS has no interval."""


class GroupContrast(NamedTuple):
    """The difference of two scores of one class or group.

    value, interval: as in `kdx.Contrast`. p_value: the two-sided p-value of a difference of zero, from the same standard error as the
    interval; None if it is not known. p_adjusted: adjusted by Holm's method over all groups and layers.
    """

    value: float
    interval: tuple[float, float]
    p_value: float | None
    p_adjusted: float | None = None


@dataclass(frozen=True)
class GroupScores:
    """The scores and contrasts of one class or group, by the names of `kdx.roles`.

    n: the number of its images. ``n`` of a score is the number of images that the score compares: all of them for the relevance of a
    class. missing: for each score and contrast without a value, the reason. Scores have no p-value; a contrast has one.
    """

    n: int
    scores: dict[str, Score] = field(default_factory=dict)
    contrasts: dict[str, GroupContrast] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def __or__(self, other: GroupScores) -> GroupScores:
        """The scores of both, which are of the same group."""
        return GroupScores(self.n, self.scores | other.scores, self.contrasts | other.contrasts, self.missing | other.missing)


@ambient.neutral()
def class_scores(
    features: Mapping[str, Mapping[str, Source]],
    labels: Labels,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    backend: Backend = "auto",
) -> dict[str, dict[Any, GroupScores]]:
    """FSS and RS of every class at every layer: layer -> class -> scores.

    RS(X) and RS(X|Y) of a class are those of `kdx.rs` with the target "this class against the rest", over all images. FSS of a class is
    that of `kdx.fss` on the images of the class alone. So RS of a class states how well the features separate it from the others, and FSS
    how alike the networks arrange its images.

    features: layer -> role -> features, as in `kdx.compare`. labels [n]: integers or names; they are the keys of the result. confidence:
    of the intervals. seed: of the random parts that intervals leave out above 256 images. backend: as in `kdx.unicam`. All images are one
    set, for any n; memory grows with n and the number of classes.

    Each interval refers to one score alone. With C classes, about C/20 of the 95% intervals do not contain the true value. The p-values of
    contrasts are adjusted by Holm's method over all classes and layers (``p_adjusted``).

    A class needs 5 images; a score without a value has a reason in `GroupScores.missing`. Raises KdxError for what `kdx.compare` refuses.
    In simulations, 95% intervals of RS contained the true value in 84 to 90% of the cases for classes of 5 and 10 images out of 800, in
    92 to 94% for 20 to 50, and in 95% for 100. A low RS of a class does not mean that the network misclassifies it, and a rare class has
    a low RS, because few of all pairs of images contain it; compare networks within one class, not classes.

    >>> import numpy as np, kdx
    >>> labels = np.arange(60) % 3
    >>> student = np.eye(3)[labels] * [1, 0, 0] + np.random.default_rng(0).normal(scale=0.1, size=(60, 3))
    >>> scores = kdx.class_scores({"layer4": {"student": student}}, labels)["layer4"]
    >>> scores[0].scores["RS(S)"].value > 0.9 > 0.5 > scores[1].scores["RS(S)"].value
    True
    """
    names, codes = _codes(labels, "labels")
    sampling = Sampling("unbiased", None, 0, confidence, seed, backend)
    layers = {}
    for layer, by_role in _checked(features).items():
        rows = _rows(layer, by_role)
        _check_target(Target.of(codes, next(iter(rows.values())).shape[0]))
        named = {f"{role}'s features at {layer}": values for role, values in rows.items()}
        sums = inner_products(named, [], sampling, classes=torch.from_numpy(codes).to(_device(rows)))
        assert sums.classes is not None
        for explained, given in pairs_among(rows).values():
            check_residual(sums, [*rows].index(explained), [*rows].index(given))
        scores = of_classes(rows, sums.products, sums.influences, sums.classes, codes, sampling)
        layers[layer] = dict(zip(names, scores, strict=True))
    return adjusted_groups(layers)


@ambient.neutral()
def group_scores(
    features: Mapping[str, Mapping[str, Source]],
    target: Labels,
    groups: Sequence[Any] | Labels,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    backend: Backend = "auto",
) -> dict[str, dict[Any, GroupScores]]:
    """FSS and RS of every group of images at every layer, on the images of the group alone: layer -> group -> scores.

    groups [n]: the group of each image, as integers or names; they are the keys of the result. features, target: as in `kdx.compare`. The
    other arguments, intervals and p-values are those of `class_scores`. A score equals that of `kdx.compare` on the group's images.

    A group needs 5 images, and for RS two classes, of which one has two images. A score without a value has a reason in
    `GroupScores.missing`. Scores of two groups differ partly because their images have other classes; they are not a paired comparison.

    >>> import numpy as np, kdx
    >>> rng = np.random.default_rng(0)
    >>> student, labels, groups = rng.normal(size=(60, 8)), np.arange(60) % 3, ["day", "night"] * 30
    >>> scores = kdx.group_scores({"layer4": {"student": student}}, labels, groups)["layer4"]
    >>> scores["night"].n, sorted(scores["night"].scores)
    (30, ['RS(S)'])
    """
    names, codes = _codes(groups, "groups")
    sampling = Sampling("unbiased", None, 0, confidence, seed, backend)
    layers = {}
    for layer, by_role in _checked(features).items():
        rows = _rows(layer, by_role)
        n = next(iter(rows.values())).shape[0]
        arrays.check_same(len(codes), n, "groups", "features")
        whole = Target.of(target, n).values
        scores = (of_images(rows, index, sampling, whole[index]) for index in members(codes, len(names)))
        layers[layer] = dict(zip(names, scores, strict=True))
    return adjusted_groups(layers)


def adjusted_groups(layers: Mapping[str, Mapping[Any, GroupScores]]) -> dict[str, dict[Any, GroupScores]]:
    """The same scores with ``p_adjusted`` in every contrast: Holm's method over the p-values of the contrast in all groups and layers."""
    changed = {layer: {group: dict(scores.contrasts) for group, scores in groups.items()} for layer, groups in layers.items()}
    places: dict[str, list[tuple[dict[str, GroupContrast], float]]] = {}
    for contrasts in (contrasts for groups in changed.values() for contrasts in groups.values()):
        for name, contrast in contrasts.items():
            if contrast.p_value is not None:
                places.setdefault(name, []).append((contrasts, contrast.p_value))
    for name, tested in places.items():
        for (contrasts, _), p_adjusted in zip(tested, uncertainty.holm([p for _, p in tested]), strict=True):
            contrasts[name] = contrasts[name]._replace(p_adjusted=p_adjusted)
    return {
        layer: {group: replace(scores, contrasts=changed[layer][group]) for group, scores in groups.items()}
        for layer, groups in layers.items()
    }


def of_classes(
    rows: Mapping[str, Rows],
    products: Tensor,
    influences: Influences | None,
    classes: ClassSums | ClassMatrices,
    codes: NDArray[np.int64],
    sampling: Sampling,
) -> list[GroupScores]:
    """The scores of every class, from each role's rows of all images and what `against_rest` takes. codes [n]: the class of each image."""
    sizes = np.bincount(codes).tolist()
    relevance = against_rest(roles_among(rows), products, influences, classes, sizes, sampling.confidence)
    indices = members(codes, len(sizes))
    return [scores | of_images(rows, index, sampling) for scores, index in zip(relevance, indices, strict=True)]


def against_rest(
    roles: Sequence[str],
    products: Tensor,
    influences: Influences | None,
    classes: ClassSums | ClassMatrices,
    sizes: Sequence[int],
    confidence: float,
) -> list[GroupScores]:
    """The relevance of every class, with the target "this class against the rest", over all images.

    products [k, k], influences: of the matrices of the roles, which come first. classes: the sums of these matrices. sizes: the number of
    images of each class.
    """
    k, n = len(roles), sum(sizes)
    definitions = {name: definition for name, definition in scores_among(roles).items() if TARGET in definition.matrices}
    results: list[GroupScores] = []
    for step in classes.steps():
        own = step.products[:, [*range(k), -1]]
        count = len(own)
        whole = own.new_zeros(count, k + 1, k + 1)
        whole[:, :k, :k] = products[:k, :k]
        whole[:, k], whole[:, :, k] = own, own
        known = None
        if influences is not None and step.influences is not None:
            known = _joined(influences, step.influences, k, len(products))
        scored = _scored([*roles, TARGET], definitions, whole, known, n, confidence)
        for number, scores in enumerate(scored, len(results)):
            results.append(_of_class(sizes[number], roles, scores, n, definitions))
    return results


def _of_class(size: int, roles: Collection[str], scores: GroupScores, n: int, definitions: Collection[str]) -> GroupScores:
    if size < FEWEST:
        return _without(size, roles, definitions, _few(size))
    if n - size < FEWEST:
        return _without(size, roles, definitions, f"The rest of the class has {_few(n - size)}")
    return replace(scores, n=size)


def _few(images: int) -> str:
    return f"{images} image{'' if images == 1 else 's'}, and {FEWEST} are necessary."


def _joined(shared: Influences, own: Influences, k: int, matrices: int) -> Influences:
    """The influences [C, m, ...] on the products of k matrices and the target of each class, in the order of `upper`.

    shared: on the products of ``matrices`` matrices, of which the first k count. own [C, matrices + 1, ...]: on those with the targets.
    """
    known = {pair: place for place, pair in enumerate(zip(*(index.tolist() for index in upper(matrices)), strict=True))}
    columns = [
        (shared, known[a, b]) if b < k else (own, a if a < k else -1)
        for a, b in zip(*(index.tolist() for index in upper(k + 1)), strict=True)
    ]
    count = len(own.first)
    first = [source.first[place].expand(count, -1) if source is shared else source.first[:, place] for source, place in columns]
    if shared.second is None or own.second is None:
        return Influences(torch.stack(first, 1), None)
    second = [
        values[place].expand(count, -1, -1) if source is shared else values[:, place]
        for source, place in columns
        for values in [shared.second if source is shared else own.second]
    ]
    return Influences(torch.stack(first, 1), torch.stack(second, 1))


def of_images(rows: Mapping[str, Rows], index: Tensor, sampling: Sampling, target: Tensor | None = None) -> GroupScores:
    """The scores on the images ``index`` alone. target: theirs; without one, only the scores that need none."""
    roles, n = roles_among(rows), len(index)
    names = {role: f"{role}'s features" for role in roles}
    definitions = {name: value for name, value in scores_among(roles).items() if target is not None or TARGET not in value.matrices}
    if n < FEWEST:
        return _without(n, roles, definitions, _few(n))
    result = GroupScores(n)
    try:
        if target is not None:
            _check_target(Target.of(target))
    except KdxError as error:
        relevance = [name for name, value in definitions.items() if TARGET in value.matrices]
        result |= _without(n, roles, relevance, error.problem)
        definitions, target = {name: value for name, value in definitions.items() if name not in relevance}, None
    if not definitions:
        return result
    named: dict[str, Rows | Labels] = {
        names[role]: Selected(values, index.to(values.device), torch.device(values.device)) for role, values in rows.items()
    }
    try:
        sums = inner_products(named if target is None else {**named, TARGET: target}, [], sampling)
    except KdxError as error:
        return result | _without(n, roles, definitions, error.problem)
    for explained, given in pairs_among(roles).values() if target is not None else ():
        try:
            check_residual(sums, roles.index(explained), roles.index(given))
        except KdxError as error:
            left = [name for name, value in definitions.items() if value.matrices == (explained, TARGET, given)]
            result |= _without(n, roles, left, error.problem)
    definitions = {name: value for name, value in definitions.items() if name not in result.missing}
    known = sums.influences
    if known is not None:
        known = Influences(known.first[None], None if known.second is None else known.second[None])
    matrices = list(roles) if target is None else [*roles, TARGET]
    return result | _scored(matrices, definitions, sums.products[None], known, n, sampling.confidence)[0]


def _check_target(target: Target) -> None:
    """KdxError if all images are equally far from each other; above `SINGLE_IMAGES` images without a matrix of all of them."""
    n = len(target.values)
    if n <= SINGLE_IMAGES:
        target.checked()
    else:
        matrix = target.matrix()
        arrays.check_varied(float(tiles.Sweep([matrix]).run().products), float(matrix.scale) * n / (n - 3), 1e-8, TARGET)


def _without(n: int, roles: Collection[str], definitions: Collection[str], reason: str) -> GroupScores:
    """No value for these scores and for the contrasts of the roles that need one of them."""
    contrasts = [contrast_name(*pair) for pair in contrasts_among(roles) if set(pair) & set(definitions)]
    return GroupScores(n, missing=dict.fromkeys([*definitions, *contrasts], reason))


def _scored(
    matrices: Sequence[str],
    definitions: Mapping[str, Definition],
    products: Tensor,
    influences: Influences | None,
    n: int,
    confidence: float,
) -> list[GroupScores]:
    """The scores of c groups from their inner products [c, k, k] of these matrices and the influences on them. n: compared images."""
    place = {name: index for index, name in enumerate(matrices)}
    values, gradients = {}, {}
    for name, definition in definitions.items():
        index = torch.tensor([place[matrix] for matrix in definition.matrices], device=products.device)

        def statistic(tensor: Tensor, definition: Definition = definition, index: Tensor = index) -> Tensor:
            return STATISTICS[definition.statistic](tensor[..., index[:, None], index])

        values[name], gradients[name] = estimates(statistic, products)
    results = [GroupScores(n) for _ in products]
    for name in definitions:
        for result, value, spread in zip(results, values[name].tolist(), uncertainty.spreads(influences, gradients[name]), strict=True):
            if np.isfinite(value):
                ends = uncertainty.interval(value, spread, confidence, n=n)
                result.scores[name] = Score(value, ends, None, n, confidence=confidence)
    for more, less in (pair for pair in CONTRASTS if set(pair) <= values.keys()):
        spreads = uncertainty.spreads(influences, gradients[more] - gradients[less])
        for result, value, spread in zip(results, (values[more] - values[less]).tolist(), spreads, strict=True):
            if np.isfinite(value):
                level = spread and spread._replace(slope=0.0)
                ends = uncertainty.interval(value, level, confidence, n=n, limit=2.0)
                result.contrasts[contrast_name(more, less)] = GroupContrast(value, ends, uncertainty.difference_test(value, spread))
    return results


def _checked(features: Mapping[str, Mapping[str, Source]]) -> Mapping[str, Mapping[str, Source]]:
    if not features:
        raise KdxError("There are no features to compare.", "Give the features of a layer: {layer: {'student': ..., 'base': ...}}.")
    return features


def _rows(layer: str, features: Mapping[str, Source]) -> dict[str, Rows]:
    return {role: rows_of(features[role], f"{role}'s features at {layer}") for role in roles_among(features)}


def _device(rows: Mapping[str, Rows]) -> torch.device:
    return torch.device(next(iter(rows.values())).device)


def _codes(labels: Any, what: str) -> tuple[list[Any], NDArray[np.int64]]:
    """The distinct labels in ascending order, and the number of each image's label among them."""
    values = labels.numpy(force=True) if isinstance(labels, Tensor) else np.asarray(labels)
    if values.ndim != 1 or values.dtype.kind not in "iubUTO":
        raise KdxError(f"The {what} have shape {list(values.shape)} and type {values.dtype}.", "Give an integer or a name per image.")
    names, codes = np.unique(values.astype(np.str_) if values.dtype.kind in "OT" else values, return_inverse=True)
    return names.tolist(), codes.astype(np.int64)


def members(codes: NDArray[np.int64], count: int) -> list[Tensor]:
    """The images of each of ``count`` groups, from the group [n] of each image."""
    order = torch.from_numpy(np.argsort(codes, kind="stable"))
    return list(order.split(np.bincount(codes, minlength=count).tolist()))
