"""Measure whether the claims of the paper hold for trained networks whose objects are known, and what changes the answer.

    python -m benchmarks.evidence --networks FOLDER    train what is missing in FOLDER, measure, and store results/evidence.json

The networks are those of `benchmarks.evidence_networks`. Measurements of each seed are kept in FOLDER, so that a run continues where it
stopped. `benchmarks.evidence_tables` draws conclusions from the record.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

import kdx
from benchmarks.evidence_measures import PUBLISHED_BATCH, Features, MeasuredNetwork, Objects, Scoring, map_kinds, unicam_maps
from benchmarks.evidence_networks import DESIGNS, LAYERS, SEEDS, STUDENTS, Student, TestImages, test_images, train
from benchmarks.record import store
from kdx.data.splits import class_balanced_sample
from kdx.disk import write_atomic

ByNetwork = Mapping[str, Mapping[str, Tensor]]
"""Features [n, C, H, W] by network and layer."""

IMAGES = 300
"""The test images whose maps and scores are compared."""

SCORINGS = {
    "whole": Scoring(),
    "batches of 5, mean of ratios": Scoring(PUBLISHED_BATCH, mean=True),
    "batches of 5, summed": Scoring(PUBLISHED_BATCH),
    "biased": Scoring(biased=True),
}
PUBLISHED = "published"
"""The scores of ``kdx explain --preset published``: of salient features, in batches of 5, as means of ratios."""

DETAILED = Student("kd", "large")
"""The student whose maps are also measured with other batches, reference sets, and augmentations."""

BATCHES = (5, 10, 25, 50, 100)
REFERENCES = (16, 64, 128)
SUBSETS = (50, 100, 200, 300)


def measure(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """All measurements of the networks of one seed on a data set."""
    trained = train(name, seed, folder)
    whole = test_images(name)
    test = TestImages(whole.images[:IMAGES], whole.labels[:IMAGES], whole.masks[:IMAGES])
    images, labels = torch.from_numpy(test.images), torch.from_numpy(test.labels)
    references = {**trained.teachers, "base": trained.base, **{student.name: reference for student, reference in trained.students.items()}}
    networks = {key: MeasuredNetwork(reference, LAYERS) for key, reference in references.items()}
    outputs = {key: network.outputs(images) for key, network in networks.items()}
    features = {key: values for key, (_, values) in outputs.items()}
    salient = {key: network.salient_features(images, labels) for key, network in networks.items()}
    all_images, all_labels = torch.from_numpy(whole.images), torch.from_numpy(whole.labels)
    accuracy = {key: float((network.outputs(all_images)[0].argmax(1) == all_labels).float().mean()) for key, network in networks.items()}
    students: dict[str, Any] = {}
    for student in STUDENTS:
        roles = {"student": student.name, "base": "base", "teacher": student.teacher}
        students[student.name] = {
            layer: {
                "scores": _scores(roles, features, salient, layer, test.labels),
                "maps": _maps({role: features[key][layer] for role, key in roles.items()}, test),
            }
            for layer in LAYERS
        }
    roles = {"student": DETAILED.name, "base": "base", "teacher": DETAILED.teacher}
    detailed = {
        layer: {
            "maps": _detailed_maps({role: features[key][layer] for role, key in roles.items()}, test),
            "smoothed": _smoothed(networks[DETAILED.name], networks["base"], images, layer, test, mirrored=name == "composites"),
            "widths": _widths({role: features[key][layer] for role, key in roles.items()}, test.labels),
        }
        for layer in LAYERS
    }
    return {"data": name, "seed": seed, "accuracy": accuracy, "students": students, "detailed": detailed}


def _scores(
    roles: dict[str, str],
    features: dict[str, dict[str, Tensor]],
    salient: dict[str, dict[str, Tensor]],
    layer: str,
    labels: NDArray[np.int64],
) -> dict[str, dict[str, float]]:
    raw = {role: features[key][layer] for role, key in roles.items()}
    kept = {role: salient[key][layer] for role, key in roles.items()}
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
    """UniCAM's maps in batches of several sizes, and among reference sets: their places, and the agreement of two of a kind.

    The agreement is the mean over images of Spearman's rank correlation: of a batch's maps with those of the whole set, and of the maps
    among two disjoint reference sets.
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
    for size in REFERENCES:
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
    chosen, asked = torch.from_numpy(references), torch.from_numpy(queries)
    known = kdx.ReferenceSet(x[chosen], y[chosen], torch.from_numpy(labels[references]))
    return kdx.unicam(x[asked], y[asked], torch.from_numpy(labels[queries]), reference=known).maps


def _agreement(a: Tensor, b: Tensor) -> float:
    """The mean Spearman correlation of two maps of the same image, without images one of whose maps is constant."""
    values = []
    for x, y in zip(a.flatten(1).numpy(), b.flatten(1).numpy(), strict=True):
        if np.ptp(x) > 0 and np.ptp(y) > 0:
            values.append(float(stats.spearmanr(x, y)[0]))
    return float(np.mean(values)) if values else float("nan")


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
    for count in SUBSETS:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=Path, required=True, help="the folder of the trained networks and of finished measurements")
    parser.add_argument("--only", nargs=2, metavar=("DATA", "SEED"), help="measure one seed, and store nothing else")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pairs = [(name, seed) for name in DESIGNS for seed in range(SEEDS)]
    if options.only is not None:
        pairs = [(options.only[0], int(options.only[1]))]
    runs = []
    for name, seed in pairs:
        path = options.networks / name / f"measured{seed}.json"
        if not path.exists():
            started = time.process_time()
            run = measure(name, seed, options.networks)
            run["measuring_seconds"] = time.process_time() - started
            write_atomic(path, json.dumps(run).encode())
        runs.append(json.loads(path.read_text()))
        print(name, seed, {key: round(value, 3) for key, value in runs[-1]["accuracy"].items()}, flush=True)
    if options.only is None:
        store("evidence", "benchmarks.evidence", {"images": IMAGES, "runs": runs})


if __name__ == "__main__":
    main()
