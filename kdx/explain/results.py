"""What an Explainer returns: the maps and scores of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic

import numpy as np
from numpy.typing import NDArray

from kdx.errors import KdxError
from kdx.features.arrays import ArrayT
from kdx.maps.decomposition import Decomposition
from kdx.maps.drawing import Sheet
from kdx.maps.figures import DRAWN_KINDS, Drawable, chosen_kinds, layers_sheet
from kdx.maps.unicam import Maps
from kdx.scores.score import Contrast, Score


@dataclass(frozen=True)
class LayerResult(Drawable, Generic[ArrayT]):
    """The comparison of the networks at one layer.

    unicam: UniCAM's maps by name, those of `kdx.roles.MAPS` whose roles exist. distilled, residual, missed, new, alone: the same as
    attributes.
    score_maps: signed maps that add up to a score or contrast over all images and positions, by their symbol in `kdx.roles.SCORE_MAPS`:
    ``score_maps["RS(S) - RS(B)"]`` is what `kdx.decompose` returns for the student and the target, minus the base. Empty with salient
    or pooled features, and for explainer files of older versions.
    scores: by name (`kdx.roles.SCORES`). contrasts: the differences of two scores by name, each with its confidence interval.
    """

    unicam: dict[str, Maps[ArrayT]]
    score_maps: dict[str, Decomposition[ArrayT]]
    scores: dict[str, Score]
    contrasts: dict[str, Contrast]

    @property
    def distilled(self) -> Maps[ArrayT]:
        """The map of the student's features that the base's do not explain. Raises KdxError without a base."""
        return self._of_base("distilled")

    @property
    def residual(self) -> Maps[ArrayT]:
        """The map of the base's features that the student's do not explain. Raises KdxError without a base."""
        return self._of_base("residual")

    @property
    def missed(self) -> Maps[ArrayT] | None:
        """The map of the teacher's features that the student's do not explain; None without a teacher."""
        return self.unicam.get("missed")

    @property
    def new(self) -> Maps[ArrayT] | None:
        """The map of the student's features that the teacher's do not explain; None without a teacher."""
        return self.unicam.get("new")

    @property
    def alone(self) -> Maps[ArrayT] | None:
        """The map of the student's features given nothing; None if there is another network."""
        return self.unicam.get("alone")

    def _of_base(self, name: str) -> Maps[ArrayT]:
        if name not in self.unicam:
            raise KdxError(f"The map {name} compares the student with a base, and there is none.", "Give kdx.Explainer a base.")
        return self.unicam[name]

    @property
    def fss(self) -> Score:
        """FSS(S,T): the similarity of the student's and the teacher's features. Raises KdxError without a teacher."""
        if "FSS(S,T)" not in self.scores:
            raise KdxError("FSS compares the student with its teacher, and there is none.", "Give kdx.Explainer a teacher.")
        return self.scores["FSS(S,T)"]

    @property
    def rs(self) -> Score:
        """RS(S): the relevance of the student's features to the target."""
        return self.scores["RS(S)"]

    @property
    def kinds(self) -> dict[str, Maps[ArrayT] | Decomposition[ArrayT]]:
        """All maps of the layer: those that add up to a score by symbol, then UniCAM's by name."""
        return {**self.score_maps, **self.unicam}

    def _count(self) -> int:
        return len(next(iter(self.kinds.values())).maps)

    def _sheet(self, images: list[NDArray[np.uint8]] | None, index: list[int], kinds: Sequence[str] | None) -> Sheet:
        return layers_sheet({"": self.kinds}, images, index, chosen_kinds(kinds, DRAWN_KINDS, list(self.kinds)))


@dataclass(frozen=True)
class Explanation(Drawable, Generic[ArrayT]):
    """The explanation of the images of one call: a LayerResult per layer, and each role's logits [n, classes]."""

    layers: dict[str, LayerResult[ArrayT]]
    logits: dict[str, ArrayT]

    def _count(self) -> int:
        return len(next(iter(self.logits.values())))

    def _sheet(self, images: list[NDArray[np.uint8]] | None, index: list[int], kinds: Sequence[str] | None) -> Sheet:
        layers = {name: layer.kinds for name, layer in self.layers.items()}
        return layers_sheet(layers, images, index, chosen_kinds(kinds, DRAWN_KINDS[:1], list(next(iter(layers.values())))))
