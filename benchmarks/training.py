"""The speed of `kdx distill`: images per second of a student's training beside a plain PyTorch loop with the same losses.

    python -m benchmarks.training                  64 px and 224 px, three rounds, about half an hour on two cores
    python -m benchmarks.training --quick          64 px, one round of few images; stores nothing

ResNet-18 is trained under ResNet-34 by soft targets in batches of 32, from random weights that both loops load, on random images that both
decode beforehand. Each variant runs in a fresh process, and the variants alternate. The first epoch of each is a warm-up and serves to
check that its mean loss equals that of the plain loop. Speed is that of the training steps; validation and files are not in it.

It prints a table and stores it in benchmarks/results/training.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch.nn import functional

from benchmarks import torchvision_operators as torchvision_operators
from benchmarks.record import child, quartiles, store
from kdx import models
from kdx.data.dataset import open_data
from kdx.data.images import load_images
from kdx.data.splits import stratified_splits
from kdx.distill import EpochResult, TrainingSettings, distill
from kdx.distill.number_formats import has_bfloat16

MODULE = "benchmarks.training"
TEACHER, STUDENT = "timm:resnet34", "timm:resnet18"
CLASSES, EPOCHS = 10, 3
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}
"""The largest relative difference of the mean loss of the first epoch from that of the plain loop."""

VARIANTS: dict[str, dict[str, Any]] = {
    "plain loop": {},
    "kdx": {},
    "kdx --channels-last": {"channels_last": True},
    "kdx --channels-last --precision bfloat16": {"channels_last": True, "precision": "bfloat16"},
    "kdx --channels-last --teacher-cache": {"channels_last": True},
}


def settings(side: int) -> TrainingSettings:
    """The settings of every variant, before its own."""
    return TrainingSettings(epochs=EPOCHS, batch=32, learning_rate=0.01, image_size=(side, side))


def prepare(folder: Path, side: int, images: int) -> None:
    """Write random images in ten classes, and random weights of both networks."""
    generator = np.random.default_rng(0)
    for index in range(images):
        path = folder / "images" / f"class {index % CLASSES}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)
    for role, reference in (("teacher", TEACHER), ("student", STUDENT)):
        torch.manual_seed(0)
        module = models.load(f"{reference},num_classes={CLASSES}").module
        save_file(module.state_dict(), folder / f"{role}.safetensors")


def plain_loop(folder: Path, side: int) -> list[tuple[float, float]]:
    """Mean loss and images per second of each epoch of a loop as one writes it by hand."""
    shared = settings(side)
    dataset = open_data(str(folder / "images"))
    indices = stratified_splits(dataset, 0)["train"]
    pixels, labels = load_images(dataset, indices, (side, side)).pixels, torch.from_numpy(dataset.labels[indices])
    teacher, student = (
        models.load(f"{reference},num_classes={CLASSES}@{folder / f'{role}.safetensors'}")
        for role, reference in (("teacher", TEACHER), ("student", STUDENT))
    )
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (teacher.preprocessing.mean, teacher.preprocessing.std))
    teacher.module.eval()
    student.module.requires_grad_(True).train()
    optimizer = torch.optim.SGD(student.module.parameters(), shared.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = math.ceil(len(labels) / shared.batch)
    results = []
    for epoch in range(EPOCHS):
        start, total = time.perf_counter(), 0.0
        order = np.random.default_rng([shared.seed, epoch]).permutation(len(labels))
        for step, rows in enumerate(np.array_split(order, steps)):
            batch = (pixels[rows] - mean) / std
            with torch.no_grad():
                target = teacher.module(batch)
            logits = student.module(batch)
            optimizer.param_groups[0]["lr"] = shared.learning_rate * _cosine((epoch * steps + step + 1) / (EPOCHS * steps))
            loss = 0.1 * functional.cross_entropy(logits, labels[rows]) + 0.9 * 16 * functional.kl_div(
                functional.log_softmax(logits / 4, 1), functional.log_softmax(target / 4, 1), reduction="batchmean", log_target=True
            )
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            total += float(loss.detach()) * len(rows) / len(labels)
        results.append((total, len(labels) / (time.perf_counter() - start)))
    return results


def _cosine(done: float) -> float:
    return done / 0.1 if done < 0.1 else (1 + math.cos(math.pi * (done - 0.1) / 0.9)) / 2


def kdx_loop(folder: Path, side: int, variant: str) -> list[tuple[float, float]]:
    """Mean loss and images per second of each epoch of the student of `kdx distill`."""
    results: list[EpochResult] = []
    references: dict[str, Any] = {
        role: f"{reference},num_classes={CLASSES}@{folder / f'{role}.safetensors'}"
        for role, reference in (("teacher", TEACHER), ("student", STUDENT))
    }
    with tempfile.TemporaryDirectory(dir=folder) as out:
        distill(
            str(folder / "images"), **references, out=out, settings=replace(settings(side), **VARIANTS[variant]), device="cpu",
            teacher_cache=folder / "cache" if "--teacher-cache" in variant else None, report=results.append,
        )  # fmt: skip
    return [(result.loss or 0, result.images_per_second or 0) for result in results if result.network == "student"]


def measure(folder: Path, side: int, variant: str) -> list[tuple[float, float]]:
    """Mean loss and images per second of each epoch of a variant, in this process."""
    return plain_loop(folder, side) if variant == "plain loop" else kdx_loop(folder, side, variant)


def compare(side: int, images: int, rounds: int, variants: list[str]) -> dict[str, Any]:
    """The speed of every variant at an image size, and its ratio to that of the plain loop of the same round."""
    speeds: dict[str, list[float]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, side, images)
        for number in range(rounds):
            losses = {}
            for variant in variants if number % 2 == 0 else variants[::-1]:
                epochs = child(MODULE, "--worker", variant, "--folder", name, "--side", str(side))
                losses[variant] = epochs[0][0]
                speeds[variant].append(float(np.median([speed for _, speed in epochs[1:]])))
            for variant, loss in losses.items():
                tolerance = TOLERANCE[VARIANTS[variant].get("precision", "float32")]
                if not math.isclose(loss, losses["plain loop"], rel_tol=tolerance):
                    raise SystemExit(f"{variant}: the loss is {loss}, and that of the plain loop {losses['plain loop']}")
    plain = np.array(speeds["plain loop"])
    return {
        "side": side,
        "images": images,
        "variants": {
            variant: {"images per second": quartiles(values), "ratio": quartiles(np.array(values) / plain), "samples": values}
            for variant, values in speeds.items()
        },
    }


def table(sizes: list[dict[str, Any]]) -> Table:
    """One row per size and variant: medians, with the quartiles of the ratio."""
    rows = Table("pixels", "variant", "images per second", "ratio to the plain loop")
    for size in sizes:
        for variant, figures in size["variants"].items():
            low, middle, high = figures["ratio"]
            speed = figures["images per second"][1]
            rows.add_row(str(size["side"]), variant, f"{speed:.1f}", f"{middle:.2f} ({low:.2f} to {high:.2f})")
    return rows


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
    variants = [name for name, extra in VARIANTS.items() if "precision" not in extra or has_bfloat16(torch.device("cpu"))]
    cases = [(64, 120, 1)] if arguments.quick else [(64, 600, 3), (224, 200, 3)]
    sizes = [compare(side, images, rounds, variants) for side, images, rounds in cases]
    Console().print(table(sizes))
    if not arguments.quick:
        store("training", MODULE, {"sizes": sizes})


if __name__ == "__main__":
    main()
