"""The maps of all candidates, computed anew with other networks, labels, contexts or pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdx.data.splits import class_balanced_sample
from kdx.evaluate.agreement import Agreement, between_batches, between_references, max_sensitivity
from kdx.evaluate.candidates import Candidate, candidates
from kdx.evaluate.class_maps import ClassMapPair, class_maps
from kdx.evaluate.metrics import EvaluationOptions, Task, Values
from kdx.evaluate.randomisation import Randomisation, label_randomisation, model_randomisation
from kdx.evaluate.subject import PART, Subject
from kdx.explain.explainer import Explainer
from kdx.explain.results import Explanation
from kdx.explain.settings import Settings
from kdx.models.network import Network
from kdx.roles import SCORE_MAPS


@dataclass
class RecomputedMaps:
    """The maps of all candidates for some networks, images and labels, in place of those of a run (`kdx.evaluate.subject.MapSource`)."""

    subject: Subject
    networks: Mapping[str, Network]
    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        self.size = self.subject.size
        self._class_maps: dict[str, dict[str, ClassMapPair]] = {}

    def __len__(self) -> int:
        return len(self.pixels)

    def stored_maps(self, layer: str, kind: str) -> NDArray[np.float32]:
        known = self._explanation.layers[layer]
        maps = known.score_maps[SCORE_MAPS[kind].symbol].maps if kind in SCORE_MAPS else known.unicam[kind].maps
        return maps.float().numpy(force=True)

    def class_maps(self, role: str, layer: str) -> ClassMapPair:
        names = self.subject.layer_names
        if role not in self._class_maps:
            parts = ((self.pixels[start : start + PART], self.labels[start : start + PART]) for start in range(0, len(self), PART))
            layers = [by_role.at(role) for by_role in names.values()]
            self._class_maps[role] = class_maps(self.networks[role], layers, parts, len(self.subject.run.classes), self.subject.device)
        return self._class_maps[role][names[layer].at(role)]

    @cached_property
    def _explanation(self) -> Explanation[Tensor]:
        run = self.subject.run
        stored: Mapping[str, Any] = run.manifest["configuration"]
        settings = Settings(
            runtime="eager",
            device=str(self.subject.device),
            geometry="whole",
            objective=stored["objective"],
            weighting=stored["weighting"],
            pooled=run.pooled,
            chunk=PART,
            permutations=0,
        )
        with Explainer.of(self.networks, self.subject.layer_names.values(), settings) as explainer:
            return cast("Explanation[Tensor]", explainer(self.pixels, self.labels))


class Recomputation:
    """Maps of k images of a subject that are computed again and again, and how they change; each result once for all candidates.

    The images are compared with one another, with the objective and the weighting of the run; so their maps differ from the run's, where
    they are compared with more images. Results are by `key`. rows [k]: the images, as rows of the subject.
    """

    def __init__(self, subject: Subject, options: EvaluationOptions) -> None:
        self.subject, self.options = subject, options
        self.rows = detailed_rows(subject, options)
        self.pixels = subject.pixels(self.rows)
        self.labels = torch.from_numpy(subject.labels[self.rows])
        self._candidates = candidates(subject.run).values()

    def maps(self, networks: Mapping[str, Network], pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The maps [n, h, w] of every candidate at every layer."""
        source = RecomputedMaps(self.subject, networks, pixels, labels)
        maps = {}
        for candidate in self._candidates:
            for layer in self.subject.run.layers if candidate.has_layer else [None]:
                maps[key(candidate, layer)] = torch.from_numpy(np.array(candidate.maps(source, layer or "")))
        return maps

    def _rows_maps(self, rows: Tensor) -> dict[str, Tensor]:
        return self.maps(self.subject.networks, self.pixels[rows], self.labels[rows])

    @cached_property
    def randomisation(self) -> dict[str, Randomisation]:
        """`model_randomisation` of the student, or of student and base."""
        networks = self.subject.networks
        roles = ("student", "base") if self.options.randomised == "both" else ("student",)

        def maps_of(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
            changed = {role: replace(network, module=modules[role]) for role, network in networks.items()}
            return self.maps(changed, self.pixels, self.labels)

        modules = {role: network.module for role, network in networks.items()}
        untrained = {role: self.subject.untrained(role).module.to(self.subject.device) for role in roles if role in networks}
        return model_randomisation(maps_of, modules, untrained, self.subject.size)

    @cached_property
    def labels_randomised(self) -> dict[str, Randomisation]:
        """`label_randomisation`."""
        return label_randomisation(
            lambda labels: self.maps(self.subject.networks, self.pixels, labels), self.labels, self.subject.size, seed=self.subject.seed
        )

    @cached_property
    def batches(self) -> dict[str, Agreement]:
        """`between_batches` with two batches in each division."""
        return between_batches(self._rows_maps, self.labels.numpy(), (len(self.rows) + 1) // 2, seed=self.subject.seed)

    @cached_property
    def references(self) -> dict[str, Agreement]:
        """`between_references`, with three eighths of the images in each set. The other images are compared with each other as well."""

        def maps_of(rows: Tensor, references: Tensor) -> dict[str, Tensor]:
            return {name: maps[: len(rows)] for name, maps in self._rows_maps(torch.cat([rows, references])).items()}

        return between_references(maps_of, self.labels.numpy(), max(4, 3 * len(self.rows) // 8 - 1), seed=self.subject.seed)

    @cached_property
    def sensitivity(self) -> dict[str, Tensor]:
        """`max_sensitivity`."""
        return max_sensitivity(
            lambda pixels: self.maps(self.subject.networks, pixels, self.labels),
            self.pixels,
            seed=self.subject.seed,
            numbers=[int(place) for place in self.subject.places[self.rows]],
        )

    def values(self, result: Tensor, images: Tensor | None = None) -> Values:
        """Values for all images of the subject from those of the images computed anew, or of the ``images`` among them; NaN for others."""
        values = np.full(len(self.subject), np.nan)
        values[self.rows if images is None else self.rows[images.numpy()]] = result.numpy(force=True)
        return values


def key(candidate: Candidate, layer: str | None) -> str:
    """The name of a candidate's maps at a layer among all that are computed at once."""
    return candidate.name if layer is None or not candidate.has_layer else f"{layer}/{candidate.name}"


def detailed_rows(subject: Subject, options: EvaluationOptions) -> NDArray[np.int64]:
    """The images, as rows of the subject, of the metrics that run the networks again: up to ``options.detailed``, balanced over classes."""
    return class_balanced_sample(subject.labels, options.detailed, subject.seed)


def recomputation(task: Task) -> Recomputation:
    """The one recomputation of the task's subject."""
    shared = task.subject.shared
    if "recomputation" not in shared:
        shared["recomputation"] = Recomputation(task.subject, task.options)
    return cast(Recomputation, shared["recomputation"])
