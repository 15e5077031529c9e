"""A folder of JPEGs explained by one command, compared with decoding alone and with the networks and their geometry alone.

JPEGs (500 x 375, quality 90) are drawn, and a student and a base, both ResNet-18 (224 x 224, layer4), are exported. Each round then
times four parts in fresh processes and alternating order: decoding N images with as many threads as ``kdx explain`` has; both passes and
everything that kdx computes per batch, from decoded batches in memory; all of ``kdx explain``, from opening the files to the written
page; and the same with 4N images. The pipeline keeps the networks busy if an additional image costs the whole command no more than the
slower of the two stages. Start and page cost once, and only the ratio of the whole command includes them. On a CPU both stages
share the cores, so that their sum is a lower bound there, and is shown.

It prints medians and the peak memory with N and 4N images, and stores all figures with the machine in benchmarks/results/. The networks
and pictures are random, which does not change the timing.

``--photographs`` takes photographs of 12 megapixels (tiles of two photographs of scikit-learn, quality 90) and networks of a quarter of
the width, so that decoding dominates; ``--decoder pillow-draft`` decodes them at a fraction of their size. The record is then
photographs.json, or photographs-draft.json.
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
from dataclasses import replace
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
from kdx.choices import DecoderName, RuntimeName
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
SMALL_NETWORK = "kdx:resnet,width=16,depth=2-2-2-2,classes=10,block=basic,stem=imagenet"
PICTURE = (500, 375)  # width, height: ImageNet's median
PHOTOGRAPH = (4032, 3024)
DECODED_BATCHES = 8  # in memory, used repeatedly
MORE = 4  # times as many images, to see whether memory grows


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


def draw_photographs(folder: Path, images: int) -> None:
    """`draw` with photographs of 12 megapixels. A few different files stand for all: the others are links to them."""
    from sklearn.datasets import load_sample_images

    originals = []
    for number, levels in enumerate(load_sample_images().images):
        tiles = np.tile(np.concatenate([levels, levels[::-1]]), (4, 7, 1))[: PHOTOGRAPH[1], : PHOTOGRAPH[0]]
        for turned in range(2):
            originals.append(folder / f"{number}-{turned}.jpg")
            Image.fromarray(tiles[::-1] if turned else tiles).save(originals[-1], quality=90)
    for number in range(MORE * images):
        for name in ("many", "few")[: 2 if number < images else 1]:
            path = folder / name / CLASSES[number % len(CLASSES)] / f"{number:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(originals[number % len(originals)], path)


def make_networks(folder: Path, network: str, side: int, runtime: RuntimeName = "auto") -> None:
    """Write a student and a base with random weights and the models file, and export them, so that no run waits for an export.

    runtime: ``eager`` exports nothing.
    """
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
    with _explainer(folder, runtime) as explainer:
        explainer.open((side, side))


def _explainer(folder: Path, runtime: RuntimeName = "auto") -> kdx.Explainer:
    models_file = read_models(folder / "models.toml")
    student, base = models_file.load("student"), models_file.load("base")
    return kdx.Explainer(student=student, base=base, layers=models_file.layers, folder=folder / "networks", runtime=runtime)


def _opened(folder: Path, batch: int, decoder: DecoderName) -> tuple[Dataset, list[Any], tuple[int, int]]:
    dataset = replace(open_data(str(folder / "few"), CLASSES), draft=decoder == "pillow-draft")
    size = read_models(folder / "models.toml").load("student").preprocessing.size
    assert size is not None
    return dataset, random_batches(dataset.labels, batch, 0), size


# ---- the parts, each in a fresh process ----


def decode(folder: Path, batch: int, decoder: DecoderName) -> dict[str, float]:
    dataset, batches, size = _opened(folder, batch, decoder)
    start = time.perf_counter()
    with decoded(dataset, batches, size) as pictures:
        images = sum(len(batch_pictures.kept) for batch_pictures in pictures)
    return {"seconds": time.perf_counter() - start, "images": images}


def infer(folder: Path, batch: int, decoder: DecoderName) -> dict[str, float]:
    dataset, batches, size = _opened(folder, batch, decoder)
    with decoded(dataset, batches[:DECODED_BATCHES], size) as pictures:
        in_memory = list(pictures)
    with _explainer(folder) as explainer:
        explainer.open(size)

        def explain_batch(number: int) -> int:
            images, count = in_memory[number % len(in_memory)], len(batches[number])  # the first batches are the largest
            labels = torch.from_numpy(dataset.labels[images.kept[:count]])
            _, measurements = explainer.explain(images.pixels[:count], labels, (0, number))
            for layer in measurements.values():
                for maps in layer.maps.values():
                    maps.maps.numpy(force=True)  # on a GPU a batch is complete when its maps are on the CPU
            return len(labels)

        explain_batch(0)
        start = time.perf_counter()
        images = sum(map(explain_batch, range(len(batches))))
        return {"seconds": time.perf_counter() - start, "images": images}


def whole(folder: Path, batch: int, data: str, decoder: DecoderName) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        out = Path(name) / "run"
        start = time.perf_counter()
        options = RunOptions(batch=batch, geometry="batch", decoder=decoder)
        explain.run(str(folder / data), folder / "models.toml", out, (), options, networks=folder / "networks")
        seconds = time.perf_counter() - start
        images = json.loads((out / "manifest.json").read_text())["images"]["explained"]
        # Only these grow with the number of images.
        growing = [path for path in (out / "maps.zarr").rglob("*") if path.is_file()] + [out / "samples.parquet"]
        written = sum(path.stat().st_size for path in growing)
    return {"seconds": seconds, "images": images, "peak_bytes": peak_bytes(), "bytes": written}


PARTS: dict[str, Callable[[Path, int, DecoderName], dict[str, float]]] = {
    "decoding": decode,
    "inference": infer,
    "whole": lambda folder, batch, decoder: whole(folder, batch, "few", decoder),
    "whole of more": lambda folder, batch, decoder: whole(folder, batch, "many", decoder),
}


# ---- the measurement ----


def measure(
    images: int,
    rounds: int,
    *,
    network: str = NETWORK,
    side: int = SIDE,
    batch: int = BATCH,
    photographs: bool = False,
    decoder: DecoderName = "pillow",
) -> dict[str, Any]:
    """Seconds of each part per round, ratios, peak memory and disk, for a folder of ``images`` JPEGs and one of four times as many."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in PARTS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (draw_photographs if photographs else draw)(folder, images)
        make_networks(folder, network, side)
        for number in range(rounds):
            for part in list(PARTS)[:: 1 if number % 2 == 0 else -1]:
                runs[part].append(child(MODULE, "--part", part, "--folder", name, "--batch", str(batch), "--decoder", decoder))
    counts = {part: images * (MORE if part == "whole of more" else 1) for part in PARTS}
    for part, part_runs in runs.items():
        if any(run["images"] != counts[part] for run in part_runs):
            raise RuntimeError(f"{part} did not process all {counts[part]} images: {part_runs}")
    seconds = {part: np.array([run["seconds"] for run in part_runs]) for part, part_runs in runs.items()}
    slower = np.maximum(seconds["decoding"], seconds["inference"])
    steady = (seconds["whole of more"] - seconds["whole"]) / (MORE - 1)  # for N additional images
    peaks = {part: max(run["peak_bytes"] for run in runs[part]) for part in ("whole", "whole of more")}
    written = {part: runs[part][0]["bytes"] for part in ("whole", "whole of more")}
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
    parser.add_argument("--images", type=int, default=512, help="N; the larger folder holds four times as many")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photographs", action="store_true", help="photographs of 12 megapixels and small networks")
    parser.add_argument("--decoder", choices=("pillow", "pillow-draft"), default="pillow")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # for the fresh processes: the folder that holds everything
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=BATCH, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        with contextlib.redirect_stdout(sys.stderr):  # a run prints its progress
            result = PARTS[options.part](options.folder, options.batch, options.decoder)
        print(json.dumps(result))
        return
    network, case = (SMALL_NETWORK, "two ResNet-18 of a quarter of the width") if options.photographs else (NETWORK, "two ResNet-18")
    measurement = measure(options.images, options.rounds, network=network, photographs=options.photographs, decoder=options.decoder)
    name = "folder" if not options.photographs else "photographs" if options.decoder == "pillow" else "photographs-draft"
    record = store(name, MODULE, {"case": f"{case}, {SIDE} x {SIDE}, {LAYER}", "decoder": options.decoder, **measurement})
    table = Table("", "lower quartile", "median", "upper quartile", title=f"{record['case']}: {options.images} JPEGs", box=None)
    for label, values in record["images_per_second"].items():
        table.add_row(label, *(f"{value:.1f} images/s" for value in values))
    for label, values in record["ratios"].items():
        table.add_row(label, *(f"{value:.3f}" for value in values))
    console = Console()
    console.print(table)
    few, many = (record["peak_bytes"][part] / 1e9 for part in ("whole", "whole of more"))
    console.print(f"Peak memory: {few:.2f} GB with {options.images} images, {many:.2f} GB with {MORE * options.images}.")
    console.print(
        f"Written per 1,000 additional images: {record['bytes_per_1000_images'] / 1e6:.2f} MB. {record['environment']['processor']}."
    )


if __name__ == "__main__":
    main()
