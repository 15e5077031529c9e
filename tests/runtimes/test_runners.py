"""Properties of every runner: the network's outputs, named tensors, layouts, threads, shapes and closing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kdx.errors import KdxError
from kdx.export import onnx_file
from kdx.export.description import Origin
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.runtimes.eager import EagerRunner
from kdx.runtimes.onnx_runtime import OnnxRuntimeRunner
from kdx.runtimes.openvino import OpenVinoRunner
from kdx.runtimes.runner import Runner
from tests.runtimes.small_network import CPU, TOLERANCE, graph, images

pytest.importorskip("openvino")


def runners(network: nn.Module, path: Path) -> tuple[Runner, ...]:
    return EagerRunner(graph(network), CPU), OnnxRuntimeRunner(path), OpenVinoRunner(path)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_every_runner_gives_the_networks_outputs(network: nn.Module, path: Path, n: int) -> None:
    with torch.no_grad():
        logits, conv2, norm = graph(network)(images(n))
    assert [runner.runtime for runner in runners(network, path)] == ["eager", "onnx", "openvino"]
    for opened in runners(network, path):
        with opened as runner:
            assert runner.layers == ("conv2", "norm")
            actual = runner.infer(images(n))
            assert list(actual.features) == ["conv2", "norm"]
            for ours, theirs in ((actual.logits, logits), (actual.features["conv2"], conv2), (actual.features["norm"], norm)):
                assert ours.shape == theirs.shape and not ours.requires_grad and ours.device == runner.device == CPU
                assert float((ours - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max())


def test_named_tensors_go_in_and_come_out(network: nn.Module, path: Path) -> None:
    for runner in runners(network, path):
        actual = runner.run({"images": images(5)})
        assert runner.kind == "features" and list(actual) == ["logits", "conv2", "norm"]
        passed = runner.infer(images(5))
        assert torch.equal(passed.logits, actual["logits"]) and torch.equal(passed.features["norm"], actual["norm"])
        assert all(output.is_contiguous() for output in actual.values())


def test_every_runner_takes_images_of_any_number_type_and_layout(network: nn.Module, path: Path) -> None:
    pixels = images(5)
    strided = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    every_other = torch.stack([pixels, -pixels], 1).flatten(0, 1)[::2]
    turned = pixels.flip(3).contiguous().flip(3)
    for runner in runners(network, path):
        expected = runner.infer(pixels).logits
        for kind in (pixels.double(), strided, every_other, turned, torch.from_numpy(pixels.numpy().astype(np.float64))):
            actual = runner.infer(kind).logits
            assert actual.dtype == torch.float32
            torch.testing.assert_close(actual, expected)
        for rounded in (pixels.half(), pixels.bfloat16()):
            torch.testing.assert_close(runner.infer(rounded).logits, runner.infer(rounded.float()).logits)
        whole = (pixels * 3).to(torch.uint8)
        torch.testing.assert_close(runner.infer(whole).logits, runner.infer(whole.float()).logits)
        watched = pixels.clone().requires_grad_()
        assert not runner.infer(watched).logits.requires_grad


def test_a_pass_does_not_change_earlier_results_or_its_inputs(network: nn.Module, path: Path) -> None:
    first, second, third = OnnxRuntimeRunner(path), OnnxRuntimeRunner(path), OpenVinoRunner(path)
    pixels = images(4)
    actual = [runner.infer(pixels) for runner in (first, second, third, EagerRunner(graph(network), CPU))]
    kept = [passed.features["norm"].clone() for passed in actual]
    for runner in (first, second, third):
        runner.infer(images(7))
        runner.infer(1 - pixels)
        runner.close()
    assert torch.equal(pixels, images(4))
    assert all(torch.equal(passed.features["norm"], before) for passed, before in zip(actual, kept, strict=True))


def test_threads_share_a_runner(network: nn.Module, path: Path) -> None:
    for runner in runners(network, path):
        expected = {n: runner.infer(images(n)).logits for n in range(1, 7)}
        with ThreadPoolExecutor(6) as pool:
            actual = dict(zip(expected, pool.map(runner.infer, map(images, expected)), strict=True))
        for n, logits in expected.items():
            torch.testing.assert_close(actual[n].logits, logits)


@pytest.mark.parametrize("feeds", [{}, {"image": images(2)}, {"images": images(2), "target": images(2)}], ids=len)
def test_names_that_are_not_the_graphs_are_a_value_error(feeds: dict[str, Tensor], network: nn.Module, path: Path) -> None:
    for runner in runners(network, path):
        with pytest.raises(ValueError, match="the graph takes images, not"):
            runner.run(feeds)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 9, 11), "takes images of 11 x 9, not 9 x 11"),
        ((2, 1, 11, 9), r"takes images \[batch, 3, 11, 9\], not \[2, 1, 11, 9\]"),
        ((3, 11, 9), r"takes images \[batch, 3, 11, 9\], not \[3, 11, 9\]"),
        ((0, 3, 11, 9), "images is empty"),
    ],
)
def test_a_shape_that_the_file_does_not_take_is_an_error(shape: tuple[int, ...], message: str, path: Path) -> None:
    for runner in (OnnxRuntimeRunner(path), OpenVinoRunner(path)):
        with pytest.raises(KdxError, match=message):
            runner.run({"images": torch.zeros(shape)})


def test_a_file_for_any_size_takes_any(network: nn.Module, tmp_path: Path) -> None:
    resizing = FeatureGraph(network, ["norm"], Preprocessing((11, 9), (0.5,), (0.2,)))
    onnx_file.write(resizing, tmp_path / "a.onnx", origin=Origin("Small", "abc"), image_size=(13, 8))
    for runner in (OnnxRuntimeRunner(tmp_path / "a.onnx"), OpenVinoRunner(tmp_path / "a.onnx")):
        for size in ((11, 9), (24, 31), (5, 4)):
            actual, expected = runner.infer(images(3, size)), EagerRunner(resizing, CPU).infer(images(3, size))
            torch.testing.assert_close(actual.features["norm"], expected.features["norm"])


def test_a_closed_runner_raises(network: nn.Module, path: Path) -> None:
    for runner in runners(network, path):
        with runner:
            runner.infer(images(1))
        with pytest.raises(ValueError, match="closed"):
            runner.infer(images(1))
        with pytest.raises(ValueError, match="closed"):
            runner.run({"images": images(1)})
        runner.close()  # a second call does nothing


def test_a_missing_or_invalid_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no network")
    for name in ("text.onnx", "absent.onnx"):
        for kind in (OnnxRuntimeRunner, OpenVinoRunner):
            with pytest.raises(KdxError, match=name):
                kind(tmp_path / name)
