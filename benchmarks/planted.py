"""Plant a difference between two networks and measure which maps show it.

    python -m benchmarks.planted            all cases, five seeds, about 20 minutes on one core; stores results/planted.json
    python -m benchmarks.planted --quick    one kind of cue and one seed, about 40 seconds on one core; stores nothing

Images are `kdx.data.draw_composites`. The base is trained on images whose cue carries no information, and the student on images whose cue
names the class and some of which lack the glyph or the cue. The cue is therefore what the student knows and the base does not. No teacher
is involved. All maps are those of the same test images, and all test images together are the geometry.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

import kdx
from benchmarks.record import store
from kdx.data.planted_cues import CLASSES, CUES, Composites, Cue, draw_composites
from kdx.distill.seeding import seeded
from kdx.export.graphs import FeatureGraph
from kdx.features import arrays
from kdx.features.target import Target
from kdx.kernels import geometry
from kdx.kernels.dispatch import TorchBackend
from kdx.models.resnet import ResidualNetwork, resnet

LAYERS = ("layer1", "layer2", "layer3")
WIDTH, EPOCHS, BATCH, RATE = 8, 8, 64, 3e-3
TRAINING_IMAGES, TEST_IMAGES = 2400, 600
MISSING = 1 / 3
"""The expected share of the training images of a network with the cue that lack the glyph, and the share that lack the cue."""
SEEDS = 5


class Case(NamedTuple):
    """Two networks and the images to explain: the kind of cue, which networks are trained with it, and whether it names the class."""

    cue: Cue
    student_knows: bool = True
    base_knows: bool = False
    informative: bool = True
    """Whether the cue of the test images names their class."""


CASES: dict[str, Case] = {
    **{str(cue): Case(cue) for cue in CUES},
    "neither knows": Case("colour", student_knows=False),
    "both know": Case("colour", base_knows=True),
    "irrelevant": Case("colour", informative=False),
}
"""The cases with a planted difference, then the controls: two networks of the same training, which differ in nothing that was planted,
and a cue that the student alone knows but that has nothing to do with the labels of the test images."""

Array = NDArray[np.float64]


def measure(case: Case, seed: int) -> dict[str, Any]:
    """Train both networks and compare their maps of the test images with the masks: accuracies, and per layer scores and maps."""
    student, base = train(case.cue, case.student_knows, seed, 0), train(case.cue, case.base_knows, seed, 1)
    test = draw_composites(case.cue, TEST_IMAGES, _stream(seed, 2), informative=case.informative)
    features = {"student": layer_features(student, test), "base": layer_features(base, test)}
    layers: dict[str, dict[str, dict[str, Any]]] = {}
    for layer in LAYERS:
        s, b = features["student"][layer], features["base"][layer]
        layers[layer] = {"scores": _scores(s, b, test.labels), "maps": {}}
        for name, maps in {**geometry_maps(s, b, test.labels), **network_maps(student, base, s, b, layer, test)}.items():
            layers[layer]["maps"][name] = energy(maps, test)
    return {
        "accuracy": {"student": _accuracies(student, case.cue, seed), "base": _accuracies(base, case.cue, seed)},
        "layers": layers,
    }


# ---- networks ----


@cache
def train(cue: Cue, knows: bool, seed: int, number: int) -> ResidualNetwork:
    """A small residual network, trained on images whose cue is informative or not. number: which of the networks of a seed."""
    share = MISSING if knows else 0.0
    images = draw_composites(cue, TRAINING_IMAGES, _stream(seed, 3 + number), informative=knows, without_glyph=share, without_cue=share)
    pixels, labels = torch.from_numpy(images.images), torch.from_numpy(images.labels)
    with seeded(torch.device("cpu"), seed, number):
        network = resnet(WIDTH, 1, CLASSES)
        optimizer = torch.optim.AdamW(network.parameters(), RATE)
        steps = EPOCHS * -(-TRAINING_IMAGES // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        for _ in range(EPOCHS):
            for batch in torch.randperm(TRAINING_IMAGES).split(BATCH):
                loss = functional.cross_entropy(network(pixels[batch]), labels[batch])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
    return network.eval()


def _stream(seed: int, number: int) -> int:
    """The seed of one set of images of one run."""
    return 10 * seed + number


def _accuracies(network: ResidualNetwork, cue: Cue, seed: int) -> dict[str, float]:
    """The accuracy on test images with both parts, with the cue alone, with the glyph alone, and with a cue of a random class."""
    draw = partial(draw_composites, cue, TEST_IMAGES, _stream(seed, 2))
    sets = {"both": draw(), "cue": draw(without_glyph=1), "glyph": draw(without_cue=1), "conflict": draw(informative=False)}
    with torch.no_grad():
        predictions = {name: network(torch.from_numpy(images.images)).argmax(1).numpy() for name, images in sets.items()}
    return {name: float((predictions[name] == images.labels).mean()) for name, images in sets.items()}


def layer_features(network: ResidualNetwork, images: Composites) -> dict[str, Tensor]:
    """The features [n, C, H, W] of every layer of LAYERS."""
    with torch.no_grad():
        _, *features = FeatureGraph(network, LAYERS)(torch.from_numpy(images.images))
    return dict(zip(LAYERS, features, strict=True))


# ---- maps ----


def geometry_maps(s: Tensor, b: Tensor, labels: NDArray[np.int64]) -> dict[str, Array]:
    """The maps [n, H, W] that follow from the features [n, C, H, W] of student and base and the labels [n]."""
    target = torch.from_numpy(labels)
    maps: dict[str, Tensor] = {}
    for objective in ("relevance", "uniqueness"):
        for weighting in ("gap", "elementwise"):
            maps[f"UniCAM S|B, {objective}, {weighting}"] = kdx.unicam(s, b, target, objective, weighting).maps
    maps["UniCAM S|B − UniCAM B|S"] = _contrast(maps["UniCAM S|B, relevance, gap"], kdx.unicam(b, s, target).maps)
    alone = [relevance_maps(features, target) for features in (s, b)]
    maps["UniCAM of S alone"] = alone[0]
    maps["UniCAM of S alone − UniCAM of B alone"] = _contrast(*alone)
    maps["decomposition of RS(S)"] = kdx.decompose(s, target).maps
    maps["decomposition of RS(S|B)"] = kdx.decompose(s, target, given=b).maps
    maps["decomposition of RS(S) − RS(B)"] = kdx.decompose(s, target, minus=b).maps
    return {name: values.double().numpy() for name, values in maps.items()}


def network_maps(student: ResidualNetwork, base: ResidualNetwork, s: Tensor, b: Tensor, layer: str, test: Composites) -> dict[str, Array]:
    """Grad-CAM of the true class, and plain activations sum_c |F_c|, of the student and as a difference of student and base."""
    images, classes = torch.from_numpy(test.images), torch.from_numpy(test.labels)
    cams = [kdx.grad_cam(network, images, layer, classes, device="cpu").maps for network in (student, base)]
    activations = [features.abs().sum(1) for features in (s, b)]
    maps = {
        "Grad-CAM of S": cams[0],
        "Grad-CAM of S − Grad-CAM of B": _contrast(*cams),
        "activations of S": activations[0],
        "activations of S − activations of B": _contrast(*activations),
    }
    return {name: values.double().numpy() for name, values in maps.items()}


def relevance_maps(features: Tensor, target: Tensor) -> Tensor:
    """UniCAM of one network alone: the maps of relevance with L = RS(X), for features [n, C, H, W]. There is no given network.

    This is not a part of the published method. It shows what conditioning on a base changes.
    """
    distances = arrays.row_distances({"features": features.flatten(1)}, TorchBackend()).raw[0]
    g = Target.of(target, len(features)).distances.centred
    leaf = distances.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(geometry.correlation(geometry.u_centered(leaf), g), leaf)
    apart = distances > 0
    w = torch.where(apart, (derivative + derivative.mT) / torch.where(apart, distances, 1.0), 0.0)
    laplacian = torch.diag(w.sum(1)) - w
    return geometry.cam(features, geometry.gradient(laplacian, geometry.gap(features)))


def _contrast(x: Tensor, y: Tensor) -> Tensor:
    """The difference of two networks' maps [n, H, W]. The two have no common scale, so each is divided by its mean over everything."""
    return x / x.mean() - y / y.mean()


# ---- measures ----


def _scores(s: Tensor, b: Tensor, labels: NDArray[np.int64]) -> dict[str, float]:
    target = torch.from_numpy(labels)
    return {
        "RS(S)": kdx.decompose(s, target).score,
        "RS(B)": kdx.decompose(b, target).score,
        "RS(S|B)": kdx.decompose(s, target, given=b).score,
        "RS(B|S)": kdx.decompose(b, target, given=s).score,
        "FSS(S,B)": kdx.decompose(s, b).score,
    }


def energy(maps: Array, images: Composites) -> dict[str, float]:
    """Where maps [n, H, W] are high, for the region of the cue (planted) and the region of the glyph (common).

    M is a map, M+ its positive part, and m in [0, 1] the share of each position's area that lies in the region.

    - density: the mean over images of (sum M+ m / sum M+) / mean m. 1 is the value of a constant map, and 1/mean m = 7.1 is the highest
      value. Images whose map has no positive value are left out; ``empty`` is their share.
    - signed: (sum M m / sum |M|) / mean m, with sums over all images. 0 means that positive and negative values cancel.
    - peak: the share of the images whose highest position lies in the region with at least half of its area.
    - sum: the sum of M m over all images and positions. For a decomposition it is a part of its score, and ``total`` is the score.
    """
    positive = maps.clip(0)
    full = positive.any((1, 2))
    highest = maps.reshape(len(maps), -1).argmax(1)
    result = {"empty": float(1 - full.mean()), "total": float(maps.sum())}
    for region, masks in (("planted", images.planted), ("common", images.common)):
        area = cell_shares(masks, maps.shape[1], maps.shape[2])
        densities = (positive * area).sum((1, 2))[full] / positive.sum((1, 2))[full] / area.mean((1, 2))[full]
        result[f"density {region}"] = float(densities.mean()) if full.any() else float("nan")
        result[f"signed {region}"] = float((maps * area).sum() / np.abs(maps).sum() / area.mean())
        result[f"peak {region}"] = float((full & (area.reshape(len(maps), -1)[np.arange(len(maps)), highest] >= 0.5)).mean())
        result[f"sum {region}"] = float((maps * area).sum())
    return result


def cell_shares(masks: NDArray[np.bool_], rows: int, columns: int) -> Array:
    """The share of each position's area that lies in the masks [n, h, w], on a grid [n, rows, columns] whose sides divide h and w."""
    n, height, width = masks.shape
    blocks = masks.reshape(n, rows, height // rows, columns, width // columns)
    return np.asarray(blocks.mean((2, 4)), dtype=np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one kind of cue and one seed; stores nothing")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    runs = []
    for seed in range(1 if quick else SEEDS):
        for name in ["texture"] if quick else CASES:
            runs.append({"case": name, "seed": seed, **measure(CASES[name], seed)})
            show(runs[-1])
    if not quick:
        setting = {"width": WIDTH, "epochs": EPOCHS, "training images": TRAINING_IMAGES, "test images": TEST_IMAGES, "seeds": SEEDS}
        store("planted", "benchmarks.planted", {"setting": setting, "processor_seconds": time.process_time(), "runs": runs})


def show(run: Mapping[str, Any]) -> None:
    """Print the accuracies and scores of a run, and per layer and map the densities in both regions."""
    print(f"{run['case']}, seed {run['seed']}")
    for role, accuracies in run["accuracy"].items():
        print(f"  accuracy of the {role}: " + ", ".join(f"{name} {value:.3f}" for name, value in accuracies.items()))
    for layer, record in run["layers"].items():
        print(f"  {layer}: " + ", ".join(f"{name} {value:.3f}" for name, value in record["scores"].items()))
        for name, values in record["maps"].items():
            figures = (f"{key} {values[f'{key} planted']:5.2f} / {values[f'{key} common']:5.2f}" for key in ("density", "signed", "peak"))
            print(f"    {name:40} " + "   ".join(figures), flush=True)


if __name__ == "__main__":
    main()
