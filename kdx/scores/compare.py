"""All scores of student, base and teacher at any number of layers, from features in memory or on disk."""

from __future__ import annotations

from collections.abc import Mapping

from kdx.cluster.executor import RayExecutor
from kdx.cluster.options import ClusterOptions
from kdx.errors import KdxError
from kdx.features.arrays import Labels
from kdx.features.rows import Source
from kdx.kernels import ambient
from kdx.kernels.cuda import Backend
from kdx.scores.distributed import layers_in
from kdx.scores.inner_products import Sampling
from kdx.scores.layer_scores import Measure
from kdx.scores.pool import LayerScores, adjusted


@ambient.neutral()
def compare(
    features: Mapping[str, Mapping[str, Source]],
    target: Labels,
    *,
    batch: int | None = None,
    permutations: int = 999,
    confidence: float = 0.95,
    seed: int = 0,
    backend: Backend = "auto",
    cluster: str | ClusterOptions | None = None,
) -> dict[str, LayerScores]:
    """FSS and RS of every layer: how similar two networks' features are, and how relevant each network's features are to the target.

    features: layer -> role -> features of the same images, [n, C, H, W] or [n, d], in any form that `kdx.fss` takes. The roles are
    student and optionally base and teacher. target: labels [n] or an embedding [n, e]. batch: the number of images in a set of distances;
    by default all images are one set, which is exact for any n. permutations, confidence, seed, backend: as in `kdx.fss`.
    cluster: the address of a Ray cluster, ``local`` for workers on this machine, or `kdx.cluster.options.ClusterOptions`. Workers share the
    layers and, in each, the tiles of the matrix of all pairs of images, with the same results as one process with as many threads.
    Features in memory are sent to the workers; the workers read mapped files and Zarr arrays at the same paths.

    Returns, for each layer, `scores` by name and `contrasts` by name. The scores are those of `kdx.fss` and `kdx.rs`: "FSS(S,T)",
    "FSS(B,T)", "RS(T)", "RS(S)", "RS(B)", "RS(S|B)", "RS(B|S)", "RS(T|S)" and "RS(S|T)", as far as the roles exist. A
    contrast is the difference of two scores, as (value, interval). Each score's ``p_adjusted`` is its p-value adjusted for the number of
    layers by Holm's method, so that claims about several layers together err with at most the stated probability. Each network's
    distances are computed once per layer, for all scores.

    Raises KdxError for no features and for what `kdx.fss` and `kdx.rs` refuse, and ValueError for other roles.

    >>> import numpy as np, kdx
    >>> rng = np.random.default_rng(0)
    >>> student, base, labels = rng.normal(size=(60, 8)), rng.normal(size=(60, 8)), np.arange(60) % 3
    >>> layers = kdx.compare({"layer4": {"student": student, "base": base}}, labels, permutations=99)
    >>> sorted(layers["layer4"].scores)
    ['RS(B)', 'RS(B|S)', 'RS(S)', 'RS(S|B)']
    """
    if not features:
        raise KdxError("There are no features to compare.", "Give the features of a layer: {layer: {'student': ..., 'base': ...}}.")
    measure = Measure(target, Sampling("unbiased", batch, permutations, confidence, seed, backend))
    if cluster is None:
        return adjusted({layer: measure.scores(layer, by_role) for layer, by_role in features.items()})
    executor = RayExecutor(ClusterOptions(cluster) if isinstance(cluster, str) else cluster, uses_gpus=False)
    return adjusted(layers_in(executor, features, measure))
