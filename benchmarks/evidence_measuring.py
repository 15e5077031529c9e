"""The measurements of `benchmarks.evidence` for the networks of one cell of its studies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import kdx
from benchmarks.evidence_design import LAYERS, TestImages
from benchmarks.evidence_evaluation import evaluated
from benchmarks.evidence_measures import PUBLISHED_BATCH, Features, MeasuredNetwork, Objects, Scoring, map_kinds, unicam_maps
from kdx.data.splits import class_balanced_sample
from kdx.evaluate.ranking import rank_correlation
from kdx.kernels import ambient

Note = Callable[[str], None]

SCORINGS = {
    "whole": Scoring(),
    "batches of 5, mean of ratios": Scoring(PUBLISHED_BATCH, mean=True),
    "batches of 5, summed": Scoring(PUBLISHED_BATCH),
    "biased": Scoring(biased=True),
}
PUBLISHED = "published"
"""The scores of ``kdx explain --preset published``: of salient features, in batches of 5, as means of ratios."""

BATCHES = (5, 10, 25, 50, 100)
REFERENCES = (16, 64, 128)
SUBSETS = (50, 100, 200, 300)
EVALUATED = 200
"""The images of `kdx.evaluate`'s metrics."""


@ambient.neutral()
def measure(networks: Mapping[str, MeasuredNetwork], whole: TestImages, images: int, note: Note) -> dict[str, Any]:
    """Accuracies, and by layer the scores and the places of the maps of a student.

    networks: student, base and teacher. whole: the test images, on which the accuracies are measured; scores and maps are those of the
    first ``images`` of them, rounded down to whole published batches. note: a function that is called with the name of each part.
    """
    count = min(images, len(whole.labels))
    test = whole.first(count - count % PUBLISHED_BATCH)
    pixels, labels = torch.from_numpy(test.images), torch.from_numpy(test.labels)
    every, every_label = torch.from_numpy(whole.images), torch.from_numpy(whole.labels)
    features = {role: network.features(pixels) for role, network in networks.items()}
    salient = {role: network.salient_features(pixels, labels) for role, network in networks.items()}
    accuracy = {role: float((network.logits(every).argmax(1) == every_label).float().mean()) for role, network in networks.items()}
    layers = {}
    for layer in LAYERS:
        note(f"scores and maps of {layer}")
        of_layer = {role: by_layer[layer] for role, by_layer in features.items()}
        of_salient = {role: by_layer[layer] for role, by_layer in salient.items()}
        layers[layer] = {"scores": _scores(of_layer, of_salient, test.labels), "maps": _maps(of_layer, test)}
    return {"accuracy": accuracy, "images": len(test.labels), "layers": layers}


@ambient.neutral()
def measure_details(
    networks: Mapping[str, MeasuredNetwork], whole: TestImages, images: int, note: Note, *, mirrored: bool, evaluates: bool
) -> dict[str, Any]:
    """The measurements of a single student of a seed: batches, reference sets, smoothing, intervals, and the metrics of `kdx.evaluate`.

    mirrored: whether smoothing mirrors images. evaluates: whether the metrics of `kdx.evaluate` are measured. The other arguments are those
    of `measure`.
    """
    test = whole.first(images)
    pixels = torch.from_numpy(test.images)
    features = {role: network.features(pixels) for role, network in networks.items()}
    layers: dict[str, dict[str, Any]] = {}
    for layer in LAYERS:
        note(f"details of {layer}")
        of_layer = {role: by_layer[layer] for role, by_layer in features.items()}
        layers[layer] = {
            "maps": _detailed_maps(of_layer, test),
            "smoothed": _smoothed(networks["student"], networks["base"], pixels, layer, test, mirrored=mirrored),
            "widths": _widths(of_layer, test.labels),
        }
    if evaluates:
        note("metrics of kdx evaluate")
        some = whole.first(min(images, EVALUATED))
        of_some = {layer: {role: features[role][layer][: len(some.labels)] for role in ("student", "base")} for layer in LAYERS}
        for layer, by_map in evaluated(networks["student"], networks["base"], of_some, some).items():
            layers[layer]["evaluated"] = by_map
    return layers


def _scores(raw: Features, kept: Features, labels: NDArray[np.int64]) -> dict[str, dict[str, float]]:
    """The scores of every kind, from the features of the images and from those of the salient images."""
    scores = {kind: scoring.scores(raw, labels) for kind, scoring in SCORINGS.items()}
    scores[PUBLISHED] = SCORINGS["batches of 5, mean of ratios"].scores(kept, labels)
    scores["salient features"] = SCORINGS["whole"].scores(kept, labels)
    return scores


def _maps(features: Features, test: TestImages) -> dict[str, Any]:
    objects = Objects.of(test.masks, *features["student"].shape[2:])
    kinds = map_kinds(features, test.labels)
    places = {kind: {"distilled": objects.place(pair[0]), "residual": objects.place(pair[1])} for kind, pair in kinds.items()}
    return {"constant": {"distilled": objects.constant(), "residual": objects.constant()}, **places}


def _detailed_maps(features: Features, test: TestImages) -> dict[str, Any]:
    """UniCAM's maps in batches of several sizes and with reference sets: their places, and their agreement.

    The agreement is the mean over images of Spearman's rank correlation between a batch's maps and those of the whole set, and between the
    maps with two disjoint reference sets.
    """
    objects = Objects.of(test.masks, *features["student"].shape[2:])
    whole = unicam_maps(features, "student", "base", test.labels)
    result: dict[str, Any] = {}
    for batch in BATCHES:
        maps = unicam_maps(features, "student", "base", test.labels, batch)
        residual = unicam_maps(features, "base", "student", test.labels, batch)
        result[f"batches of {batch}"] = {
            "distilled": objects.place(maps),
            "residual": objects.place(residual),
            "agreement": _agreement(maps, whole),
        }
    for size in (size for size in REFERENCES if 2 * size < len(test.labels)):
        first = class_balanced_sample(test.labels, size, 0)
        others = np.setdiff1d(np.arange(len(test.labels)), first)
        second = others[class_balanced_sample(test.labels[others], size, 1)]
        queries = np.setdiff1d(others, second)
        one, other = (_among(features, test.labels, part, queries) for part in (first, second))
        kept = Objects(objects.shares[queries], objects.distances[queries])
        result[f"{size} references"] = {"distilled": kept.place(one), "agreement": _agreement(one, other)}
    return result


def _among(features: Features, labels: NDArray[np.int64], references: NDArray[np.int64], queries: NDArray[np.int64]) -> Tensor:
    x, y = features["student"], features["base"]
    chosen, asked = (torch.from_numpy(rows) for rows in (references, queries))
    known = kdx.ReferenceSet(x[chosen], y[chosen], torch.from_numpy(labels[references]))
    return kdx.unicam(x[asked], y[asked], torch.from_numpy(labels[queries]), reference=known).maps


def _agreement(a: Tensor, b: Tensor) -> float:
    """The mean Spearman correlation of two maps of the same image, without images one of whose maps is constant."""
    return float(rank_correlation(a, b).nanmean())


def _smoothed(
    student: MeasuredNetwork, base: MeasuredNetwork, images: Tensor, layer: str, test: TestImages, *, mirrored: bool
) -> dict[str, Any]:
    """The places of maps that are means over views of the images: with noise of standard deviation 0.05, and mirrored where that keeps
    the class. A mirrored map is mirrored back."""
    generator = torch.Generator().manual_seed(0)
    totals: dict[str, list[Tensor]] = {}
    for turned in (False, False, True, True) if mirrored else (False, False, False, False):
        view = images.flip(3) if turned else images
        view = (view + 0.05 * torch.randn(view.shape, generator=generator)).clamp(0, 1)
        features = {"student": student.features(view)[layer], "base": base.features(view)[layer]}
        target = torch.from_numpy(test.labels)
        kinds = {
            "UniCAM": unicam_maps(features, "student", "base", test.labels),
            "UniCAM residual": unicam_maps(features, "base", "student", test.labels),
            "decomposition of RS(S) − RS(B)": kdx.decompose(features["student"], target, minus=features["base"]).maps,
        }
        for kind, maps in kinds.items():
            totals.setdefault(kind, []).append(maps.flip(2) if turned else maps)
    objects = Objects.of(test.masks, *totals["UniCAM"][0].shape[1:])
    return {kind: objects.place(torch.stack(parts).mean(0)) for kind, parts in totals.items()}


def _widths(features: Features, labels: NDArray[np.int64]) -> dict[str, dict[str, float]]:
    """The mean widths of the 95% intervals of scores and contrasts for subsets of the images, by their number."""
    widths: dict[str, dict[str, float]] = {}
    for count in (count for count in SUBSETS if count <= len(labels)):
        draws: dict[str, list[float]] = {}
        for draw in range(max(1, min(4, len(labels) // count))):
            chosen = np.random.default_rng([count, draw]).permutation(len(labels))[:count]
            rows = {role: values[torch.from_numpy(chosen)] for role, values in features.items()}
            scores = kdx.compare({"layer": rows}, labels[chosen], permutations=0)["layer"]
            entries = {**{name: score.interval for name, score in scores.scores.items()}}
            entries |= {name: contrast[1] for name, contrast in scores.contrasts.items()}
            for name, (low, high) in entries.items():
                draws.setdefault(name, []).append(high - low)
        for name, values in draws.items():
            widths.setdefault(name, {})[str(count)] = float(np.mean(values))
    return widths
