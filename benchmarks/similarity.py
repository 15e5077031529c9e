"""Measure the similarity of all pairs of 20 x 20 layers of two residual networks, beside the forward passes that it needs.

`python -m benchmarks.similarity [IMAGES]` writes results/similarity.json. All variants run in one process:

- passes: the forward passes of both networks, without features;
- features: the same passes with the features of 20 layers each, written to files;
- similarity: `kdx.similarity` of these files, with distance correlations, their intervals, and CKA.

The goal is a total of at most 1.5 times the passes. The average load of the machine states whether other processes ran meanwhile. On a busy
machine the ratio of processor times with OMP_NUM_THREADS=1 is the meaningful one: it counts only this process, and no thread that waits
for another.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import kdx
from benchmarks import torchvision_operators as torchvision_operators
from benchmarks.record import peak_bytes, store
from kdx.export.graphs import FeatureGraph
from kdx.features.array_files import new_array

SIZE, BATCH, GOAL = 64, 64, 1.5

LAYERS = (
    "conv1",
    "maxpool",
    *(f"layer{stage}.{block}" for stage, blocks in ((1, 3), (2, 4), (3, 6), (4, 3)) for block in range(blocks)),
    "global_pool",
    "fc",
)
"""The 20 layers of each ResNet-34."""


def main() -> None:
    images = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    with tempfile.TemporaryDirectory(prefix="kdx-") as folder:
        record = store("similarity", "benchmarks.similarity", measured(images, Path(folder)))
    for name, value in record["seconds"].items():
        print(f"{name}: {value:.1f} s, {record['processor_seconds'][name]:.1f} s of processor time")
    print(f"total: {record['ratio']:.2f} times the passes, {record['processor_ratio']:.2f} in processor time (goal {GOAL})")


def measured(images: int, folder: Path) -> dict[str, Any]:
    import timm

    load = os.getloadavg()[0]
    graphs = []
    for seed in range(2):
        torch.manual_seed(seed)
        graphs.append(FeatureGraph(timm.create_model("resnet34").eval(), LAYERS))
    pixels = torch.rand(images, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    parts = [slice(start, min(start + BATCH, images)) for start in range(0, images, BATCH)]
    seconds: dict[str, float] = {}
    processor: dict[str, float] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start, used = time.perf_counter(), time.process_time()
        yield
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        processor[name] = processor.get(name, 0.0) + time.process_time() - used

    with torch.no_grad():
        for graph in graphs:  # layouts and memory
            graph(pixels[:BATCH])
        features: list[dict[str, NDArray[Any]]] = []
        for number, graph in enumerate(graphs):
            (folder / str(number)).mkdir()
            features.append({})
            for part in parts:  # in turns, so that other processes slow both down alike
                with timed("passes"):
                    graph.network(pixels[part])
                with timed("features"):
                    _write_features(graph, pixels, part, folder / str(number), features[-1])
    with timed("similarity"):
        result = kdx.similarity(*features)
    if not np.isfinite(result.values).all():
        raise RuntimeError("a similarity is not finite")
    return {
        "images": images,
        "layers": [len(result.layers_a), len(result.layers_b)],
        "bytes": sum(array.nbytes for by_layer in features for array in by_layer.values()),
        "seconds": seconds,
        "processor_seconds": processor,
        "ratio": (seconds["features"] + seconds["similarity"]) / seconds["passes"],
        "processor_ratio": (processor["features"] + processor["similarity"]) / processor["passes"],
        "goal": GOAL,
        "load": {"before": load, "after": os.getloadavg()[0], "cores": os.cpu_count()},
        "peak_bytes": peak_bytes(),
    }


def _write_features(graph: FeatureGraph, pixels: torch.Tensor, part: slice, folder: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write the features of a part of the images at all layers to the files ``arrays``, which the first part makes."""
    for layer, values in zip(LAYERS, graph(pixels[part])[1:], strict=True):
        if layer not in arrays:
            arrays[layer] = new_array(folder / f"{layer}.npy", (len(pixels), *values.shape[1:]), "float32")
        arrays[layer][part] = values.numpy()


if __name__ == "__main__":
    main()
