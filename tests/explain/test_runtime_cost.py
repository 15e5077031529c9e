"""The runtime `auto`: it exports when that pays, says why, and takes exports from the cache."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kdx
from kdx import Explainer
from kdx.explain import export_cache, runtime_cost
from kdx.explain.runtime_cost import ExportCost
from kdx.export import onnx_file
from kdx.export.graphs import FeatureGraph, GradientGraph, Preprocessing
from kdx.models.network import Network
from kdx.runtimes.eager import EagerRunner
from kdx.runtimes.runner import NetworkOutputs

pytestmark = pytest.mark.usefixtures("no_gpu")

REFERENCE = "kdx:resnet,width=4,depth=1,stages=1,classes=3"
SIZE = (16, 16)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(export_cache, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "networks"


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were exported, by a stand-in that takes no time."""
    written: list[Path] = []

    def write(_graph: Any, path: Path, **_: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"an export")
        path.with_name(f"{path.name}.parity.json").write_bytes(b"{}")
        written.append(path)

    monkeypatch.setattr(onnx_file, "write", write)
    monkeypatch.setattr("kdx.explain.exported.is_export_of", lambda path, *_: path.exists())
    monkeypatch.setattr("kdx.explain.networks.open_exported", lambda path, *_: _Eager(path))
    return written


class _Eager:
    """Stands for the runner of a file: it gives what a network in PyTorch gives."""

    max_batch = None

    def __init__(self, path: Path) -> None:
        torch.manual_seed(int(path.stem.startswith("base")))
        self.network = FeatureGraph(kdx.models.load(REFERENCE).module.eval(), ["layer1"], Preprocessing(SIZE, (0.5,), (0.5,)))

    def infer(self, images: torch.Tensor) -> Any:
        logits, features = self.network(images)
        return NetworkOutputs(logits, {"layer1": features})

    def close(self) -> None: ...


def network(seed: int) -> Network:
    torch.manual_seed(seed)
    return replace(kdx.models.load(REFERENCE), preprocessing=Preprocessing(SIZE, (0.5,), (0.5,)))


@pytest.fixture
def explainer(exports: list[Path]) -> Iterator[Explainer]:
    assert not exports
    with Explainer(student=network(0), base=network(1), layers=["layer1"], runtime="auto", permutations=0) as opened:
        yield opened


def images(n: int) -> torch.Tensor:
    return torch.rand(n, 3, *SIZE, generator=torch.Generator().manual_seed(n))


def set_cost(monkeypatch: pytest.MonkeyPatch, exporting: float, saved: float) -> None:
    monkeypatch.setattr(ExportCost, "measured", lambda *_: ExportCost(2, exporting, saved))


def test_a_small_set_runs_in_pytorch_and_a_large_one_is_exported(
    explainer: Explainer, exports: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_cost(monkeypatch, 6.0, 0.01)
    explainer.open(SIZE, 600)
    assert explainer.choice.runtime == "eager" and exports == []
    assert explainer.choice.why == (
        "eager on the CPU: onnx would save about 6.0 s for 600 images, and exporting 2 networks takes about 6.0 s"
    )
    with Explainer(student=network(0), base=network(1), layers=["layer1"]) as larger:
        larger.open(SIZE, 1000)
        assert larger.choice.runtime == "onnx" and len(exports) == 2
        assert larger.choice.why == (
            "onnx on the CPU: onnx would save about 10 s for 1,000 images, and exporting 2 networks takes about 6.0 s"
        )


def test_calls_are_counted_until_an_export_pays(explainer: Explainer, exports: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    set_cost(monkeypatch, 6.0, 0.2)
    labels = [0, 1, 2] * 4
    first = explainer(images(12), labels)
    assert explainer.choice.runtime == "eager" and not exports
    explainer(images(12), labels)
    assert explainer.choice.runtime == "eager"
    explainer(images(12), labels)
    assert explainer.choice.runtime == "onnx" and len(exports) == 2
    again = explainer(images(12), labels)
    assert len(exports) == 2
    assert torch.allclose(first.layers["layer1"].distilled.maps, again.layers["layer1"].distilled.maps, rtol=1e-4)


def test_a_resumed_run_keeps_its_runtime(explainer: Explainer, exports: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    set_cost(monkeypatch, 6.0, 1.0)
    explainer.open(SIZE, 600, runtime="eager")
    assert explainer.choice.runtime == "eager" and "started with it" in explainer.choice.why and not exports
    with Explainer(student=network(0), base=network(1), layers=["layer1"]) as other:
        other.open(SIZE, 4, runtime="onnx")
        assert other.choice.runtime == "onnx"


def test_an_export_in_the_cache_is_used_for_any_number_of_images(exports: list[Path], cache: Path) -> None:
    for count in range(2):
        runtime = ("onnx", "auto")[count]
        with Explainer(student=network(0), base=network(1), layers=["layer1"], runtime=runtime) as opened:  # type: ignore[arg-type]
            opened(images(4), [0, 0, 1, 1])
            assert opened.choice.runtime == "onnx" and len(exports) == 2
    assert opened.choice.why == "onnx on the CPU: the networks are exported already"
    assert len(list(cache.glob("*.onnx"))) == 2 and len(list(cache.iterdir())) == 4


def test_the_measured_cost_grows_with_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_cost, "_loop_seconds", lambda: runtime_cost._STEPS_SECONDS)
    device = torch.device("cpu")
    runners = [EagerRunner(FeatureGraph(network(seed).module, ["layer1"]), device) for seed in range(2)]
    one, two = (ExportCost.measured(runners[:count], SIZE, 1, 1) for count in (1, 2))
    assert (one.networks, two.networks) == (1, 2) and two.exporting > one.exporting
    assert 0 < one.saved < 1 and not one.pays(10) and one.pays(10**9)


def test_an_export_is_expected_to_take_longer_where_python_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = EagerRunner(FeatureGraph(network(0).module, ["layer1"]), torch.device("cpu"))
    costs = []
    for slowness in (1, 4):
        monkeypatch.setattr(runtime_cost, "_loop_seconds", lambda slowness=slowness: slowness * runtime_cost._STEPS_SECONDS)
        costs.append(ExportCost.measured([runner], SIZE, 1, 1).exporting)
    assert costs[1] == pytest.approx(4 * costs[0], rel=0.3)  # the passes are measured as they are


class Renamed(nn.ReLU):
    """Another module in the place of a ReLU, with the same weights: none."""


def test_the_key_depends_on_everything_that_the_file_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made, graph = network(0), FeatureGraph(network(0).module, ["layer1"], network(0).preprocessing)
    path = export_cache.cached_path(made, graph, SIZE)
    assert path is not None and path == export_cache.cached_path(network(0), graph, SIZE)
    changed = network(0)
    changed.module.add_module("relu", Renamed())
    others = [
        export_cache.cached_path(network(1), graph, SIZE),
        export_cache.cached_path(replace(made, reference=REFERENCE.replace("depth=1", "depth=2")), graph, SIZE),
        export_cache.cached_path(changed, graph, SIZE),
        export_cache.cached_path(made, FeatureGraph(made.module, ["layer1", "conv1"], made.preprocessing), SIZE),
        export_cache.cached_path(made, FeatureGraph(made.module, ["layer1"]), SIZE),
        export_cache.cached_path(made, GradientGraph(made.module, ["layer1"], made.preprocessing), SIZE),
        export_cache.cached_path(made, GradientGraph(made.module, ["conv1"], made.preprocessing, "layer1"), SIZE),
        export_cache.cached_path(made, graph, (16, 17)),
    ]
    monkeypatch.setattr(export_cache, "versions", lambda: {"torch": "9"})
    others.append(export_cache.cached_path(made, graph, SIZE))
    monkeypatch.setattr(export_cache, "_code_hash", lambda: "other code")
    others.append(export_cache.cached_path(made, graph, SIZE))
    assert None not in others and len({path, *others}) == 1 + len(others)


def test_networks_whose_code_a_reference_does_not_identify_are_not_cached() -> None:
    patched = network(0)
    object.__setattr__(patched.module, "forward", patched.module.forward)
    graph = FeatureGraph(patched.module, ["layer1"])
    for made in (patched, replace(network(0), reference="nets:small"), replace(network(0), reference="Small")):
        assert export_cache.cached_path(made, graph, SIZE) is None


def file_of(folder: Path, name: str, size: int) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / f"{name}.onnx"
    path.write_bytes(name.encode() * size)
    path.with_name(f"{name}.onnx.parity.json").write_text("{}")
    return path


def test_the_cache_keeps_what_was_used_last(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_cache, "LIMIT", 400)
    for index, name in enumerate("abcd"):
        export_cache.keep(file_of(tmp_path, name, 100), cache / f"{name}.onnx")
        os.utime(cache / f"{name}.onnx", (index, index))
    assert export_cache.take(cache / "a.onnx", tmp_path / "copy.onnx")
    assert (tmp_path / "copy.onnx").read_bytes() == b"a" * 100
    export_cache.keep(file_of(tmp_path, "e", 100), cache / "e.onnx")
    assert sorted(path.stem for path in cache.glob("*.onnx")) == ["a", "c", "d", "e"]
    assert len(list(cache.iterdir())) == 8
    export_cache.keep(file_of(tmp_path, "f", 101), cache / "f.onnx")  # more than a quarter
    assert not (cache / "f.onnx").exists() and not export_cache.take(cache / "f.onnx", tmp_path / "copy.onnx")


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    export_cache.keep(file_of(tmp_path, "a", 10), tmp_path / "file" / "a.onnx")
    assert not export_cache.take(tmp_path / "file" / "a.onnx", tmp_path / "b.onnx")


def test_readers_see_whole_files_while_one_is_written(tmp_path: Path, cache: Path) -> None:
    source, cached = file_of(tmp_path, "a", 3_000_000), cache / "a.onnx"
    export_cache.keep(source, cached)
    wrong: list[int] = []

    def use(number: int) -> None:
        for step in range(10):
            if number == 0:
                export_cache.keep(source, cached)
            elif export_cache.take(cached, tmp_path / f"{number}-{step}.onnx"):
                wrong.append((tmp_path / f"{number}-{step}.onnx").stat().st_size - 3_000_000)

    threads = [threading.Thread(target=use, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong and not any(wrong)
