"""What is benchmarked: an entry each, as data. `benchmarks.run` looks the kinds up and runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

RESNET18 = "kdx:resnet,width=64,depth=2-2-2-2,classes=1000,block=basic,stem=imagenet"
RESNET50 = "kdx:resnet,width=64,depth=3-4-6-3,classes=1000,block=bottleneck,stem=imagenet"
VGG16 = "timm:vgg16_bn"
MOBILENET = "timm:mobilenetv3_large_100"
VIT = "timm:vit_small_patch16_224"


@dataclass(frozen=True)
class Case:
    """kind: a key of `benchmarks.run.KINDS`. given: its arguments. over: the way that every other's time is divided by. ours: how the
    names of kdx's own ways begin. quick: part of ``--quick``. rounds: where not as many as asked for. goals: (way, most or least, ratio
    to ``over``) that the project wants."""

    name: str
    kind: str
    given: Mapping[str, Any]
    over: str = "kdx"
    ours: tuple[str, ...] = ("kdx",)
    quick: bool = False
    rounds: int | None = None
    goals: tuple[tuple[str, str, float], ...] = field(default=())


def _explain(label: str, network: str, layer: str, batch: int, **more: Any) -> Case:
    without = more.pop("without", ("compiled",))
    given = {"network": network, "layer": layer, "batch": batch, "side": 224, "without": without}
    return Case(f"explain {label} {layer} x{batch}", "explain", given, **more)


def _geometry(n: int, channels: int, side: int, **more: Any) -> Case:
    return Case(
        f"geometry n={n} {channels}x{side}x{side}",
        "geometry",
        {"n": n, "channels": channels, "height": side, "width": side},
        **more,
    )


_MANY = {"goals": (("published", "least", 300.0),)}

CASES = [
    # End to end
    _explain(
        "resnet50",
        RESNET50,
        "layer4",
        32,
        without=(),
        goals=(("published", "least", 20.0), ("fair", "least", 2.0), ("bare passes", "least", 1 / 1.05)),
    ),
    _explain("resnet18", RESNET18, "layer4", 32, without=(), goals=(("published", "least", 10.0),)),
    _explain("resnet18", RESNET18, "layer4", 8, quick=True),
    _explain("resnet18", RESNET18, "layer2", 8),
    _explain("resnet50", RESNET50, "layer3", 8),
    _explain("resnet50", RESNET50, "layer4", 128),
    _explain("mobilenetv3", MOBILENET, "blocks.6", 32),
    _explain("vgg16_bn", VGG16, "features.43", 8),
    _explain("vit_small", VIT, "blocks.11", 8),
    # The geometry alone
    *(_geometry(n, 512, 7, quick=n == 32, goals=((("published", "least", 150.0),) if n == 32 else _MANY["goals"])) for n in (32, 64, 128)),
    *(_geometry(n, 2048, 7, goals=((("published", "least", 150.0),) if n == 32 else _MANY["goals"])) for n in (32, 64, 128)),
    *(_geometry(32, channels, 14) for channels in (256, 1024)),
    _geometry(32, 512, 28),
    _geometry(256, 2048, 7),
    _geometry(128, 256, 56),
    # Scores of many images
    Case("scores N=1,000 beside dcor", "estimators", {"n": 1000, "d": 64}, quick=True),
    Case("scores N=4,500 beside dcor", "beside dcor", {"n": 4500, "d": 64}),
    *(Case(f"scores N={n:,} d=512", "scores", {"n": n, "d": 512}, over="bare products") for n in (2_500, 5_000, 10_000)),
    Case(
        "scores N=10,000 d=2,048",
        "scores",
        {"n": 10_000, "d": 2048},
        over="bare products",
        goals=(("kdx", "most", 2.0),),
    ),
    Case("scores N=50,000 d=512", "scores", {"n": 50_000, "d": 512, "without": ("bare products", "kdx")}, rounds=1, over=""),
    *(
        Case(
            f"permutations of {score}, N=2,000 d=2,048",
            "permutations",
            {"score": score, "n": 2000, "d": 2048},
            over=score,
            ours=(score,),
            goals=goals,
        )
        for score, goals in (("RS", (("RS, 999 permutations", "most", 4.0),)), ("FSS", ()))
    ),
    Case("batches of 64, N=10,000", "batches", {"n": 10_000, "d": 512, "batch": 64}),
    # Imputation
    *(
        Case(f"imputation, {label}", "imputation", {"side": side}, goals=(("spsolve", "least", 20.0),))
        for label, side in (("half of a 7 x 7 map", 7), ("half of a 14 x 14 map", 14), ("half at random", 224))
    ),
    # Files
    Case(
        "gradients resnet50 x8",
        "gradients",
        {"network": RESNET50, "layers": ("layer4", "layer4.1", "layer3"), "batch": 8, "side": 224},
        over="one pass",
        ours=("file",),
    ),
    Case("export resnet50", "export", {"network": RESNET50, "layer": "layer4", "side": 224}, rounds=1, over="", ours=("",)),
    Case("cold start resnet18 x8", "cold start", {"network": RESNET18, "layer": "layer4", "batch": 8, "side": 224}),
]
