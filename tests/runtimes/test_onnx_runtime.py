"""The runtime onnx: named inputs, execution providers, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from kdx.errors import KdxError
from kdx.runtimes.choice import Choice, open_file
from kdx.runtimes.onnx_runtime import OnnxRuntimeRunner, _session, _strays
from tests.runtimes.fakes import FakeOnnxRuntime
from tests.runtimes.small_network import CPU, check_on_gpu, images


def rewritten(path: Path, to: Path, **entries: object) -> onnx.ModelProto:
    model = onnx.load(path)
    for entry in model.metadata_props:
        name = entry.key.removeprefix("kdx.")
        if name in entries:
            entry.value = json.dumps(entries[name])
    onnx.save(model, to)
    return model


@pytest.fixture
def two_inputs(path: Path, tmp_path: Path) -> Path:
    """A file with the inputs images and cotangent, and the outputs logits and logits * cotangent, described as one of gradients."""
    to = tmp_path / "two.onnx"
    model = rewritten(path, to, kind="gradients")
    model.graph.input.append(onnx.helper.make_tensor_value_info("cotangent", onnx.TensorProto.FLOAT, ["batch", 5]))
    model.graph.node.append(onnx.helper.make_node("Mul", ["logits", "cotangent"], ["gradient/conv2"]))
    del model.graph.output[1:]
    model.graph.output.append(onnx.helper.make_tensor_value_info("gradient/conv2", onnx.TensorProto.FLOAT, ["batch", 5]))
    onnx.save(model, to)
    return to


def test_every_input_is_bound_by_its_name(two_inputs: Path, path: Path) -> None:
    cotangent = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).double().T  # not contiguous, and wide
    with OnnxRuntimeRunner(two_inputs) as runner:
        assert (runner.kind, runner.layers) == ("gradients", ("conv2", "norm"))
        actual = runner.run({"cotangent": cotangent, "images": images(6)})
        torch.testing.assert_close(actual["gradient/conv2"], OnnxRuntimeRunner(path).infer(images(6)).logits * cotangent.float())
        with pytest.raises(ValueError, match="a graph of gradients is not one of features"):
            runner.infer(images(6))
        with pytest.raises(ValueError, match="takes images, cotangent"):
            runner.run({"images": images(6)})
        with pytest.raises(KdxError, match="The batch of cotangent is 5, and that of another input is 6"):
            runner.run({"images": images(6), "cotangent": torch.zeros(5, 5)})
        with pytest.raises(KdxError, match=r"takes cotangent \[batch, 5\], not \[6, 4\]"):
            runner.run({"images": images(6), "cotangent": torch.zeros(6, 4)})


def test_outputs_that_cannot_be_sized_or_typed_are_an_error(path: Path, tmp_path: Path) -> None:
    model = onnx.load(path)
    model.graph.output[1].type.tensor_type.shape.dim[0].dim_param = "unknown"
    onnx.save(model, tmp_path / "sized.onnx")
    with pytest.raises(KdxError, match=r"conv2 of .*sized\.onnx has a dimension 'unknown' that no input has"):
        OnnxRuntimeRunner(tmp_path / "sized.onnx")
    model = onnx.load(path)
    model.graph.node.append(onnx.helper.make_node("Cast", ["logits"], ["wide"], to=onnx.TensorProto.DOUBLE))
    model.graph.output.append(onnx.helper.make_tensor_value_info("wide", onnx.TensorProto.DOUBLE, ["batch", 5]))
    onnx.save(model, tmp_path / "typed.onnx")
    with pytest.raises(KdxError, match=r"wide of .*typed\.onnx is a tensor\(double\), not float32"):
        OnnxRuntimeRunner(tmp_path / "typed.onnx")


STREAM: Any = SimpleNamespace(device=torch.device("cuda", 1), handle=4711)


@pytest.mark.parametrize("tf32", [False, True])
def test_a_providers_session_runs_on_the_gpu_and_stream_of_the_runner(tf32: bool) -> None:
    fake = FakeOnnxRuntime()
    _session(fake, Path("a.onnx"), "cuda", STREAM, tf32)
    (name, settings), *rest = fake.providers
    assert name == "CUDAExecutionProvider" and not rest  # no CPU provider to fall back to
    assert settings == {"device_id": "1", "user_compute_stream": "4711", "use_tf32": str(int(tf32))}


@pytest.mark.parametrize(
    ("fake", "message", "hint"),
    [
        (FakeOnnxRuntime(compiled=False), "has no provider cuda", "kdx[gpu]"),
        (FakeOnnxRuntime("CPUExecutionProvider"), "provider cuda does not start", "library"),
        (FakeOnnxRuntime(stray="NonMaxSuppression"), "does not run the NonMaxSuppression node 'n' of a.onnx", "eager"),
    ],
)
def test_a_provider_that_does_not_run_the_network_is_an_error(fake: FakeOnnxRuntime, message: str, hint: str) -> None:
    with pytest.raises(KdxError) as caught:
        _session(fake, Path("a.onnx"), "cuda", STREAM, False)
    assert message in caught.value.problem and hint in caught.value.hint


def test_an_onnx_runtime_that_does_not_report_its_nodes_is_an_error() -> None:
    fake = FakeOnnxRuntime()
    del fake.InferenceSession.get_provider_graph_assignment_info
    with pytest.raises(KdxError, match="does not report which nodes run on the GPU"):
        _session(fake, Path("a.onnx"), "cuda", STREAM, False)


def test_the_installed_onnx_runtime_reports_where_each_node_runs(path: Path) -> None:
    """The check relies on this interface of the package."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    parts = session.get_provider_graph_assignment_info()
    assert _strays(parts, "CPUExecutionProvider") == []
    strays = _strays(parts, "CUDAExecutionProvider")
    assert any("Conv node" in stray for stray in strays) and not any("Add node" in stray for stray in strays)


def test_a_gpus_provider_without_a_gpu_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KdxError, match="provider cuda runs on an NVIDIA GPU, and PyTorch sees none"):
        OnnxRuntimeRunner(path, "cuda")
    with pytest.raises(KdxError, match="not on cpu"):
        OnnxRuntimeRunner(path, "cuda", CPU)
    with pytest.raises(ValueError, match="cpu does not run on cuda"):
        OnnxRuntimeRunner(path, "cpu", torch.device("cuda"))


@pytest.mark.gpu
def test_onnx_runtime_on_the_gpu_gives_the_cpus_numbers(network: nn.Module, path: Path) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    with OnnxRuntimeRunner(path, "cuda") as runner:
        check_on_gpu(runner, network)
    with open_file(path, Choice("onnx", torch.device("cuda"), "")) as opened:
        assert opened.infer(images(3)).logits.is_cuda  # images on the CPU are copied


def test_without_onnx_runtime_a_file_cannot_be_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(KdxError) as caught:
        OnnxRuntimeRunner(path)
    assert "onnxruntime" in caught.value.problem and "kdx[cpu]" in caught.value.hint


def test_a_name_that_is_not_a_text_is_an_error(path: Path, tmp_path: Path) -> None:
    """Files of other programs, and damaged ones, may contain any bytes as the name of an output."""
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(path.read_bytes().replace(b"logits", b"\x80ogits"))
    with pytest.raises(KdxError):
        OnnxRuntimeRunner(damaged)
