"""The time of each stage of one `kdx explain` over a folder of JPEGs, and the time of the stages alone.

JPEGs (512 x 384) are drawn, and one command explains a student and a base, both ResNet-18 (224 x 224, layer4) with random weights. While it
runs, the start and the end of every step of every stage are recorded:

    decode    the loop waits for a decoded batch; the decoding itself runs in parallel with the other stages
    target    labels, their distances and the permutations of a batch
    upload    images and target are copied to the device, and levels become pixels
    passes    the networks' operations are queued (on the CPU: computed)
    geometry  the operations of distances, weights and maps are queued
    results   the loop waits for the results of a batch
    store     a thread writes maps and records, or features
    waiting   the loop waits for that thread

Stages in one thread add up to at most the time of the command; ``store``, and on a GPU ``target``, have threads of their own. On a GPU the
time between the first and the last operation of passes and geometry is also measured by events of the GPU.

The parts alone are decoding by one thread, by one thread per core, and as in the command; and the networks with their geometry, from
batches in memory. If the command takes no longer than the slower of the two, it keeps that part busy. The record is written to results/.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

import kdx
from benchmarks import folder
from benchmarks.record import store
from kdx import threads
from kdx.commands import explain
from kdx.data.batches import random_batches
from kdx.data.dataset import Dataset, open_data
from kdx.data.images import decoded
from kdx.explain import explainer as explainer_module
from kdx.explain import networks as networks_module
from kdx.explain.batch_target import BatchTarget
from kdx.explain.networks import NetworkRunners
from kdx.models.models_file import read_models
from kdx.runs import batches as batches_module
from kdx.runs import whole as whole_module
from kdx.runs.feature_files import FeatureFiles
from kdx.runs.run import RunOptions
from kdx.runs.store import Store
from kdx.runtimes.transfers import Download

MODULE = "benchmarks.gpu_timeline"
PICTURE = (512, 384)  # width, height
DRAWN = 2_000
STAGES = ("decode", "target", "upload", "passes", "geometry", "results", "store", "waiting")
GEOMETRIES = ("batch", "whole")


@dataclass(frozen=True)
class Span:
    """One step of a stage: seconds from the start of the command, and the thread."""

    stage: str
    start: float
    end: float
    thread: str


@dataclass
class Timeline:
    """The spans of one command, in the order in which they ended, and for each stage pairs of events around the work of the GPU."""

    start: float = field(default_factory=time.perf_counter)
    spans: list[Span] = field(default_factory=list)
    events: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)

    @contextmanager
    def span(self, stage: str) -> Iterator[None]:
        on_gpu = stage in ("passes", "geometry") and torch.cuda.is_available() and torch.cuda.is_initialized()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        start = time.perf_counter() - self.start
        if on_gpu:
            events[0].record()
        try:
            yield
        finally:
            if on_gpu:
                events[1].record()
                self.events.setdefault(stage, []).append((events[0], events[1]))
            end = time.perf_counter() - self.start
            self.spans.append(Span(stage, start, end, threading.current_thread().name))

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, where each call is a span."""

        @wraps(function)
        def measured(*arguments: Any, **options: Any) -> Any:
            with self.span(stage):
                return function(*arguments, **options)

        return measured

    def timed_items(self, stage: str, items: Iterable[Any]) -> Iterator[Any]:
        """The items, where the wait for each is a span."""
        iterator = iter(items)
        while True:
            with self.span(stage):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def seconds(self) -> dict[str, float]:
        """The total seconds of each stage."""
        return {stage: sum(span.end - span.start for span in self.spans if span.stage == stage) for stage in STAGES}

    def gpu_seconds(self) -> dict[str, float]:
        """The time of the GPU between the first and the last operation of each step, in total."""
        return {stage: sum(start.elapsed_time(end) for start, end in pairs) / 1e3 for stage, pairs in self.events.items()}


@contextmanager
def recorded(timeline: Timeline) -> Iterator[None]:
    """Record every step of a run in the block. The timed functions are those of kdx, wrapped."""

    @contextmanager
    def waits_for_images(*arguments: Any) -> Iterator[Iterator[Any]]:
        with decoded(*arguments) as images:
            yield timeline.timed_items("decode", images)

    def timed_writing(writing: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def measured() -> Iterator[Callable[..., None]]:
            with writing() as submit:
                yield timeline.timed("waiting", submit)

        return measured

    timed = [
        (BatchTarget, "of", "target"),
        (explainer_module.Explainer, "_pixels", "upload"),
        (BatchTarget, "moved", "upload"),
        (NetworkRunners, "_infer", "passes"),
        (networks_module, "begin", "geometry"),
        (whole_module, "_measure", "geometry"),
        (Download, "result", "results"),
        (Store, "write_batch", "store"),
        (FeatureFiles, "write", "store"),
    ]
    with ExitStack() as stack:
        for owner, name, stage in timed:
            stack.enter_context(patch.object(owner, name, timeline.timed(stage, getattr(owner, name))))
        for module in (batches_module, whole_module):
            stack.enter_context(patch.object(module, "decoded", waits_for_images))
            stack.enter_context(patch.object(module, "writing", timed_writing(module.writing)))
        yield


# ---- the parts ----


def draw(place: Path, images: int) -> None:
    """JPEGs in class folders. At most DRAWN of them differ; the others are links to these."""

    def draw_one(number: int) -> Path:
        path = place / folder.CLASSES[number % len(folder.CLASSES)] / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(PICTURE, Image.Resampling.BICUBIC).save(path, quality=90)
        return path

    with ThreadPoolExecutor(threads.available_cores()) as pool:
        drawn = list(pool.map(draw_one, range(min(images, DRAWN))))
    for number in range(len(drawn), images):
        original = drawn[number % len(drawn)]
        os.link(original, original.with_name(f"{number:06d}.jpg"))


def decode_alone(dataset: Dataset, size: tuple[int, int], batch: int, workers: int | None, device: torch.device) -> float:
    """Images per second of decoding without networks."""
    order = np.array_split(np.arange(len(dataset)), -(-len(dataset) // batch))
    start = time.perf_counter()
    with decoded(dataset, order, size, workers, device) as images:
        count = sum(len(decoded_batch.kept) for decoded_batch in images)
    return count / (time.perf_counter() - start)


def explain_alone(networks: Path, dataset: Dataset, size: tuple[int, int], batch: int, device: str) -> float:
    """Images per second of the networks and their geometry, until the maps are on the host, from batches in memory."""
    batches = random_batches(dataset.labels, batch, 0)
    with decoded(dataset, batches[: folder.DECODED_BATCHES], size) as images:
        in_memory = list(images)
    models = read_models(networks / "models.toml")
    student, base = models.load("student"), models.load("base")
    with kdx.Explainer(student=student, base=base, layers=models.layers, device=device, runtime="eager") as explainer:

        def explain_batch(number: int) -> int:
            images = in_memory[number % len(in_memory)]
            labels = torch.from_numpy(dataset.labels[images.kept])
            _, layers = explainer.explain(images.levels, labels, (0, number))
            for layer in layers.values():
                for maps in layer.maps.values():
                    maps.maps.numpy(force=True)
            return len(labels)

        explain_batch(0)
        start = time.perf_counter()
        count = sum(map(explain_batch, range(len(batches))))
        return count / (time.perf_counter() - start)


def command(networks: Path, data: Path, batch: int, geometry: Any, device: str) -> tuple[dict[str, Any], Timeline]:
    """One `kdx explain`, from opening the files to the page: its seconds and images, and its timeline."""
    options = RunOptions(batch=batch, geometry=geometry, device=device, runtime="eager")
    with tempfile.TemporaryDirectory(dir=networks) as name:
        out = Path(name) / "run"
        timeline = Timeline()
        with recorded(timeline):
            explain.run(str(data), networks / "models.toml", out, (), options, announce=lambda line: None)
        seconds = time.perf_counter() - timeline.start
        images = json.loads((out / "manifest.json").read_text())["images"]["explained"]
    steps = [span for span in timeline.spans if span.stage != "decode"]
    first, last = min(span.start for span in steps), max(span.end for span in steps)
    return {
        "geometry": geometry,
        "seconds": seconds,
        "images": images,
        "loop": last - first,
        "stages": timeline.seconds(),
        "gpu": timeline.gpu_seconds(),
    }, timeline


# ---- the measurement ----


def measure(
    images: int, batch: int, device: str, *, network: str = folder.NETWORK, side: int = folder.SIDE, geometries: Iterable[str] = GEOMETRIES
) -> dict[str, Any]:
    """The rates of the parts alone, and each command with its stages."""
    place = torch.device(device)
    with tempfile.TemporaryDirectory() as name:
        data, networks = Path(name) / "data", Path(name) / "networks"
        networks.mkdir()
        draw(data, images)
        folder.make_networks(networks, network, side, runtime="eager")
        dataset, size = open_data(str(data), folder.CLASSES), (side, side)
        few = _some(dataset, -(-images // 8))
        rates = {
            "decoding, one thread": decode_alone(few, size, batch, 1, torch.device("cpu")),
            "decoding, a thread per core": decode_alone(dataset, size, batch, None, torch.device("cpu")),
            "decoding, as in the command": decode_alone(dataset, size, batch, None, place),
            "networks and geometry": explain_alone(networks, dataset, size, batch, device),
        }
        results = [command(networks, data, batch, geometry, device) for geometry in geometries]
    spans = [[span.stage, round(span.start, 4), round(span.end, 4), span.thread] for span in results[0][1].spans]
    return {
        "case": f"two ResNet-18, {side} x {side}, {images:,} JPEGs of {PICTURE[0]} x {PICTURE[1]}, batch {batch}",
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU",
        "cores": threads.available_cores(),
        "images_per_second": rates,
        "commands": [result for result, _ in results],
        "spans": spans[:400],
    }


def _some(dataset: Dataset, count: int) -> Dataset:
    ids = dataset.ids[:count]
    return replace(dataset, labels=dataset.labels[:count], ids=ids, files={name: dataset.files[name] for name in ids})


def show(record: dict[str, Any], console: Console) -> None:
    table = Table("", "images/s", title=f"{record['device']}, {record['cores']} cores: {record['case']}", box=None)
    for name, rate in record["images_per_second"].items():
        table.add_row(name, f"{rate:,.0f}")
    for result in record["commands"]:
        table.add_row(f"the command, geometry {result['geometry']}", f"{result['images'] / result['seconds']:,.0f}")
        table.add_row("  from its first to its last batch", f"{result['images'] / result['loop']:,.0f}")
    console.print(table)
    for result in record["commands"]:
        table = Table("stage", "seconds", "share of the command", "GPU seconds", title=f"geometry {result['geometry']}", box=None)
        for stage, seconds in result["stages"].items():
            gpu = f"{result['gpu'][stage]:.2f}" if stage in result["gpu"] else ""
            table.add_row(stage, f"{seconds:.2f}", f"{seconds / result['seconds']:.0%}", gpu)
        table.add_row("the command", f"{result['seconds']:.2f}", "100%", "")
        console.print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=folder.BATCH)
    parser.add_argument("--geometry", choices=(*GEOMETRIES, "both"), default="both")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    geometries = GEOMETRIES if options.geometry == "both" else (options.geometry,)
    with contextlib.redirect_stdout(None):  # a run prints its progress
        measurement = measure(options.images, options.batch, options.device, geometries=geometries)
    show(store("gpu_timeline", MODULE, measurement), Console())


if __name__ == "__main__":
    main()
