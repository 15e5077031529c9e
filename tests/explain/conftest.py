"""The fixtures of the tests of the Explainer and of explainer files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kdx.explain.explainer import Explainer
from kdx.explain.graph import explainer_graph
from kdx.explain.results import Explanation
from kdx.export import onnx_file
from kdx.export.description import Origin
from kdx.export.graphs import FeatureGraph, Preprocessing
from tests.explain.small_networks import SIZE, explainer, images, labels, named_networks
from tests.explain.written_files import FILE, FIXED, Written, network, written
from tests.made_once import made_once


@pytest.fixture(scope="session")
def eager() -> Iterator[Explainer]:
    with explainer() as opened:
        yield opened


@pytest.fixture(scope="session")
def explained(eager: Explainer) -> Explanation[Any]:
    return eager(images(), labels())


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files that an explainer exported."""

    def export(path: Path) -> None:
        with explainer(runtime="onnx", folder=path, **named_networks()) as opened:
            opened.open(SIZE)

    return made_once(tmp_path_factory, "networks", export)


@pytest.fixture(scope="session")
def salient() -> Explanation[Any]:
    with explainer(features="salient", keep=0.4) as opened:
        return opened(images(), labels())


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Student and base with a wider teacher, whose layers have other names, at another size; images of any size."""
    own, teachers = Preprocessing((12, 10), (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)), Preprocessing((16, 12), (0.5,), (0.3,))
    networks = {
        "student": network(0, 4, 5, own, stages=1),
        "base": network(1, 4, 5, own, stages=1),
        "teacher": network(2, 6, 5, teachers),
    }
    return written(tmp_path_factory.mktemp("trio"), networks, {"layer1": "layer2", "relu": "layer1.0.bn2"}, (16, 12))


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Student and base alone, which take images as they are, of one size."""
    networks = {"student": network(3, 4, 3, Preprocessing()), "base": network(4, 3, 3, Preprocessing())}
    layers = {"layer2": "layer2"}
    folder = made_once(tmp_path_factory, "pair", lambda folder: written(folder, networks, layers, FIXED))
    return Written(folder / FILE, explainer_graph(networks, layers), networks, layers)


@pytest.fixture(scope="module")
def features_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features") / "net.onnx"
    made = network(0, 2, 3, Preprocessing(), stages=1)
    onnx_file.write(FeatureGraph(made.module, ["layer1"]), path, origin=Origin("a:b", ""), image_size=FIXED)
    return path
