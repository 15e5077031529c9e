"""The target of a batch, with everything else that its explanation needs besides the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from torch import Tensor

from kdx.features.target import Target
from kdx.kernels import ambient
from kdx.scores.uncertainty import permutation_table


@dataclass(frozen=True, eq=False)
class BatchTarget:
    """The target of a batch, with permutations and seed. It does not depend on the images, so it is known before the networks run.

    target: the target of the n images, with its geometry. permutations [p, n]: permutations of the images. classes [n]: the true classes,
    for salient images; None if they are not known. seed: the seed of the noise in salient images.
    """

    target: Target
    permutations: Tensor
    classes: Tensor | None
    seed: np.random.SeedSequence

    @classmethod
    @ambient.neutral()
    def of(cls, labels: Tensor, permutations: int, seed: int | Sequence[int], classes: Tensor | None = None) -> Self:
        """Make it from labels [n] or an embedding [n, e]. classes: by default the labels, if they are not an embedding.

        Raises KdxError for a target without geometry.
        """
        target = Target.of(labels).checked()
        classes = labels if classes is None and labels.ndim == 1 else classes
        return cls(target, permutation_table(len(labels), permutations, seed), classes, np.random.SeedSequence(seed))

    def moved(self, move: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]) -> Self:
        """The same with copies of all tensors on another device, which ``move`` makes together."""
        own = (self.permutations,) if self.classes is None else (self.permutations, self.classes)
        permutations, *rest = move((*own, *self.target.tensors))
        classes = None if self.classes is None else rest.pop(0)
        return replace(self, target=self.target.with_tensors(rest), permutations=permutations, classes=classes)
