"""The scores of a fixed batch of images, cheap enough to compute after every epoch of any training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kdx import models
from kdx.distill.seeding import seeded
from kdx.errors import about
from kdx.export.graphs import FeatureGraph
from kdx.features import arrays
from kdx.features.arrays import Array, Labels
from kdx.features.target import Target
from kdx.kernels import ambient
from kdx.models.layer_pairs import LayerNamesLike, layer_names
from kdx.models.network import Network
from kdx.scores.compare import compare
from kdx.scores.pool import LayerScores

NetworkLike = str | Path | Network | nn.Module
"""A model reference, ``MODELS.toml:ROLE``, a network with its preprocessing, or a module without any."""


@dataclass(frozen=True)
class ProbeScores:
    """The scores of a probe's images: the `kdx.LayerScores` of each layer, by the student's name of the layer, in ``layers``.

    They have no p-values. Their intervals describe other images, not other trainings.
    """

    layers: Mapping[str, LayerScores]

    def row(self, prefix: str = "") -> dict[str, float]:
        """Every score's value by ``prefix`` + LAYER/SCORE, such as ``layer4/FSS(S,T)``, for loggers."""
        return {f"{prefix}{layer}/{name}": score.value for layer, scores in self.layers.items() for name, score in scores.scores.items()}


class Probe:
    """Computes the scores of a student on a fixed batch of images, as often as needed: they show when knowledge is transferred.

    The scores are those of `kdx.compare` for the roles that exist: FSS(S,T), FSS(B,T), RS(S), RS(B), RS(T), and the RS of one network
    given another. ``base`` and ``teacher`` are finished networks or None. Their features are computed once, here, and stay in memory.
    A call costs one pass of the student over the images and their distances.

    images: [n, 3, H, W] as the networks take them. A bare module receives them as they are; a `kdx.models.Network`, such as that of a
    model reference, applies its preprocessing to images in [0, 1]. labels: [n], or an embedding [n, e]. layers: as in `kdx.Explainer`:
    ``layer4``, ``student_layer=teacher_layer``, or a list of them. batch: images per pass.

    The scores of few images depend on which images they are: compare the epochs of a probe with one another, and not with scores of other
    images. A rise of FSS(S,T) does not show that the teacher caused it; FSS(B,T), of a base that was trained without the teacher, is the
    comparison that shows this.

    Raises KdxError for fewer than four images, for labels without geometry (one class, or one image per class), and for layers that a
    network does not have.

    >>> import torch, kdx
    >>> _ = torch.manual_seed(0)
    >>> def network():
    ...     return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(64, 2))
    >>> probe = kdx.Probe(None, network(), torch.rand(8, 3, 6, 6), [0, 1] * 4, "1")
    >>> sorted(probe(network()).row())
    ['1/FSS(S,T)', '1/RS(S)', '1/RS(S|T)', '1/RS(T)', '1/RS(T|S)']
    """

    @ambient.neutral()
    def __init__(
        self,
        base: NetworkLike | None,
        teacher: NetworkLike | None,
        images: Array,
        labels: Labels,
        layers: LayerNamesLike,
        *,
        batch: int = 64,
    ) -> None:
        if batch < 1:
            raise ValueError(f"batch must be 1 or more, not {batch}")
        self._images = arrays.tensor(images, "images").detach().clone()
        self._target = Target.of(labels, len(self._images)).checked().values.clone()
        self._layers = layer_names(layers)
        self._batch = batch
        fixed = {"base": base, "teacher": teacher}
        self._fixed = {role: self._features(role, network) for role, network in fixed.items() if network is not None}

    @ambient.neutral()
    def __call__(self, student: NetworkLike) -> ProbeScores:
        """The scores of a student, which may be in training.

        It is evaluated in eval mode, on its device, as a copy that is deleted afterwards: modes, batch statistics, gradients, buffers and
        attributes of the student stay as they are, and so do the random states and PyTorch's modes (autocast, no_grad, inference mode).
        Wrappers such as DistributedDataParallel and torch.compile are left out. Raises KdxError for a sharded (FSDP) student, and for
        features that are constant or not finite.
        """
        of_student = self._features("student", student)
        device = of_student[0].device
        self._fixed = {role: [feature.to(device) for feature in features] for role, features in self._fixed.items()}
        by_role = {**self._fixed, "student": of_student}
        features = {layer: {role: maps[place] for role, maps in by_role.items()} for place, layer in enumerate(self._layers)}
        return ProbeScores(compare(features, self._target, permutations=0))

    def _features(self, role: str, network: NetworkLike) -> Sequence[Tensor]:
        """The features of a role's network at each of its layers."""
        with about(role):
            copy = models.as_network(network)
            graph = FeatureGraph(copy.module, [names.at(role) for names in self._layers.values()], copy.preprocessing)
            device = graph.mean.device
            with seeded(device, 0):  # a network may draw random numbers in eval mode too
                passes = [graph(part.to(device))[1:] for part in self._images.split(self._batch)]
        return [torch.cat(parts) for parts in zip(*passes, strict=True)]


def probe(
    student: NetworkLike,
    base: NetworkLike | None,
    teacher: NetworkLike | None,
    images: Array,
    labels: Labels,
    layers: LayerNamesLike,
    *,
    batch: int = 64,
) -> ProbeScores:
    """FSS and RS of a batch of images in one call: ``kdx.Probe(base, teacher, images, labels, layers)(student)``.

    `kdx.Probe` describes the arguments and what the scores do not mean. A training that computes scores after every epoch keeps a Probe,
    which computes the features of base and teacher once.
    """
    return Probe(base, teacher, images, labels, layers, batch=batch)(student)
