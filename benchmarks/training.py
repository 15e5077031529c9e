"""The speed of `kdx distill`: images per second of a student's training beside plain PyTorch loops with the same losses.

    python -m benchmarks.training                  64 px and 224 px, about ten minutes on two cores
    python -m benchmarks.training --quick          64 px, one round of few images; stores nothing

ResNet-18 is trained under ResNet-34 by soft targets in batches of 32, from random weights that all loops load, on random images. There are
two plain loops. The careful one decodes all images beforehand, evaluates the teacher without gradients, and reads the loss once per step,
as kdx does. The usual one reads files through a DataLoader with two worker processes in every epoch. Each variant runs in a fresh process,
and the variants alternate. The mean loss of the first epoch must equal that of the careful loop.

Speed is that of a training of 30 epochs, the default of `kdx distill`: the first epoch, in which kdx computes the teacher's outputs for all
images, and 29 times the median of the later ones. Validation and files are not in it, nor the pass of another student that filled a cache.

It prints a table and stores results in benchmarks/results/training.json after every variant.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from benchmarks import torchvision_operators as torchvision_operators
from benchmarks.markdown import counted, header, joined, row
from benchmarks.record import RESULTS, child, quartiles, store
from kdx import models
from kdx.data.dataset import open_data
from kdx.data.images import load_images
from kdx.data.splits import stratified_splits
from kdx.distill import EpochResult, TrainingSettings, checkpoints, distill
from kdx.distill.networks import Distillation
from kdx.distill.number_formats import has_bfloat16

MODULE = "benchmarks.training"
CPU = torch.device("cpu")
TEACHER, STUDENT = "timm:resnet34", "timm:resnet18"
CLASSES, BATCH, EPOCHS, EPOCHS_OF_A_TRAINING = 10, 32, 3, 30
CASES = [(64, 192, 2), (224, 64, 2)]
"""Image side, training images and rounds."""

TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
"""The largest relative difference of the mean loss of the first epoch from that of the careful loop."""

CAREFUL, USUAL, CAREFUL_MIRRORED = "careful plain loop", "usual plain loop", "careful plain loop, mirrored images"
CACHE, BFLOAT16, MIRRORED = "kdx --teacher-cache, a later student", "kdx --precision bfloat16", "kdx --flip"

PLAIN = (CAREFUL, USUAL, CAREFUL_MIRRORED)
VARIANTS: dict[str, dict[str, Any]] = {
    CAREFUL: {},
    USUAL: {},
    "kdx": {},
    CACHE: {},
    "kdx --channels-last": {"channels_last": True},
    BFLOAT16: {"precision": "bfloat16"},
    CAREFUL_MIRRORED: {"flip": True},
    MIRRORED: {"flip": True},
}

Epochs = list[tuple[float, float]]
"""The mean loss and the images per second of each epoch."""


def settings(side: int) -> TrainingSettings:
    """The settings of every variant, before its own."""
    return TrainingSettings(epochs=EPOCHS, batch=BATCH, learning_rate=0.01, image_size=(side, side))


def prepare(folder: Path, side: int, images: int) -> None:
    """Write random images in ten classes, and random weights of both networks."""
    generator = np.random.default_rng(0)
    for split, count in (("train", images), ("val", 2 * CLASSES), ("test", 2 * CLASSES)):
        for index in range(count):
            path = folder / "images" / split / f"class {index % CLASSES}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    for role, reference in (("teacher", TEACHER), ("student", STUDENT)):
        torch.manual_seed(0)
        module = models.load(f"{reference},num_classes={CLASSES}").module
        save_file(module.state_dict(), folder / f"{role}.safetensors")


def references(folder: Path) -> dict[str, str]:
    return {
        role: f"{reference},num_classes={CLASSES}@{folder / f'{role}.safetensors'}"
        for role, reference in (("teacher", TEACHER), ("student", STUDENT))
    }


class Images(Dataset[tuple[Tensor, Tensor]]):
    """The training images, decoded when they are read."""

    def __init__(self, folder: Path, side: int) -> None:
        self.data = open_data(str(folder / "images"))
        self.indices, self.side = stratified_splits(self.data, 0)["train"], side

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        index = self.indices[place : place + 1]
        return load_images(self.data, index, (self.side, self.side)).pixels[0], torch.tensor(self.data.labels[index[0]])


def decoded_before(images: Images, mirrored: bool) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """The batches of each epoch, which are those of kdx, from pixels in memory."""
    pixels = load_images(images.data, images.indices, (images.side, images.side)).pixels
    labels = torch.from_numpy(images.data.labels[images.indices])
    for epoch in range(EPOCHS):
        generator = np.random.default_rng([0, epoch])
        batches = np.array_split(generator.permutation(len(labels)), math.ceil(len(labels) / BATCH))

        def read(rows: Any, generator: np.random.Generator = generator) -> tuple[Tensor, Tensor]:
            batch = pixels[rows]
            if mirrored:
                flipped = torch.from_numpy(generator.random(len(rows)) < 0.5)
                batch[flipped] = batch[flipped].flip(3)
            return batch, labels[rows]

        yield map(read, batches)


def decoded_in_every_epoch(images: Images) -> Iterator[Iterator[tuple[Tensor, Tensor]]]:
    """The batches of each epoch from a DataLoader with two worker processes. They have the images of kdx's batches."""
    for epoch in range(EPOCHS):
        order = np.random.default_rng([0, epoch]).permutation(len(images))
        batches = [part.tolist() for part in np.array_split(order, math.ceil(len(order) / BATCH))]
        yield iter(DataLoader(images, batch_sampler=batches, num_workers=2))


def plain_loop(folder: Path, side: int, variant: str) -> Epochs:
    """A loop as one writes it by hand."""
    shared, images = settings(side), Images(folder, side)
    teacher, student = (models.load(reference) for reference in references(folder).values())
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (teacher.preprocessing.mean, teacher.preprocessing.std))
    teacher.module.eval()
    student.module.requires_grad_(True).train()
    optimizer = torch.optim.SGD(student.module.parameters(), shared.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps, count = math.ceil(len(images) / BATCH), len(images)
    epochs = decoded_in_every_epoch(images) if variant == USUAL else decoded_before(images, variant == CAREFUL_MIRRORED)
    results, step, start = [], 0, 0.0
    for batches in epochs:
        start, total = time.perf_counter(), 0.0
        for pixels, labels in batches:
            step += 1
            batch = (pixels - mean) / std
            with torch.no_grad():
                target = teacher.module(batch)
            logits = student.module(batch)
            optimizer.param_groups[0]["lr"] = shared.learning_rate * _cosine(step / (EPOCHS * steps))
            loss = 0.1 * functional.cross_entropy(logits, labels) + 0.9 * 16 * functional.kl_div(
                functional.log_softmax(logits / 4, 1), functional.log_softmax(target / 4, 1), reduction="batchmean", log_target=True
            )
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total += float(loss.detach()) * len(labels) / count
        results.append((total, count / (time.perf_counter() - start)))
    return results


def _cosine(done: float) -> float:
    return done / 0.1 if done < 0.1 else (1 + math.cos(math.pi * (done - 0.1) / 0.9)) / 2


def kdx_loop(folder: Path, side: int, variant: str) -> Epochs:
    """The student of `kdx distill`. Its base is not trained."""
    chosen = replace(settings(side), **VARIANTS[variant])
    cache = folder / "cache" if variant == CACHE else None
    if cache is not None and not cache.exists():  # the first student fills it
        _distilled(folder, replace(chosen, epochs=1), cache)
    return _distilled(folder, chosen, cache)


def _distilled(folder: Path, chosen: TrainingSettings, cache: Path | None) -> Epochs:
    results: list[EpochResult] = []
    data, networks = str(folder / "images"), references(folder)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        distillation = Distillation.prepare(data, Path(out), chosen, CPU, networks["teacher"], networks["student"])
        initial = distillation.initial_network("base").state_dict()
        checkpoints.save_weights(distillation.weights_path("base"), initial, distillation.recipe("base"))
        distill(
            data, teacher=networks["teacher"], student=networks["student"], out=out, settings=chosen, device="cpu", teacher_cache=cache,
            report=results.append,
        )  # fmt: skip
    return [(result.loss or 0, result.images_per_second or 0) for result in results if result.network == "student"]


def measure(folder: Path, side: int, variant: str) -> Epochs:
    """A variant's epochs, measured in this process."""
    return plain_loop(folder, side, variant) if variant in PLAIN else kdx_loop(folder, side, variant)


def speed_of_a_training(epochs: Epochs) -> float:
    """Images per second of 30 epochs: the first, and 29 like the later ones."""
    first, later = 1 / epochs[0][1], 1 / float(np.median([speed for _, speed in epochs[1:]]))
    return EPOCHS_OF_A_TRAINING / (first + (EPOCHS_OF_A_TRAINING - 1) * later)


def baseline(variant: str) -> str:
    """The loop that a variant is compared with."""
    return CAREFUL_MIRRORED if VARIANTS[variant].get("flip") else CAREFUL


def compare(side: int, images: int, rounds: int, variants: list[str]) -> Iterator[dict[str, Any]]:
    """The speeds of all variants so far, after every one."""
    speeds: dict[str, list[float]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), side, images)
        for number in range(rounds):
            losses = {}
            for variant in variants if number % 2 == 0 else variants[::-1]:
                epochs = child(MODULE, "--worker", variant, "--folder", name, "--side", str(side))
                losses[variant] = epochs[0][0]
                speeds[variant].append(speed_of_a_training(epochs))
                yield _figures(side, images, speeds)
            for variant, loss in losses.items():
                tolerance, expected = TOLERANCE[VARIANTS[variant].get("precision", "float32")], losses[baseline(variant)]
                if not math.isclose(loss, expected, rel_tol=tolerance):
                    raise SystemExit(f"{variant}: the loss is {loss}, and that of the {baseline(variant)} {expected}")


def _figures(side: int, images: int, speeds: dict[str, list[float]]) -> dict[str, Any]:
    figures = {}
    for variant, samples in speeds.items():
        paired = list(zip(samples, speeds[baseline(variant)], strict=False))
        if paired:
            ratios = [sample / plain for sample, plain in paired]
            figures[variant] = {"images per second": quartiles(samples), "ratio": quartiles(ratios), "samples": samples}
    return {"side": side, "images": images, "batch": BATCH, "variants": figures}


def rows(sizes: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """Pixels, variant, median speed, and median and range of the ratio to the careful loop of the same round."""
    return [
        (
            str(size["side"]),
            variant,
            f"{figures['images per second'][1]:.1f}",
            "1" if variant == baseline(variant) else "{1:.2f} ({0:.2f} to {2:.2f})".format(*figures["ratio"]),
        )
        for size in sizes
        for variant, figures in size["variants"].items()
    ]


def markdown() -> str:
    """The table of docs/training.md."""
    path = RESULTS / "training.json"
    if not path.exists():
        return "No result is stored.\n"
    record = json.loads(path.read_text())
    lines = header("pixels", "loop", "images per second", "ratio to the careful plain loop")
    lines += [row(*cells) for cells in rows(record["sizes"])]
    environment = record["environment"]
    machine = f"{environment['processor']}, {counted(environment['threads'], 'thread')}, PyTorch {environment['torch']}"
    return f"{joined(lines)}\n\nMedians and quartiles. {machine}; commit {record['commit']}.\n"


def main() -> None:
    """Measure, print, and store unless --quick."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        with contextlib.redirect_stdout(sys.stderr):  # kdx prints notes about the data
            epochs = measure(arguments.folder, arguments.side, arguments.worker)
        print(json.dumps(epochs))
        return
    variants = [name for name, extra in VARIANTS.items() if "precision" not in extra or has_bfloat16(CPU)]
    sizes: list[dict[str, Any]] = []
    for side, images, rounds in [(64, 64, 1)] if arguments.quick else CASES:
        sizes.append({})
        for sizes[-1] in compare(side, images, rounds, variants):
            if not arguments.quick:
                store("training", MODULE, {"sizes": sizes})
    table = Table("pixels", "loop", "images per second", "ratio to the careful plain loop")
    for cells in rows(sizes):
        table.add_row(*cells)
    Console().print(table)


if __name__ == "__main__":
    main()
