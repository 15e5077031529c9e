"""The benchmark cases, as data. `benchmarks.run` looks up their kinds and runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.goals import Goal

RESNET18 = "kdx:resnet,width=64,depth=2-2-2-2,classes=1000,block=basic,stem=imagenet"
RESNET50 = "kdx:resnet,width=64,depth=3-4-6-3,classes=1000,block=bottleneck,stem=imagenet"
VGG16 = "timm:vgg16_bn"
MOBILENET = "timm:mobilenetv3_large_100"
VIT = "timm:vit_small_patch16_224"

PROCESS_KINDS = frozenset({"cold start", "process start", "neighbours of unicam", "neighbours of compare"})
"""Kinds whose variants start processes of their own. The memory of those processes is not measured."""


@dataclass(frozen=True)
class Case:
    """One benchmark case.

    kind: a key of `benchmarks.run.KINDS`. arguments: the keyword arguments of that kind's function. baseline: the variant that all
    other times are divided by, or "" for none. kdx_variants: the prefixes of the names of kdx's own variants. quick: whether
    ``--quick`` includes the case. rounds: a fixed number of rounds, for cases that take minutes.
    """

    name: str
    kind: str
    arguments: Mapping[str, Any]
    baseline: str = "kdx"
    kdx_variants: tuple[str, ...] = ("kdx",)
    quick: bool = False
    rounds: int | None = None
    goals: tuple[Goal, ...] = ()


def _explain(label: str, network: str, layer: str, batch: int, without: tuple[str, ...] = ("compiled",), **more: Any) -> Case:
    arguments = {"network": network, "layer": layer, "batch": batch, "side": 224, "without": without}
    return Case(f"explain {label} {layer} x{batch}", "explain", arguments, **more)


def _geometry(n: int, channels: int, side: int, **more: Any) -> Case:
    arguments = {"n": n, "channels": channels, "height": side, "width": side}
    return Case(f"geometry n={n} {channels}x{side}x{side}", "geometry", arguments, **more)


def _decomposition(n: int, channels: int, side: int, **more: Any) -> Case:
    arguments = {"n": n, "channels": channels, "height": side, "width": side}
    goals = (Goal("geometry and shares", "most", 1.5),)
    name = f"decomposition n={n} {channels}x{side}x{side}"
    return Case(name, "decomposition", arguments, baseline="geometry", kdx_variants=("geometry",), goals=goals, **more)


def _published_over_kdx(ratio: float) -> tuple[Goal, ...]:
    return (Goal("published", "least", ratio),)


def _neighbours(function: str, size: str, **arguments: int) -> list[Case]:
    """The same work beside busy processes, where kdx has a goal relative to threads that do not spin, and on an idle machine."""
    imported = [f"kdx, imported {order} PyTorch" for order in ("after", "before")]
    conditions = (("beside busy processes", True, "passive", 1.5), ("on an idle machine", False, "spinning", 1.1))
    return [
        Case(
            f"{condition}: {function} {size}",
            f"neighbours of {function}",
            {**arguments, "busy": busy},
            baseline=baseline,
            rounds=3,
            goals=tuple(Goal(variant, "most", bound) for variant in imported),
        )
        for condition, busy, baseline, bound in conditions
    ]


CASES = [
    # A batch, end to end
    _explain(
        "resnet50",
        RESNET50,
        "layer4",
        32,
        without=(),
        goals=(*_published_over_kdx(20.0), Goal("fair", "least", 2.0), Goal("bare passes", "least", 1 / 1.05)),
    ),
    _explain("resnet18", RESNET18, "layer4", 32, without=(), goals=_published_over_kdx(10.0)),
    _explain("resnet18", RESNET18, "layer4", 8, quick=True),
    _explain("resnet18", RESNET18, "layer2", 8),
    _explain("resnet50", RESNET50, "layer3", 8),
    _explain("resnet50", RESNET50, "layer4", 128),
    _explain("mobilenetv3", MOBILENET, "blocks.6", 32),
    _explain("vgg16_bn", VGG16, "features.43", 8),
    _explain("vit_small", VIT, "blocks.11", 8),
    # The geometry alone
    *(_geometry(n, 512, 7, quick=n == 32, goals=_published_over_kdx(150.0 if n == 32 else 300.0)) for n in (32, 64, 128)),
    *(_geometry(n, 2048, 7, goals=_published_over_kdx(150.0 if n == 32 else 300.0)) for n in (32, 64, 128)),
    *(_geometry(32, channels, 14) for channels in (256, 1024)),
    _geometry(32, 512, 28),
    _geometry(256, 2048, 7),
    _geometry(128, 256, 56),
    # The geometry with the shares of positions
    *(_decomposition(n, channels, side) for channels, side in ((512, 7), (2048, 7), (256, 14)) for n in (32, 64, 128)),
    # Scores of many images
    Case("scores N=1,000 beside dcor", "estimators", {"n": 1000, "d": 64}, quick=True),
    Case("scores N=4,500 beside dcor", "beside dcor", {"n": 4500, "d": 64}),
    *(Case(f"scores N={n:,} d=512", "scores", {"n": n, "d": 512}, baseline="bare products") for n in (2_500, 5_000, 10_000)),
    Case(
        "scores N=10,000 d=2,048",
        "scores",
        {"n": 10_000, "d": 2048},
        baseline="bare products",
        goals=(Goal("kdx", "most", 2.0),),
    ),
    Case("scores N=50,000 d=512", "scores", {"n": 50_000, "d": 512, "without": ("bare products", "kdx")}, rounds=1, baseline=""),
    *(
        Case(
            f"permutations of {score}, N=2,000 d=2,048",
            "permutations",
            {"score": score, "n": 2000, "d": 2048},
            baseline=score,
            kdx_variants=(score,),
            goals=goals,
        )
        for score, goals in (("RS", (Goal("RS, 999 permutations", "most", 4.0),)), ("FSS", ()))
    ),
    Case("batches of 64, N=10,000", "batches", {"n": 10_000, "d": 512, "batch": 64}),
    # Threads that wait
    *_neighbours("unicam", "n=32 512x7x7", n=32, channels=512, side=7),
    *_neighbours("compare", "N=3,000 d=256", n=3000, d=256),
    # Imputation
    *(
        Case(f"imputation, {label}", "imputation", {"side": side}, goals=(Goal("spsolve", "least", 20.0),))
        for label, side in (("half of a 7 x 7 map", 7), ("half of a 14 x 14 map", 14), ("half at random", 224))
    ),
    # Files
    Case(
        "gradients resnet50 x8",
        "gradients",
        {"network": RESNET50, "layers": ("layer4", "layer4.1", "layer3"), "batch": 8, "side": 224},
        baseline="one pass",
        kdx_variants=("file",),
    ),
    Case("export resnet50", "export", {"network": RESNET50, "layer": "layer4", "side": 224}, rounds=1, baseline="", kdx_variants=("",)),
    # Processes
    Case("cold start resnet18 x8", "cold start", {"network": RESNET18, "layer": "layer4", "batch": 8, "side": 224}),
    Case(
        "process start",
        "process start",
        {},
        baseline="import torch",
        kdx_variants=("kdx", "import kdx"),
        goals=(
            *(Goal(command, "most", 0.4, "seconds") for command in ("kdx --version", "kdx --help", "kdx explain --no-such-option")),
            *(Goal(code, "most", 0.3, "extra seconds") for code in ("import kdx", "import kdx; kdx.unicam")),
        ),
    ),
]
