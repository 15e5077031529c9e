"""Runners against each other and against the network itself; every choice of runtime and device."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdx import runtime
from kdx.errors import KdxError
from kdx.export import onnx_file
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.models import weights_hash
from kdx.runtime import Choice, EagerRunner, OrtRunner, Runner, RuntimeName, choose

CPU = torch.device("cpu")
TOLERANCE = 1e-5
"""Of an output's largest value: float32 sums in another order."""


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 4, 3, 2)
        self.fc = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.conv2(self.norm(self.conv1(images)).relu()).relu().mean((2, 3)))
        return logits


@pytest.fixture(scope="session")
def network() -> nn.Module:
    torch.manual_seed(0)
    module = Small()
    module(torch.rand(7, 3, 9, 9))  # moves the norm's statistics off their start
    return module.eval()


@pytest.fixture(scope="session")
def path(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runtime") / "small.onnx"
    onnx_file.write(graph(network), path, reference="Small", weights=weights_hash(network), image_size=(11, 9))
    return path


def graph(network: nn.Module) -> FeatureGraph:
    return FeatureGraph(network, ["conv2", "norm"], Preprocessing(None, (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)))


def images(n: int, size: tuple[int, int] = (11, 9)) -> Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(n))


# ---- runners ----


@pytest.mark.parametrize("n", [1, 4, 7])
def test_both_runners_give_the_networks_outputs(network: nn.Module, path: Path, n: int) -> None:
    with torch.no_grad():
        logits, conv2, norm = graph(network)(images(n))
    with EagerRunner(graph(network), CPU) as eager, OrtRunner(path) as ort:
        assert eager.layers == ort.layers == ("conv2", "norm") and (eager.runtime, ort.runtime) == ("eager", "onnx")
        for runner in (eager, ort):
            found = runner.infer(images(n))
            assert list(found.features) == ["conv2", "norm"]
            for ours, theirs in ((found.logits, logits), (found.features["conv2"], conv2), (found.features["norm"], norm)):
                assert ours.shape == theirs.shape and not ours.requires_grad and ours.device == runner.device == CPU
                assert float((ours - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max())


def test_threads_change_no_output(path: Path) -> None:
    one, more = OrtRunner(path, threads=1).infer(images(5)), OrtRunner(path).infer(images(5))
    assert float((one.logits - more.logits).abs().max()) <= TOLERANCE * float(one.logits.abs().max())


def test_images_of_any_floating_type_and_layout_run_in_both(network: nn.Module, path: Path) -> None:
    pixels = images(5)
    strided = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for runner in (EagerRunner(graph(network), CPU), OrtRunner(path)):
        expected = runner.infer(pixels).logits
        for kind in (pixels.double(), strided, torch.from_numpy(pixels.numpy().astype(np.float64))):
            found = runner.infer(kind).logits
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected)


def test_a_network_in_float64_runs_in_eager_on_float32_images() -> None:
    torch.manual_seed(0)
    wide = Small().double()
    found = EagerRunner(graph(wide), CPU).infer(images(3))
    assert found.logits.dtype == torch.float64
    with torch.no_grad():
        torch.testing.assert_close(found.logits, graph(wide.eval())(images(3).double())[0])


def test_a_runner_evaluates_whatever_mode_the_graph_is_in(network: nn.Module) -> None:
    training = graph(network).train()
    found = EagerRunner(training, CPU).infer(images(5))
    with torch.no_grad():
        assert torch.equal(found.logits, graph(network.eval())(images(5))[0])


def test_a_closed_runner_raises(network: nn.Module, path: Path) -> None:
    runners: tuple[Runner, ...] = EagerRunner(graph(network), CPU), OrtRunner(path)
    for runner in runners:
        with runner:
            runner.infer(images(1))
        with pytest.raises(ValueError, match="closed"):
            runner.infer(images(1))
        runner.close()  # twice is no mistake


def test_a_file_of_one_image_size_refuses_others(path: Path) -> None:
    runner = OrtRunner(path)
    with pytest.raises(KdxError, match="takes images of 11 x 9, and was given 9 x 11"):
        runner.infer(images(2, (9, 11)))


def test_a_runner_of_a_file_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no network")
    for name in ("text.onnx", "absent.onnx"):
        with pytest.raises(KdxError, match=name):
            OrtRunner(tmp_path / name)


# ---- the choice ----


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with ONNX Runtime and without a GPU."""
    return _machine(monkeypatch, onnx=True, cuda=False)


def _machine(monkeypatch: pytest.MonkeyPatch, *, onnx: bool, cuda: bool) -> pytest.MonkeyPatch:
    real = importlib.util.find_spec
    found = importlib.util.find_spec("math") if onnx else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: found if name == "onnxruntime" else real(name, *rest))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 if cuda else 0)
    return monkeypatch


RUNS = {
    # (runtime, device, files, ONNX Runtime, GPU) -> (runtime, device)
    ("auto", "auto", False, True, False): ("onnx", "cpu"),
    ("auto", "cpu", False, True, False): ("onnx", "cpu"),
    ("auto", "auto", False, False, False): ("eager", "cpu"),
    ("auto", "cpu", False, False, False): ("eager", "cpu"),
    ("auto", "auto", False, True, True): ("eager", "cuda"),
    ("auto", "cuda", False, True, True): ("eager", "cuda"),
    ("auto", "cuda:1", False, False, True): ("eager", "cuda:1"),
    ("auto", "cpu", False, True, True): ("onnx", "cpu"),
    ("auto", "cpu", False, False, True): ("eager", "cpu"),
    ("auto", "auto", True, True, False): ("onnx", "cpu"),
    ("auto", "auto", True, True, True): ("onnx", "cpu"),
    ("auto", "cpu", True, True, True): ("onnx", "cpu"),
    ("eager", "auto", False, True, False): ("eager", "cpu"),
    ("eager", "auto", False, False, True): ("eager", "cuda"),
    ("eager", "cpu", False, False, True): ("eager", "cpu"),
    ("eager", "cuda:0", False, True, True): ("eager", "cuda:0"),
    ("onnx", "auto", False, True, False): ("onnx", "cpu"),
    ("onnx", "auto", False, True, True): ("onnx", "cpu"),
    ("onnx", "cpu", True, True, False): ("onnx", "cpu"),
}

FAILS = {
    ("eager", "auto", True, True, False): "An .onnx file cannot run in PyTorch",
    ("eager", "cpu", True, False, True): "An .onnx file cannot run in PyTorch",
    ("onnx", "auto", False, False, False): "needs the package onnxruntime",
    ("onnx", "auto", False, False, True): "needs the package onnxruntime",
    ("auto", "auto", True, False, False): "needs the package onnxruntime",
    ("onnx", "cuda", False, True, True): "run on the CPU",
    ("auto", "cuda", True, True, True): "run on the CPU",
    ("auto", "cuda", False, True, False): "device 'cuda' cannot run here",
    ("eager", "cuda:1", False, True, False): "device 'cuda:1' cannot run here",
    ("onnx", "cuda", False, True, False): "device 'cuda' cannot run here",
    ("auto", "tpu", False, True, True): "device 'tpu' cannot run here",
    ("auto", "", False, True, False): "device '' cannot run here",
    ("tensorrt", "auto", False, True, True): "There is no runtime 'tensorrt'",
    ("", "auto", False, True, True): "There is no runtime ''",
}


@pytest.mark.parametrize("case", RUNS)
def test_a_choice_that_can_run_is_the_one_asked_for_or_the_best(
    case: tuple[RuntimeName, str, bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, device, files, onnx, cuda = case
    _machine(monkeypatch, onnx=onnx, cuda=cuda)
    found = choose(name, device, files=files)
    assert (found.runtime, str(found.device)) == RUNS[case]
    assert found.why.startswith(found.runtime) and "\n" not in found.why
    if name != "auto":
        assert "as asked" in found.why
    elif found.runtime == "eager" and not cuda:  # never in silence
        assert "not installed" in found.why and "kdx[cpu]" in found.why


@pytest.mark.parametrize("case", FAILS)
def test_a_choice_that_cannot_run_is_an_error_with_its_mend(
    case: tuple[RuntimeName, str, bool, bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, device, files, onnx, cuda = case
    _machine(monkeypatch, onnx=onnx, cuda=cuda)
    with pytest.raises(KdxError) as caught:
        choose(name, device, files=files)
    assert FAILS[case] in caught.value.problem
    assert caught.value.mend and ("kdx[cpu]" in caught.value.mend) == ("onnxruntime" in caught.value.problem)


@pytest.mark.parametrize("device", ["cuda:x", "cuda:-1", "cuda:2", "cuda:", "cudax"])
def test_a_gpu_that_pytorch_does_not_see_is_an_error(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, onnx=True, cuda=True)
    with pytest.raises(KdxError, match="cannot run here"):
        choose("eager", device)


def test_the_same_choice_compares_equal(machine: pytest.MonkeyPatch) -> None:
    assert choose("auto") == choose("auto", "auto") == Choice("onnx", CPU, choose("auto").why)
    assert runtime.RUNTIMES == ("auto", "eager", "onnx")


def test_without_onnx_runtime_a_file_cannot_be_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(KdxError) as caught:
        OrtRunner(path)
    assert "onnxruntime" in caught.value.problem and "kdx[cpu]" in caught.value.mend
