"""A folder of JPEGs explained by one command, against decoding alone and the networks with their geometry alone.

JPEGs (500 x 375, quality 90) are drawn, and a student and a base, both ResNet-18 (224 x 224, layer4), are exported. Then, in
fresh processes and alternating order, each round times over N images: their decoding, by the threads that ``kdx explain`` has;
both passes and everything kdx says of a batch, from decoded batches held in memory; the whole of ``kdx explain``, from opening the
files to the written page; and the same of 4N images. The pipeline keeps the networks busy if an image more takes the
whole no longer than it takes the slower of the two parts; what start and page cost once is in the whole's ratio alone.
On a CPU both parts share the cores, so that the sum of the two is a floor there, and is shown.

It prints medians, and the peak memory at N and 4N images, and writes all with the machine to benchmarks/results/. The
networks and pictures are random: they change no timing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

import kdx
from benchmarks.record import child, peak_bytes, quartiles, store
from kdx import models
from kdx.commands import explain
from kdx.data.batches import random_batches
from kdx.data.dataset import Dataset, open_data
from kdx.data.images import decoded
from kdx.export.graphs import Preprocessing
from kdx.models.models_file import read_models, write_models
from kdx.runs.run import RunOptions

MODULE = "benchmarks.folder"
NETWORK = "kdx:resnet,width=64,depth=2-2-2-2,classes=10,block=basic,stem=imagenet"
SIDE, BATCH, LAYER = 224, 64, "layer4"
CLASSES = tuple(f"class{number}" for number in range(10))
PICTURE = (500, 375)  # width, height: ImageNet's median
HELD = 8  # decoded batches in memory, given again and again
MORE = 4  # times the images, to see whether memory grows


def draw(folder: Path, images: int) -> None:
    """``many`` with 4N JPEGs in class folders, and ``few`` with N of them."""
    generator = np.random.default_rng(0)
    for number in range(MORE * images):
        name = f"{CLASSES[number % len(CLASSES)]}/{number:06d}.jpg"
        path = folder / "many" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(PICTURE, Image.Resampling.BICUBIC).save(path, quality=90)
        if number < images:
            (folder / "few" / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, folder / "few" / name)


def make_networks(folder: Path, network: str, side: int) -> None:
    """A student and a base with random weights, and the models file; exported here, so that no run waits for it."""
    for seed, role in enumerate(("student", "base")):
        torch.manual_seed(seed)
        save_file(models.load(network).module.state_dict(), folder / f"{role}.safetensors")
    write_models(
        folder / "models.toml",
        teacher=None,
        student=f"{network}@student.safetensors",
        base=f"{network}@base.safetensors",
        layers=(LAYER,),
        classes=CLASSES,
        preprocessing=Preprocessing((side, side), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    )
    with _explainer(folder) as explainer:
        explainer.open((side, side))


def _explainer(folder: Path) -> kdx.Explainer:
    named = read_models(folder / "models.toml")
    return kdx.Explainer(student=named.load("student"), base=named.load("base"), layers=named.layers, folder=folder / "networks")


def _opened(folder: Path, batch: int) -> tuple[Dataset, list[Any], tuple[int, int]]:
    dataset = open_data(str(folder / "few"), CLASSES)
    size = read_models(folder / "models.toml").load("student").preprocessing.size
    assert size is not None
    return dataset, random_batches(dataset.labels, batch, 0), size


# ---- what the fresh processes do ----


def decode(folder: Path, batch: int) -> dict[str, float]:
    dataset, batches, size = _opened(folder, batch)
    start = time.perf_counter()
    with decoded(dataset, batches, size) as found:
        images = sum(len(held.kept) for held in found)
    return {"seconds": time.perf_counter() - start, "images": images}


def infer(folder: Path, batch: int) -> dict[str, float]:
    dataset, batches, size = _opened(folder, batch)
    with decoded(dataset, batches[:HELD], size) as found:
        held = list(found)
    with _explainer(folder) as explainer:
        explainer.open(size)

        def one(number: int) -> int:
            images, count = held[number % len(held)], len(batches[number])  # the first batches are the largest
            labels = torch.from_numpy(dataset.labels[images.kept[:count]])
            _, measured = explainer.explain(images.pixels[:count], labels, (0, number))
            for layer in measured.values():
                for found in layer.maps.values():
                    found.maps.numpy(force=True)  # on a GPU a batch is done when its maps are here
            return len(labels)

        one(0)
        start = time.perf_counter()
        images = sum(map(one, range(len(batches))))
        return {"seconds": time.perf_counter() - start, "images": images}


def whole(folder: Path, batch: int, data: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        out = Path(name) / "run"
        start = time.perf_counter()
        explain.run(str(folder / data), folder / "models.toml", out, (), RunOptions(batch=batch), networks=folder / "networks")
        seconds = time.perf_counter() - start
        images = json.loads((out / "manifest.json").read_text())["images"]["explained"]
        growing = [path for path in (out / "maps.zarr").rglob("*") if path.is_file()] + [out / "samples.parquet"]  # the rest does not
        written = sum(path.stat().st_size for path in growing)
    return {"seconds": seconds, "images": images, "peak_bytes": peak_bytes(), "bytes": written}


PARTS: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "decoding": decode,
    "inference": infer,
    "whole": lambda folder, batch: whole(folder, batch, "few"),
    "whole of more": lambda folder, batch: whole(folder, batch, "many"),
}


# ---- the measurement ----


def measure(
    images: int, rounds: int, *, network: str = NETWORK, side: int = SIDE, layer: str = LAYER, batch: int = BATCH
) -> dict[str, Any]:
    """Seconds of each part a round, ratios, peak memory and disk, over a folder of ``images`` JPEGs and one of four times as many."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in PARTS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw(folder, images)
        make_networks(folder, network, side)
        for number in range(rounds):
            for part in list(PARTS)[:: 1 if number % 2 == 0 else -1]:
                found[part].append(child(MODULE, "--part", part, "--folder", name, "--batch", str(batch)))
    counts = {part: images * (MORE if part == "whole of more" else 1) for part in PARTS}
    for part, every in found.items():
        if any(one["images"] != counts[part] for one in every):
            raise RuntimeError(f"{part} did not come to all {counts[part]} images: {every}")
    seconds = {part: np.array([one["seconds"] for one in every]) for part, every in found.items()}
    slower = np.maximum(seconds["decoding"], seconds["inference"])
    steady = (seconds["whole of more"] - seconds["whole"]) / (MORE - 1)  # of N images more
    peaks = {part: max(one["peak_bytes"] for one in found[part]) for part in ("whole", "whole of more")}
    written = {part: found[part][0]["bytes"] for part in ("whole", "whole of more")}
    return {
        "images": images,
        "batch": batch,
        "samples": {part: values.tolist() for part, values in seconds.items()},
        "images_per_second": {
            **{part: quartiles(counts[part] / values) for part, values in seconds.items()},
            "each image more": quartiles(images / steady),
        },
        "ratios": {
            "whole over the slower": quartiles(seconds["whole"] / slower),
            "each image more over the slower": quartiles(steady / slower),
            "each image more over the sum": quartiles(steady / (seconds["decoding"] + seconds["inference"])),
        },
        "peak_bytes": peaks,
        "bytes_per_1000_images": (written["whole of more"] - written["whole"]) / (MORE - 1) / images * 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=512, help="N; four times as many are drawn")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # the child's: what is drawn and exported there
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=BATCH, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        with contextlib.redirect_stdout(sys.stderr):  # a run says how far it is
            found = PARTS[options.part](options.folder, options.batch)
        print(json.dumps(found))
        return
    record = store("folder", MODULE, {"case": f"two ResNet-18, {SIDE} x {SIDE}, {LAYER}", **measure(options.images, options.rounds)})
    table = Table("", "lower quartile", "median", "upper quartile", title=f"{record['case']}: {options.images} JPEGs", box=None)
    for label, values in record["images_per_second"].items():
        table.add_row(label, *(f"{value:.1f} images/s" for value in values))
    for label, values in record["ratios"].items():
        table.add_row(label, *(f"{value:.3f}" for value in values))
    console = Console()
    console.print(table)
    few, many = (record["peak_bytes"][part] / 1e9 for part in ("whole", "whole of more"))
    console.print(f"Peak memory: {few:.2f} GB at {options.images} images, {many:.2f} GB at {MORE * options.images}.")
    console.print(f"Written for 1,000 images more: {record['bytes_per_1000_images'] / 1e6:.2f} MB. {record['environment']['processor']}.")


if __name__ == "__main__":
    main()
