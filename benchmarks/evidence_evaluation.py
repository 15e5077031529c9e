"""The metrics of ``kdx evaluate`` for the maps of `benchmarks.evidence`, whose objects have exact masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.evidence_design import TestImages
from benchmarks.evidence_measures import Features, MeasuredNetwork, map_kinds
from kdx.evaluate import perturbation, scoring
from kdx.evaluate.candidates import CENTRE, UNIFORM, Maps, at_image_size, computed
from kdx.evaluate.class_maps import ClassMapPair, class_maps
from kdx.evaluate.localisation import density, energy, pointing

METRICS = ("pointing", "energy", "density", "insertion", "deletion", "insertion[gain]", "deletion[gain]")
"""Names of `kdx.evaluate.registry.METRICS`. insertion and deletion use the student's probability, and the same minus the base's."""

STEPS = 16
"""The steps of the curves, as in ``kdx evaluate``."""

_OTHERS = ("grad_cam_student", "hires_cam_student", "grad_cam_student_minus_base", UNIFORM, CENTRE)
"""The candidates of `kdx.evaluate.candidates` that are not maps of kdx."""

_DISTILLED = (
    "UniCAM, batches of 5",
    "UniCAM",
    "UniCAM, elementwise",
    "decomposition of RS(S|B), RS(B|S)",
    "decomposition of RS(S) − RS(B)",
)


@dataclass
class _Networks:
    """The source of the maps that `kdx.evaluate` computes from networks. size: the size of the images. maps: each role's maps, by layer."""

    size: tuple[int, int]
    count: int
    maps: Mapping[str, Mapping[str, ClassMapPair]]

    @classmethod
    def of(cls, networks: Mapping[str, MeasuredNetwork], test: TestImages) -> _Networks:
        """Grad-CAM and HiResCAM of the label of each image."""
        parts = [(torch.from_numpy(test.images), torch.from_numpy(test.labels))]
        classes = int(test.labels.max()) + 1
        maps = {role: class_maps(network.network, network.layers, parts, classes, network.device) for role, network in networks.items()}
        height, width = test.masks.shape[1:]
        return cls((height, width), len(test.labels), maps)

    def __len__(self) -> int:
        return self.count

    def class_maps(self, role: str, layer: str) -> ClassMapPair:
        return self.maps[role][layer]

    def stored_maps(self, layer: str, kind: str) -> Maps:
        raise ValueError(f"there is no stored map {kind} of {layer}")


def evaluated(
    student: MeasuredNetwork, base: MeasuredNetwork, features: Mapping[str, Features], test: TestImages
) -> dict[str, dict[str, dict[str, float]]]:
    """By layer, map and metric: the mean over the images. Maps of the student next to those of other methods and to baselines.

    features: of the student and the base, by layer and role.
    """
    source, others = _Networks.of({"student": student, "base": base}, test), computed(has_base=True)
    baselines = {
        others[name].title: measured(others[name].maps(source, ""), student, base, test) for name in _OTHERS if not others[name].has_layer
    }
    results = {}
    for layer, by_role in features.items():
        kinds = map_kinds(by_role, test.labels)
        maps = {kind: kinds[kind][0].float().numpy() for kind in _DISTILLED}
        maps |= {others[name].title: others[name].maps(source, layer) for name in _OTHERS if others[name].has_layer}
        results[layer] = {name: measured(values, student, base, test) for name, values in maps.items()} | baselines
    return results


def measured(maps: Maps, student: MeasuredNetwork, base: MeasuredNetwork, test: TestImages) -> dict[str, float]:
    """The mean over images of every metric of maps [n, h, w]."""
    height, width = test.masks.shape[1:]
    resized = at_image_size(maps, (height, width))
    scores = scoring.probability_and_gain(student.logits, base.logits, torch.from_numpy(test.labels))
    images, values = torch.from_numpy(test.images), torch.from_numpy(np.array(maps))
    inserted, deleted = (
        curve(scores, images, values, steps=STEPS).area.mean(0).tolist() for curve in (perturbation.insertion, perturbation.deletion)
    )
    return {
        "pointing": float(pointing(resized, test.masks).mean()),
        "energy": float(energy(resized, test.masks).mean()),
        "density": float(density(resized, test.masks).mean()),
        "insertion": inserted[0],
        "deletion": deleted[0],
        "insertion[gain]": inserted[1],
        "deletion[gain]": deleted[1],
    }
