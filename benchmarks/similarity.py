"""Measure the similarity of all pairs of 20 x 20 layers of two residual networks, beside the forward passes that it needs.

`python -m benchmarks.similarity [IMAGES]` writes results/similarity.json. Everything runs in one process. The stages take turns
in each batch, so that other processes slow all of them down equally:

- passes: the forward passes of both networks, without features;
- features: the same passes with the features of 20 layers each;
- the comparison of these features as `kdx similarity` does it, three times: `whole` stores them and compares all pairs of images,
  `project` does the same with --project 2048, and `batch` compares the images of each batch. Each gives distance correlations with
  intervals, and CKA.

The total of a comparison is the time of the features plus its own time. The goal is at most 1.5 times the passes. The average load of the
machine states whether other processes ran meanwhile. On a busy machine the ratio of processor times with OMP_NUM_THREADS=1 is the
meaningful one: it counts only the work of this process, without waiting threads.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import torchvision_operators as torchvision_operators
from benchmarks.record import peak_bytes, store
from kdx.export.graphs import FeatureGraph
from kdx.features.projection import Sketch
from kdx.runs import schema
from kdx.runs.feature_files import FeatureFiles
from kdx.runs.similarity_sums import Key, as_maps, sums_of_batch, sums_of_files
from kdx.scores.layer_similarity import PooledSums
from kdx.scores.similarity import of_sums, parts_of
from kdx.scores.similarity_result import Similarity

SIZE, BATCH, PROJECT, GOAL = 64, 64, 2048, 1.5

LAYERS = (
    "conv1",
    "maxpool",
    *(f"layer{stage}.{block}" for stage, blocks in ((1, 3), (2, 4), (3, 6), (4, 3)) for block in range(blocks)),
    "global_pool",
    "fc",
)
"""The 20 layers of each ResNet-34."""

KEYS: tuple[Key, ...] = tuple((name, layer) for name in ("A", "B") for layer in LAYERS)


class Clock:
    """The seconds and the processor seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.processor: dict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        start, used = time.perf_counter(), time.process_time()
        yield
        self.seconds[stage] += time.perf_counter() - start
        self.processor[stage] += time.process_time() - used


def main() -> None:
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    with tempfile.TemporaryDirectory(prefix="kdx-") as folder:
        record = store("similarity", "benchmarks.similarity", measured(images, Path(folder)))
    for stage, seconds in record["seconds"].items():
        print(f"{stage}: {seconds:.1f} s, {record['processor_seconds'][stage]:.1f} s of processor time")
    for name, ratio in record["ratios"].items():
        error = f", largest deviation from whole {record['deviations'][name]:.4f}" if name in record["deviations"] else ""
        print(f"{name}: {ratio:.2f} times the passes, {record['processor_ratios'][name]:.2f} in processor time (goal {GOAL}){error}")


def measured(images: int, folder: Path) -> dict[str, Any]:
    import timm

    load, clock = os.getloadavg()[0], Clock()
    graphs = {}
    for seed, name in enumerate(("A", "B")):
        torch.manual_seed(seed)
        graphs[name] = FeatureGraph(timm.create_model("resnet34").eval(), LAYERS)
    pixels = torch.rand(images, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    parts = [slice(start, min(start + BATCH, images)) for start in range(0, images, BATCH)]
    with torch.no_grad():
        widths = {key: values[0].numel() for key, values in _features(graphs, pixels[:BATCH]).items()}
        sketches = {key: Sketch.of(width, PROJECT, 0, *key) for key, width in widths.items() if width > PROJECT}
        files = {
            "whole": _files(folder / "whole", images, widths),
            "project": _files(folder / "project", images, {key: min(width, PROJECT) for key, width in widths.items()}),
        }
        batches = []
        for part in parts:
            with clock.measure("passes"):
                for graph in graphs.values():
                    graph.network(pixels[part])
            with clock.measure("features"):
                rows = _features(graphs, pixels[part])
            with clock.measure("whole"):
                _store(files["whole"], part, rows)
            with clock.measure("project"):
                _store(files["project"], part, {key: sketches[key](x) if key in sketches else x for key, x in rows.items()})
            with clock.measure("batch"):
                batches.append(sums_of_batch([rows[key] for key in KEYS], parts_of(len(parts))))
    results = {}
    for name, stored in files.items():
        with clock.measure(name):
            results[name] = _similarity(sums_of_files(stored, KEYS, torch.device("cpu"), seed=0)[0])
    with clock.measure("batch"):
        floor = torch.stack([share for _, share in batches]).sum(0)
        results["batch"] = _similarity(PooledSums.of([sums for sums, _ in batches], floor))
    if not all(np.isfinite(result.values).all() for result in results.values()):
        raise RuntimeError("a similarity is not finite")
    return {
        "images": images,
        "layers": [len(LAYERS), len(LAYERS)],
        "bytes": {name: sum(file.stat().st_size for file in (folder / name).glob("*.npy")) for name in files},
        "seconds": clock.seconds,
        "processor_seconds": clock.processor,
        "ratios": _ratios(clock.seconds, tuple(results)),
        "processor_ratios": _ratios(clock.processor, tuple(results)),
        "deviations": {name: float(abs(results[name].values - results["whole"].values).max()) for name in ("project", "batch")},
        "goal": GOAL,
        "load": {"before": load, "after": os.getloadavg()[0], "cores": os.cpu_count()},
        "peak_bytes": peak_bytes(),
    }


def _features(graphs: dict[str, FeatureGraph], pixels: Tensor) -> dict[Key, Tensor]:
    """The rows of each network at each layer."""
    return {
        (name, layer): values.flatten(1) for name, graph in graphs.items() for layer, values in zip(LAYERS, graph(pixels)[1:], strict=True)
    }


def _files(folder: Path, images: int, widths: dict[Key, int]) -> FeatureFiles:
    shapes = {name: {layer: (widths[name, layer], 1, 1) for layer in LAYERS} for name in ("A", "B")}
    return FeatureFiles(folder, images, shapes, "float32", LAYERS)


def _store(files: FeatureFiles, part: slice, rows: dict[Key, Tensor]) -> None:
    count = part.stop - part.start
    empty = {column(name): np.zeros(count) for name in ("A", "B") for column in (schema.prediction_column, schema.confidence_column)}
    files.write(part, np.ones(count, dtype=bool), as_maps(rows), empty, ())


def _similarity(sums: PooledSums) -> Similarity:
    numbers = [{layer: place for place, (network, layer) in enumerate(KEYS) if network == name} for name in ("A", "B")]
    return of_sums(sums, numbers[0], numbers[1], {}, 0.95)


def _ratios(seconds: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    return {name: (seconds["features"] + seconds[name]) / seconds["passes"] for name in names}


if __name__ == "__main__":
    main()
