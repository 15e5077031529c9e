"""Small networks for the tests of the Explainer, their explainers and features, and how results are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdx
from kdx import Explainer, KdxError
from kdx.choices import Precision
from kdx.explain.results import Explanation
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.models.network import Network
from kdx.roles import ROLES, pairs_among
from kdx.runtimes.choice import Choice
from kdx.runtimes.onnx_runtime import OnnxRuntimeRunner
from kdx.scores.score import Score

LAYERS = {"conv1": "stem", "conv2": "conv2"}
SIZE = (11, 9)
N = 13
EXPLAINED = {
    "distilled": ("student", "base"),
    "residual": ("base", "student"),
    "missed": ("teacher", "student"),
    "new": ("student", "teacher"),
}
PAIRS = {"S": "student", "B": "base", "T": "teacher"}


class Small(nn.Module):
    """Two convolutions. A teacher is wider, and its first convolution is named ``stem``."""

    def __init__(self, seed: int, *, teacher: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = "stem" if teacher else "conv1"
        width = 7 if teacher else 5
        self.add_module(self.first, nn.Conv2d(3, width, 3, padding=1))
        self.norm = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 6, 3, 2)
        self.fc = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.get_submodule(self.first)(images)).relu()
        logits: Tensor = self.fc(self.conv2(features).relu().mean((2, 3)))
        return logits


class Untraceable(Small):
    """A network that runs but cannot be exported."""

    def forward(self, images: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise RuntimeError("no tracing here")
        return super().forward(images)


def networks() -> dict[str, nn.Module]:
    return {"student": Small(1).eval(), "base": Small(2).eval(), "teacher": Small(3, teacher=True).eval()}


def named_networks() -> dict[str, Network]:
    """The networks with references, so that an explainer recognises their exported files."""
    return {role: Network("Small", network, Preprocessing()) for role, network in networks().items()}


def explainer(**changes: Any) -> Explainer:
    """The explainer is on the CPU, because tests compare it with PyTorch on the CPU to nine digits."""
    settings: dict[str, Any] = {**networks(), "layers": LAYERS, "runtime": "eager", "device": "cpu", "permutations": 19}
    return Explainer(**settings | changes)


def images(n: int = N, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def labels(n: int = N) -> Tensor:
    return torch.arange(n) % 3


def features(pixels: Tensor | None = None) -> dict[str, dict[str, Tensor]]:
    """Per role and student's layer: the features of the pixels, by default of images(), in PyTorch."""
    actual = {}
    for role, network in networks().items():
        names = LAYERS.values() if role == "teacher" else LAYERS
        with torch.no_grad():
            _, *maps = FeatureGraph(network, list(names))(images() if pixels is None else pixels)
        actual[role] = dict(zip(LAYERS, maps, strict=True))
    return actual


def score_of(name: str, features: Mapping[str, Tensor]) -> Score:
    """The score of that name, from the features of each role, with kdx's own functions."""
    kind, _, inside = name.removesuffix(")").partition("(")
    if kind == "FSS":
        one, other = inside.split(",")
        return kdx.fss(features[PAIRS[one]], features[PAIRS[other]], permutations=19)
    one, _, other = inside.partition("|")
    return kdx.rs(features[PAIRS[one]], labels(), features[PAIRS[other]] if other else None, permutations=19)


def close(actual: Any, expected: Any, tolerance: float) -> None:
    """Asserts that the error is at most ``tolerance`` times the expected array's largest value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def assert_same(actual: Explanation[Any], expected: Explanation[Any], tolerance: float) -> None:
    assert list(actual.layers) == list(expected.layers)
    for layer, one in actual.layers.items():
        other = expected.layers[layer]
        for name in pairs_among(ROLES):
            close(getattr(one, name).maps, getattr(other, name).maps, tolerance)
            close(getattr(one, name).weights, getattr(other, name).weights, tolerance)
            assert getattr(one, name).score == pytest.approx(getattr(other, name).score, abs=tolerance)
        for name, score in one.scores.items():
            assert score.value == pytest.approx(other.scores[name].value, abs=tolerance)
            assert score.interval == pytest.approx(other.scores[name].interval, abs=10 * tolerance)
            assert (score.n, score.permutations) == (N, 19)
    for role, logits in actual.logits.items():
        close(logits, expected.logits[role], tolerance)


def assert_without_teacher(actual: Explanation[Any], expected: Explanation[Any], tolerance: float) -> None:
    """Asserts that ``actual`` is the part of ``expected`` that does not involve the teacher."""
    assert set(actual.logits) == {"student", "base"}
    for layer, result in actual.layers.items():
        assert result.missed is None and result.new is None
        assert list(result.scores) == ["RS(S)", "RS(B)", "RS(S|B)", "RS(B|S)"] and list(result.contrasts) == [
            "RS(S|B) - RS(B|S)",
            "RS(S) - RS(B)",
        ]
        for name, score in result.scores.items():
            whole = expected.layers[layer].scores[name]
            assert score.value == pytest.approx(whole.value, abs=tolerance) and score.p_value == whole.p_value
            assert score.interval == pytest.approx(whole.interval, abs=10 * tolerance)
        for name in ("distilled", "residual"):
            close(getattr(result, name).maps, getattr(expected.layers[layer], name).maps, tolerance)
        with pytest.raises(KdxError, match="there is none"):
            _ = result.fss
        assert result.rs is result.scores["RS(S)"]


def assert_same_maps(actual: Explanation[Any], expected: Explanation[Any], tolerance: float) -> None:
    for layer, one in actual.layers.items():
        for name in pairs_among(ROLES):
            close(getattr(one, name).maps, getattr(expected.layers[layer], name).maps, tolerance)
            assert getattr(one, name).score == pytest.approx(getattr(expected.layers[layer], name).score, abs=tolerance)


def files(folder: Path) -> dict[str, Path]:
    return {role: next(folder.glob(f"{role}-*.onnx")) for role in ("student", "base", "teacher")}


class StandInEngines:
    """Stands in for TensorRT: an engine is a note of its ONNX file, which ONNX Runtime then runs."""

    def __init__(self) -> None:
        self.built: dict[str, tuple[Any, Any]] = {}
        self.tf32: set[bool] = set()
        self.current: torch.device | None = None
        self.devices: set[torch.device | None] = set()

    def install(self, patch: pytest.MonkeyPatch, precision: Precision = "float32") -> None:
        """Make these the engines of an Explainer with the runtime tensorrt."""
        choice = Choice("tensorrt", torch.device("cpu"), "for a test", precision)
        patch.setattr("kdx.explain.networks.choose", lambda *_, **__: choice)
        patch.setattr("kdx.explain.exported.engine.build", self.build)
        patch.setattr("torch.cuda.device", self.on)
        patch.setattr("kdx.explain.exported.open_file", self.open)

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Stands in for torch.cuda.device, which makes a GPU the current one."""
        self.current = device
        yield
        self.current = None

    def build(self, path: Path, built: Path, *, batch: Any, image_size: Any, tf32: bool) -> None:
        role, _, rest = built.stem.partition("-")
        self.built[role + Path(rest).suffix] = batch, image_size
        self.devices.add(self.current)
        self.tf32.add(tf32)
        built.write_text(str(path))

    def open(self, path: Path, _: Choice) -> OnnxRuntimeRunner:
        assert path.suffix == ".engine"
        return OnnxRuntimeRunner(Path(path.read_text()))


def refuse_export(*_: object) -> None:
    raise KdxError("No export in this test.", "None.")
