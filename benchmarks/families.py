"""Export every family of vision networks in every kind of file, and write the results into the table of docs/export.md.

    python -m benchmarks.families [--only NAME ...]     exports, and adds to benchmarks/results/families.json
    python -m benchmarks.families --all [--part 1/8]    checks the smallest network of every family of timm and transformers
    python -m benchmarks.families --merge FILE ...      adds the results that --all wrote to other files with --result
    python -m benchmarks.families --table               fills docs/export.md from that file

Weights are random, since only the graph is checked. Each family is exported in a process of its own. The student and the base of its
explainer file are two random networks of the same architecture. `benchmarks.all_families` describes ``--all``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import all_families
from benchmarks.family_checks import STAGES

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "families.json"
PAGE = ROOT / "docs" / "export.md"
START, END = "<!-- families -->", "<!-- /families -->"
ALL_START, ALL_END = "<!-- all families -->", "<!-- /all families -->"

KINDS = ("features", "gradients", "explainer")
ARCHITECTURES = ("sm_86", "sm_120")
CLASSES = 10

TIMM = [
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "vgg11_bn",
    "vgg16",
    "densenet121",
    "mobilenetv2_100",
    "mobilenetv3_small_100",
    "efficientnet_b0",
    "regnetx_002",
    "convnext_atto",
    "convnextv2_atto",
    "ghostnet_100",
    "repvgg_a0",
    "hrnet_w18_small",
    "inception_v3",
    "xception41",
    "vit_tiny_patch16_224",
    "deit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "mixer_s16_224",
    "poolformer_s12",
    "mobilevit_xs",
    "efficientformer_l1",
    "maxvit_tiny_tf_224",
]


def _reference(reference: str) -> tuple[nn.Module, Any]:
    from kdx import models

    loaded = models.load(reference, classes=CLASSES)
    return loaded.module, loaded.preprocessing


def _settled(reference: str) -> tuple[nn.Module, Any]:
    """A network with the batch norms' statistics of one batch. Without them all images get the same features to nine digits."""
    module, preprocessing = _reference(reference)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.momentum = None  # take that batch's statistics unchanged
    with torch.no_grad():
        module.train()(torch.randn(16, 3, *preprocessing.size))
    return module, preprocessing


def _transformers(name: str) -> tuple[nn.Module, Any]:
    import transformers

    from kdx.export.graphs import Preprocessing

    configuration = getattr(transformers, f"{name}Config")(num_labels=CLASSES)
    return transformers.AutoModelForImageClassification.from_config(configuration), Preprocessing((224, 224), (0.5,), (0.5,))


FAMILIES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    **{name: partial(_reference, name) for name in (f"timm:{name}" for name in TIMM)},
    "timm:repvgg_a0": partial(_settled, "timm:repvgg_a0"),
    **{name: partial(_reference, name) for name in ("torchvision:resnet18", "torchvision:vgg11_bn", "torchvision:vit_b_16")},
    **{f"hf:{name}": partial(_transformers, name) for name in ("ResNet", "ViT")},
    "kdx:resnet": partial(_reference, "kdx:resnet,width=16,depth=2"),
}


def network(family: str, seed: int) -> tuple[nn.Module, Any]:
    """The family's network with random weights, also in a head that starts at zero, which would have no gradient."""
    torch.manual_seed(seed)
    module, preprocessing = FAMILIES[family]()
    for parameter in module.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return module.eval(), preprocessing


def measure(family: str) -> list[dict[str, Any]]:
    """A row for each kind of file: the layer, parity, megabytes, seconds, and the architectures with an engine."""
    from kdx.errors import KdxError
    from kdx.explain.graph import explainer_graph
    from kdx.export import engine, onnx_file
    from kdx.export.description import Origin
    from kdx.export.graphs import FeatureGraph, GradientGraph
    from kdx.models import Network
    from kdx.models.feature_layers import sensible_layers

    torch.set_num_threads(1)
    module, preprocessing = network(family, 0)
    layers = sensible_layers(module, preprocessing.size)
    layer = layers[len(layers) // 2]
    rows = []
    for kind in KINDS:
        row: dict[str, Any] = {"family": family, "layer": layer, "kind": kind}
        rows.append(row)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            start = time.perf_counter()
            try:
                if kind == "explainer":
                    other, _ = network(family, 1)
                    pair = {"student": Network(family, module, preprocessing), "base": Network(family, other, preprocessing)}
                    graph: Any = explainer_graph(pair, {layer: layer})
                    origin: Any = {role: Origin(family, "random") for role in pair}
                else:
                    graph = {"features": FeatureGraph, "gradients": GradientGraph}[kind](module, [layer], preprocessing)
                    origin = Origin(family, "random")
                report = onnx_file.write(graph, path, origin=origin, image_size=preprocessing.size)
            except KdxError as error:
                row["failed"] = f"{error.problem} {error.hint}"
                continue
            row |= {"seconds": time.perf_counter() - start, "megabytes": path.stat().st_size / 1e6}
            row |= {"largest_error": max(output.max if output.smooth is None else output.smooth for output in report.outputs.values())}
            row |= {"images": sum(report.batches), "images_at_a_jump": max(output.kinked for output in report.outputs.values())}
            row["engines"] = {}
            for arch in ARCHITECTURES:
                try:
                    engine.build(path, path.with_suffix(".engine"), batch=(4, 16, 32), arch=arch, image_size=preprocessing.size)
                    row["engines"][arch] = "built"
                except KdxError as error:
                    row["engines"][arch] = error.problem
    rows[-1]["peak_gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return rows


def filled(page: str, record: dict[str, Any]) -> str:
    """The text of docs/export.md with the tables of a record between their markers."""
    for (start, end), text in {(START, END): table(record), (ALL_START, ALL_END): all_families.table(record)}.items():
        before, _, rest = page.partition(start)
        _, _, after = rest.partition(end)
        page = f"{before}{start}\n{text}{end}{after}"
    return page


def table(record: dict[str, Any]) -> str:
    lines = [
        "| architecture | layer | kind | largest error | file, MB | export, s | engines |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for row in record["rows"]:
        if "failed" in row:
            lines.append(f"| {row['family']} | {row['layer']} | {row['kind']} | failed: {row['failed']} | | | |")
            continue
        jumping = f" ({row['images_at_a_jump']} of {row['images']} images at a jump)" if row["images_at_a_jump"] else ""
        built = ", ".join(arch for arch, status in row["engines"].items() if status == "built") or "none"
        lines.append(
            f"| {row['family']} | `{row['layer']}` | {row['kind']} | {row['largest_error']:.0e}{jumping} | "
            f"{row['megabytes']:.1f} | {row['seconds']:.0f} | {built} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="networks to run, also those that have results")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--table", action="store_true", help="fill docs/export.md from the stored results, and run nothing")
    every = parser.add_argument_group("every family")
    every.add_argument("--all", action="store_true", help="check the smallest network of every family that has no result yet")
    every.add_argument("--part", default="1/1", metavar="I/N", help="the I-th of N parts of the networks")
    every.add_argument("--stages", default=",".join(STAGES), help=f"of {', '.join(STAGES)}")
    every.add_argument("--again", action="store_true", help="run also what was refused or failed")
    every.add_argument("--limit", type=float, default=all_families.LIMIT, help="seconds of processor time per network")
    every.add_argument("--memory", type=float, default=all_families.MEMORY, help="gigabytes per process")
    every.add_argument("--minutes", type=float, default=float("inf"), help="end after this time; finished stages are kept")
    every.add_argument("--result", type=Path, help="the file for the results; by default the file of the table")
    every.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="add the results of other files, and run nothing")
    arguments = parser.parse_args()
    if arguments.all:
        _run_all(arguments)
        if arguments.result:
            return
    elif arguments.merge:
        all_families.merge(arguments.merge)
    elif not arguments.table:
        _run_engines(arguments.only or list(FAMILIES), arguments.workers)
    PAGE.write_text(filled(PAGE.read_text(), all_families.read()))


def _run_all(arguments: argparse.Namespace) -> None:
    all_families.prepare()
    part, parts = map(int, arguments.part.split("/"))
    limits = all_families.Limits(arguments.workers, arguments.limit, arguments.memory, time.monotonic() + 60 * arguments.minutes)
    chosen = arguments.only or all_families.names(all_families.read())[part - 1 :: parts]
    all_families.run(chosen, arguments.stages.split(","), limits, again=arguments.again, result=arguments.result)


def _run_engines(names: list[str], workers: int) -> None:
    from kdx.runs.environment import environment

    order = list(FAMILIES)
    with multiprocessing.get_context("fork").Pool(workers, maxtasksperchild=1) as pool:
        for rows in pool.imap_unordered(measure, names):
            record = all_families.read()
            others = [row for row in record["rows"] if row["family"] != rows[0]["family"]]
            rows_in_order = sorted(others + rows, key=lambda row: order.index(row["family"]))
            RESULT.write_text(json.dumps(record | {"environment": environment(), "rows": rows_in_order}, indent=1) + "\n")
            print(table({"rows": rows}).split("\n", 2)[2], end="", flush=True)


if __name__ == "__main__":
    main()
