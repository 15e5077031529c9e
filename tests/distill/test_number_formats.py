"""Mixed precision, memory layout and compilation leave a training what it is, except for rounding."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from kdx.distill import EpochResult, TrainingSettings, blocked_layout, distill, train
from kdx.distill.number_formats import CompiledGraph, autocast, check_channels_last, check_settings, has_bfloat16
from kdx.distill.processes import SINGLE, Processes
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph, Preprocessing
from tests.distill.small import QUICK, STUDENT, TEACHER

CPU = torch.device("cpu")


def network(classes: int = 7) -> nn.Sequential:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU(inplace=True))
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, classes)
    )


@pytest.mark.slow
def test_a_compiled_graph_has_the_outputs_and_gradients_of_the_graph() -> None:
    preprocessing = Preprocessing(mean=(0.4,), std=(0.3,))
    plain, other = network(), network()
    graph, compiled = FeatureGraph(plain, ["1", "3"], preprocessing), CompiledGraph(other, ["1", "3"], preprocessing, "aot_eager")
    for count in (6, 6, 5):
        images = torch.rand(count, 3, 12, 12)
        expected, actual = graph(images), compiled(images)
        for one, two in zip(expected, actual, strict=True):
            torch.testing.assert_close(one, two)
        for outputs in (expected, actual):
            torch.autograd.backward(sum((output.square().sum() for output in outputs), torch.zeros(())))
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        torch.testing.assert_close(one.grad, two.grad)
    for layers in ([], ["1"], ["3", "1"]):  # other layers of an equal network
        images = torch.rand(6, 3, 12, 12)
        another = CompiledGraph(network(), layers, preprocessing, "aot_eager")(images)
        for one, two in zip(FeatureGraph(network(), layers, preprocessing)(images), another, strict=True):
            torch.testing.assert_close(one, two)
    assert compiled.network.state_dict().keys() == plain.state_dict().keys()
    averaged = copy.deepcopy(compiled.network)  # as the average of the weights is made
    torch.testing.assert_close(FeatureGraph(averaged.eval(), [], preprocessing)(images)[0], compiled.eval()(images)[0])


def losses(out: Path, settings: TrainingSettings, teacher: Path, student: str) -> list[float]:
    """The student's loss per epoch under a trained teacher."""
    results: list[EpochResult] = []
    distill(
        "digits", teacher=f"{TEACHER}@{teacher / 'teacher.safetensors'}", student=student, out=out, settings=settings, device="cpu",
        report=results.append,
    )  # fmt: skip
    return [result.loss for result in results if result.loss is not None and result.network == "student"]


@pytest.mark.parametrize("method", ["kd", pytest.param("at", marks=pytest.mark.slow)])
def test_bfloat16_and_channels_last_train_as_float32_does(finished: Path, tmp_path: Path, method: str) -> None:
    settings = replace(QUICK, method=method, student_images=60, epochs=2)
    wide = "kdx:resnet,width=8,depth=1,stages=2"
    expected = losses(tmp_path / "plain", settings, finished, wide)
    assert losses(tmp_path / "layout", replace(settings, channels_last=True), finished, wide) == pytest.approx(expected, rel=1e-4)
    if has_bfloat16(CPU):
        expected = losses(tmp_path / "narrow", settings, finished, STUDENT)
        assert losses(tmp_path / "half", replace(settings, precision="bfloat16"), finished, STUDENT) == pytest.approx(expected, rel=0.05)
        weights = load_file(tmp_path / "half" / "student.safetensors")
        assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in weights.values())


@pytest.mark.parametrize(("capability", "channels", "refused"), [("AVX2", 12, True), ("AVX2", 16, False), ("AVX512", 12, False)])
def test_a_layout_for_which_pytorch_overwrites_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: str, channels: int, refused: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    convolutions = nn.Sequential(nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 10, 1))
    if refused:
        with pytest.raises(KdxError, match="the layer 1 with --channels-last: its 12 channels"):
            check_channels_last(convolutions, CPU)
    else:
        check_channels_last(convolutions, CPU)


@pytest.mark.parametrize(("capability", "channels", "safe"), [("AVX2", 12, False), ("AVX2", 16, True), ("AVX512", 12, True)])
def test_a_compiled_network_does_not_get_that_layout(monkeypatch: pytest.MonkeyPatch, capability: str, channels: int, safe: bool) -> None:
    given: list[dict[str, bool] | None] = []
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch, "compile", lambda function, backend, options: given.append(options))
    convolutions = nn.Sequential(nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 10, 1))
    CompiledGraph(convolutions, [], Preprocessing(mean=(0.4,), std=(0.3,)))
    assert given == [None if safe else {"layout_optimization": False}]


def last(classes: int = 10) -> nn.Module:
    """A user's network whose weights have channels last."""
    return network(classes).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_setting_chooses_the_layout_and_not_the_network(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels_last: bool
) -> None:
    layouts: set[bool] = set()
    convolve = nn.Conv2d.forward

    def observed(self: nn.Conv2d, features: torch.Tensor) -> torch.Tensor:
        result = convolve(self, features)
        if torch.is_grad_enabled() and self.training:
            layouts.add(result.is_contiguous(memory_format=torch.channels_last))
        return result

    monkeypatch.setattr(nn.Conv2d, "forward", observed)
    monkeypatch.setattr(blocked_layout, "suits", lambda *_: False)
    monkeypatch.setattr(train, "rehearse", lambda *_: None)  # it is no training
    settings = replace(QUICK, student_images=60, epochs=1, channels_last=channels_last)
    losses(tmp_path, settings, finished, "tests.distill.test_number_formats:last")
    assert layouts == {channels_last}


def test_networks_compute_in_bfloat16() -> None:
    graph = FeatureGraph(network(), ["3"])
    exact = graph(torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)))
    with autocast(TrainingSettings(precision="bfloat16"), CPU):
        rounded = graph(torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)))
    assert rounded[1].dtype == torch.float32
    assert torch.equal(rounded[1], rounded[1].bfloat16().float()) and not torch.equal(exact[1], rounded[1])


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_a_compiled_training_is_the_training(finished: Path, tmp_path: Path) -> None:
    settings = replace(QUICK, method="at", student_images=60, epochs=2)
    expected = losses(tmp_path / "plain", settings, finished, STUDENT)
    assert losses(tmp_path / "compiled", replace(settings, compile=True), finished, STUDENT) == pytest.approx(expected, rel=1e-3)


def test_settings_that_a_machine_cannot_train_with_are_refused() -> None:
    with pytest.raises(KdxError, match="float16 needs a GPU"):
        check_settings(TrainingSettings(precision="float16"), CPU, SINGLE)
    with pytest.raises(KdxError, match="batch of 8 images cannot be split into 6 parts"):
        check_settings(TrainingSettings(batch=8, accumulate=2), CPU, Processes(0, 3))
    with pytest.raises(KdxError, match="ofd reads features before the activation"):
        check_settings(TrainingSettings(method="ofd", compile=True), CPU, SINGLE)
    with pytest.raises(KdxError, match="crd stores numbers of every image"):
        check_settings(TrainingSettings(method="crd"), CPU, Processes(0, 2))
    check_settings(TrainingSettings(method="crd"), CPU, SINGLE)
