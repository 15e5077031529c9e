"""One explained batch of ResNet-50 against the bare forward passes of the same ONNX files.

Two ResNet-50 (224 x 224, batch 32, layer4) are exported; then a fresh process times, in alternating order, the two bare
passes and the same two passes with everything kdx says of a batch: four maps and nine scores with p-values and intervals
(the teacher's features are given, so that their geometry is paid for and their pass is not). It prints medians and quartiles of
the paired ratio, the geometry alone, and the process's peak memory, and writes them with the machine to benchmarks/results/.

The weights are random: they change no timing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.record import child, paired, peak_bytes, quartiles, ratio, store
from kdx import models, scores, transfer
from kdx.export import onnx_file
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.export.onnx_file import Origin
from kdx.runtime import OrtRunner
from kdx.transfer import Target

NETWORK = "kdx:resnet,width=64,depth=3-4-6-3,classes=1000,block=bottleneck,stem=imagenet"
BATCH, SIDE, CLASSES, LAYER = 32, 224, 8, "layer4"


def export(folder: Path) -> None:
    for seed, role in enumerate(("student", "base")):
        torch.manual_seed(seed)
        module = models.load(NETWORK).module
        preprocessing = Preprocessing((SIDE, SIDE), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        onnx_file.write(
            FeatureGraph(module, [LAYER], preprocessing),
            folder / f"{role}.onnx",
            origin=Origin(NETWORK, "random"),
            image_size=(SIDE, SIDE),
        )


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(BATCH, 3, SIDE, SIDE, generator=generator)
    labels = torch.arange(BATCH) % CLASSES
    teacher = torch.rand(BATCH, 2048, 7, 7, generator=generator)
    permutations = scores.permutation_table(BATCH, 999, 0)
    runners = {role: OrtRunner(folder / f"{role}.onnx") for role in ("student", "base")}

    def passes() -> dict[str, torch.Tensor]:
        return {role: runner.infer(images).features[LAYER] for role, runner in runners.items()}

    def geometry(features: dict[str, torch.Tensor]) -> transfer.LayerScores:
        found = transfer.measure({"teacher": teacher, **features}, Target.of(labels), permutations=permutations)
        return transfer.pool(found.products, found.moved, found.left_out, n=BATCH)

    features = passes()
    for _ in range(3):
        geometry(features)
    cases = {"passes": passes, "explained": lambda: geometry(passes()), "geometry": lambda: geometry(features)}
    return {"samples": paired(cases, rounds), "peak_bytes": peak_bytes()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # the child's: time what is exported there
    options = parser.parse_args()
    if options.folder is not None:
        print(json.dumps(measure(options.folder, options.rounds)))
        return
    module = "benchmarks.batch"
    with tempfile.TemporaryDirectory() as name:
        export(Path(name))
        found = child(module, "--folder", name, "--rounds", str(options.rounds))
    case = f"ResNet-50, {SIDE} x {SIDE}, batch {BATCH}, {LAYER}"
    record = store("batch", module, {"case": case, **found, "ratio": ratio(found["samples"], "explained", "passes")})
    table = Table("", "lower quartile", "median", "upper quartile", title=case, box=None)
    for label, key in (("two bare passes", "passes"), ("the same, explained", "explained"), ("geometry alone", "geometry")):
        table.add_row(label, *(f"{value * 1e3:.1f} ms" for value in quartiles(found["samples"][key])))
    table.add_row("explained over bare", *(f"{value:.3f}" for value in record["ratio"]))
    console = Console()
    console.print(table)
    console.print(f"Peak memory of the process: {found['peak_bytes'] / 1e9:.2f} GB. {record['environment']['processor']}.")


if __name__ == "__main__":
    main()
