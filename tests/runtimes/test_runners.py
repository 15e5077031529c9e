"""Runners against each other and against the network itself; every choice of runtime and device."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from kdx.choices import RUNTIMES, RuntimeName
from kdx.errors import KdxError
from kdx.export import engine, onnx_file
from kdx.export.description import Origin
from kdx.export.graphs import FeatureGraph, GradientGraph, Preprocessing
from kdx.models.network import weights_hash
from kdx.runtimes.choice import Choice, choose, open_file
from kdx.runtimes.eager import EagerRunner
from kdx.runtimes.onnx_runtime import OnnxRuntimeRunner, _session, _strays
from kdx.runtimes.openvino import OpenVinoRunner
from kdx.runtimes.runner import Runner
from kdx.runtimes.tensorrt import TensorRtRunner

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
    onnx_file.write(graph(network), path, origin=Origin("Small", weights_hash(network)), image_size=(11, 9))
    return path


def graph(network: nn.Module) -> FeatureGraph:
    return FeatureGraph(network, ["conv2", "norm"], Preprocessing(None, (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)))


def images(n: int, size: tuple[int, int] = (11, 9)) -> Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(n))


# ---- runners ----


def runners(network: nn.Module, path: Path) -> tuple[Runner, ...]:
    return EagerRunner(graph(network), CPU), OnnxRuntimeRunner(path), OpenVinoRunner(path)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_every_runner_gives_the_networks_outputs(network: nn.Module, path: Path, n: int) -> None:
    with torch.no_grad():
        logits, conv2, norm = graph(network)(images(n))
    assert [runner.runtime for runner in runners(network, path)] == ["eager", "onnx", "openvino"]
    for each in runners(network, path):
        with each as runner:
            assert runner.layers == ("conv2", "norm")
            found = runner.infer(images(n))
            assert list(found.features) == ["conv2", "norm"]
            for ours, theirs in ((found.logits, logits), (found.features["conv2"], conv2), (found.features["norm"], norm)):
                assert ours.shape == theirs.shape and not ours.requires_grad and ours.device == runner.device == CPU
                assert float((ours - theirs).abs().max()) <= TOLERANCE * float(theirs.abs().max())


def test_named_tensors_go_in_and_come_out(network: nn.Module, path: Path) -> None:
    for runner in runners(network, path):
        found = runner.run({"images": images(5)})
        assert runner.kind == "features" and list(found) == ["logits", "conv2", "norm"]
        passed = runner.infer(images(5))
        assert torch.equal(passed.logits, found["logits"]) and torch.equal(passed.features["norm"], found["norm"])
        assert all(output.is_contiguous() for output in found.values())


def test_images_of_any_number_type_and_layout_run_in_all(network: nn.Module, path: Path) -> None:
    pixels = images(5)
    strided = pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    every_other = torch.stack([pixels, -pixels], 1).flatten(0, 1)[::2]
    turned = pixels.flip(3).contiguous().flip(3)
    for runner in runners(network, path):
        expected = runner.infer(pixels).logits
        for kind in (pixels.double(), strided, every_other, turned, torch.from_numpy(pixels.numpy().astype(np.float64))):
            found = runner.infer(kind).logits
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected)
        for rounded in (pixels.half(), pixels.bfloat16()):
            torch.testing.assert_close(runner.infer(rounded).logits, runner.infer(rounded.float()).logits)
        whole = (pixels * 3).to(torch.uint8)
        torch.testing.assert_close(runner.infer(whole).logits, runner.infer(whole.float()).logits)
        watched = pixels.clone().requires_grad_()
        assert not runner.infer(watched).logits.requires_grad


def test_a_pass_leaves_the_results_of_earlier_ones_and_its_inputs_alone(network: nn.Module, path: Path) -> None:
    first, second, third = OnnxRuntimeRunner(path), OnnxRuntimeRunner(path), OpenVinoRunner(path)
    pixels = images(4)
    found = [runner.infer(pixels) for runner in (first, second, third, EagerRunner(graph(network), CPU))]
    kept = [passed.features["norm"].clone() for passed in found]
    for runner in (first, second, third):
        runner.infer(images(7))
        runner.infer(1 - pixels)
        runner.close()
    assert torch.equal(pixels, images(4))
    assert all(torch.equal(passed.features["norm"], before) for passed, before in zip(found, kept, strict=True))


def test_threads_share_a_runner(network: nn.Module, path: Path) -> None:
    for runner in runners(network, path):
        expected = {n: runner.infer(images(n)).logits for n in range(1, 7)}
        with ThreadPoolExecutor(6) as pool:
            found = dict(zip(expected, pool.map(runner.infer, map(images, expected)), strict=True))
        for n, logits in expected.items():
            torch.testing.assert_close(found[n].logits, logits)


@pytest.mark.parametrize("feeds", [{}, {"image": images(2)}, {"images": images(2), "target": images(2)}], ids=len)
def test_names_that_are_not_the_graphs_are_a_mistake(feeds: dict[str, Tensor], network: nn.Module, path: Path) -> None:
    for runner in runners(network, path):
        with pytest.raises(ValueError, match="the graph takes images, not"):
            runner.run(feeds)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((2, 3, 9, 11), "takes images of 11 x 9, not 9 x 11"),
        ((2, 1, 11, 9), r"takes images \[batch, 3, 11, 9\], not \[2, 1, 11, 9\]"),
        ((3, 11, 9), r"takes images \[batch, 3, 11, 9\], not \[3, 11, 9\]"),
        ((0, 3, 11, 9), "images is empty"),
    ],
)
def test_a_shape_that_the_file_does_not_take_is_an_error(shape: tuple[int, ...], said: str, path: Path) -> None:
    for runner in (OnnxRuntimeRunner(path), OpenVinoRunner(path)):
        with pytest.raises(KdxError, match=said):
            runner.run({"images": torch.zeros(shape)})


def test_a_file_for_any_size_takes_any(network: nn.Module, tmp_path: Path) -> None:
    resizing = FeatureGraph(network, ["norm"], Preprocessing((11, 9), (0.5,), (0.2,)))
    onnx_file.write(resizing, tmp_path / "a.onnx", origin=Origin("Small", "abc"), image_size=(13, 8))
    for runner in (OnnxRuntimeRunner(tmp_path / "a.onnx"), OpenVinoRunner(tmp_path / "a.onnx")):
        for size in ((11, 9), (24, 31), (5, 4)):
            found, expected = runner.infer(images(3, size)), EagerRunner(resizing, CPU).infer(images(3, size))
            torch.testing.assert_close(found.features["norm"], expected.features["norm"])


# ---- graphs with more inputs than the images ----


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
    """images, cotangent -> logits, product: cotangent times logits, under the description of a graph of gradients."""
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
        found = runner.run({"cotangent": cotangent, "images": images(6)})
        torch.testing.assert_close(found["gradient/conv2"], OnnxRuntimeRunner(path).infer(images(6)).logits * cotangent.float())
        with pytest.raises(ValueError, match="a graph of gradients is not one of features"):
            runner.infer(images(6))
        with pytest.raises(ValueError, match="takes images, cotangent"):
            runner.run({"images": images(6)})
        with pytest.raises(KdxError, match="The batch of cotangent is 5, and that of another input is 6"):
            runner.run({"images": images(6), "cotangent": torch.zeros(5, 5)})
        with pytest.raises(KdxError, match=r"takes cotangent \[batch, 5\], not \[6, 4\]"):
            runner.run({"images": images(6), "cotangent": torch.zeros(6, 4)})


def test_eager_runs_a_graph_of_gradients(network: nn.Module) -> None:
    gradients = GradientGraph(network, ["conv2"], Preprocessing())
    with EagerRunner(gradients, CPU) as runner:
        found = runner.run({"cotangent": torch.eye(5)[:4], "images": images(4)})
    assert list(found) == ["logits", "conv2", "gradient/conv2"] and not any(output.requires_grad for output in found.values())
    pixels = images(4)
    feature = network.get_submodule("conv2")(network.get_submodule("norm")(network.get_submodule("conv1")(pixels)).relu())
    feature = feature.detach().requires_grad_()
    network.get_submodule("fc")(feature.relu().mean((2, 3))).diagonal().sum().backward()
    assert feature.grad is not None
    torch.testing.assert_close(found["gradient/conv2"], feature.grad)


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
    for runner in runners(network, path):
        with runner:
            runner.infer(images(1))
        with pytest.raises(ValueError, match="closed"):
            runner.infer(images(1))
        with pytest.raises(ValueError, match="closed"):
            runner.run({"images": images(1)})
        runner.close()  # twice is no mistake


def test_a_runner_of_a_file_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no network")
    for name in ("text.onnx", "absent.onnx"):
        for kind in (OnnxRuntimeRunner, OpenVinoRunner):
            with pytest.raises(KdxError, match=name):
                kind(tmp_path / name)


# ---- providers of ONNX Runtime ----


class FakeOnnxRuntime:
    """ONNX Runtime as it would be with a GPU: which provider it has, starts, and gives which nodes."""

    __version__ = "1.0"

    def __init__(self, started: str = "CUDAExecutionProvider", stray: str = "Shape", compiled: bool = True) -> None:
        self.started, self.stray, self.compiled = started, stray, compiled
        self.entries: dict[str, str] = {}
        self.providers: list[tuple[str, dict[str, str]]] = []
        self.SessionOptions = lambda: SimpleNamespace(add_session_config_entry=self.entries.__setitem__)
        test = self

        class InferenceSession:
            def __init__(self, _path: Path, options: Any, providers: list[tuple[str, dict[str, str]]]) -> None:
                test.providers = providers

            def disable_fallback(self) -> None:
                pass

            def get_providers(self) -> list[str]:
                return [test.started, "CPUExecutionProvider"]

            def get_provider_graph_assignment_info(self) -> list[Any]:
                nodes = {test.started: "Conv", "CPUExecutionProvider": test.stray}
                return [
                    SimpleNamespace(ep_name=name, get_nodes=lambda op=op: [SimpleNamespace(op_type=op, name="n")])
                    for name, op in nodes.items()
                ]

        self.InferenceSession = InferenceSession

    def get_available_providers(self) -> list[str]:
        return ["CPUExecutionProvider", *(["CUDAExecutionProvider", "TensorrtExecutionProvider"] if self.compiled else [])]

    def preload_dlls(self) -> None:
        pass


STREAM: Any = SimpleNamespace(device=torch.device("cuda", 1), handle=4711)


@pytest.mark.parametrize("tf32", [False, True])
def test_a_providers_session_runs_on_the_gpu_and_stream_of_the_runner(tf32: bool) -> None:
    fake = FakeOnnxRuntime()
    _session(fake, Path("a.onnx"), "cuda", STREAM, tf32)
    (name, settings), *rest = fake.providers
    assert name == "CUDAExecutionProvider" and not rest  # no CPU provider to fall back to
    assert settings == {"device_id": "1", "user_compute_stream": "4711", "use_tf32": str(int(tf32))}
    fake = FakeOnnxRuntime("TensorrtExecutionProvider")
    _session(fake, Path("a.onnx"), "tensorrt", STREAM, False)
    assert fake.providers == [("TensorrtExecutionProvider", {"device_id": "1", "user_compute_stream": "4711"})]


@pytest.mark.parametrize(
    ("fake", "said", "hint"),
    [
        (FakeOnnxRuntime(compiled=False), "has no provider cuda", "kdx[gpu]"),
        (FakeOnnxRuntime("CPUExecutionProvider"), "provider cuda does not start", "library"),
        (FakeOnnxRuntime(stray="NonMaxSuppression"), "does not run the NonMaxSuppression node 'n' of a.onnx", "eager"),
    ],
)
def test_a_provider_that_does_not_run_the_network_is_an_error(fake: FakeOnnxRuntime, said: str, hint: str) -> None:
    with pytest.raises(KdxError) as caught:
        _session(fake, Path("a.onnx"), "cuda", STREAM, False)
    assert said in caught.value.problem and hint in caught.value.hint


def test_an_onnx_runtime_that_cannot_say_where_it_runs_is_an_error() -> None:
    fake = FakeOnnxRuntime()
    del fake.InferenceSession.get_provider_graph_assignment_info
    with pytest.raises(KdxError, match="does not report which nodes run on the GPU"):
        _session(fake, Path("a.onnx"), "cuda", STREAM, False)


def test_the_installed_onnx_runtime_says_where_each_node_runs(path: Path) -> None:
    """The interface that the check relies on, of the package itself."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    parts = session.get_provider_graph_assignment_info()
    assert _strays(parts, "CPUExecutionProvider") == []
    strays = _strays(parts, "CUDAExecutionProvider")
    assert any("Conv node" in stray for stray in strays) and not any("Add node" in stray for stray in strays)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_gpus_provider_without_a_gpu_is_an_error(provider: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KdxError, match=f"provider {provider} runs on an NVIDIA GPU, and PyTorch sees none"):
        OnnxRuntimeRunner(path, provider)
    with pytest.raises(KdxError, match="not on cpu"):
        OnnxRuntimeRunner(path, provider, CPU)
    with pytest.raises(ValueError, match="cpu does not run on cuda"):
        OnnxRuntimeRunner(path, "cpu", torch.device("cuda"))


# ---- engines ----


@pytest.fixture(scope="session")
def built(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("engine") / "small.engine"
    engine.build(path, to, batch=(2, 3, 6), arch="sm_86")
    return to


def test_an_engine_without_a_driver_is_an_error_and_no_crash(built: Path) -> None:
    """In a process of its own, which TensorRT's runtime would end."""
    code = (
        "import sys, torch; from pathlib import Path; from kdx.runtimes.tensorrt import TensorRtRunner; from kdx.errors import KdxError\n"
        "torch.cuda.is_available = lambda: False\n"
        "try: TensorRtRunner(Path(sys.argv[1]))\n"
        "except KdxError as error: print(error.problem)\n"
        "print('tensorrt_rtx' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code, built], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "TensorRT runs on an NVIDIA GPU, and PyTorch sees none.\nFalse\n"


def test_an_engine_that_is_none_or_alone_is_an_error(built: Path, tmp_path: Path) -> None:
    with pytest.raises(KdxError, match="There is no file"):
        TensorRtRunner(tmp_path / "absent.engine")
    (tmp_path / "alone.engine").write_bytes(built.read_bytes())
    with pytest.raises(KdxError, match=r"there is no alone\.engine\.json"):
        TensorRtRunner(tmp_path / "alone.engine")
    with pytest.raises(KdxError, match="TensorRT runs on an NVIDIA GPU, not on cpu"):
        TensorRtRunner(built, CPU)


def test_a_file_is_opened_by_its_suffix(path: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here, gpu = Choice("onnx", CPU, ""), Choice("onnx", torch.device("cuda"), "")
    with open_file(path, here) as runner:
        assert (
            isinstance(runner, OnnxRuntimeRunner) and runner.device == CPU and runner.description.networks["network"].reference == "Small"
        )
    for name, said in ((path, "provider cuda"), (built, "TensorRT")):
        with pytest.raises(KdxError, match=f"{said} runs on an NVIDIA GPU, and PyTorch sees none"):
            open_file(name, gpu)
    with pytest.raises(KdxError, match="TensorRT runs on an NVIDIA GPU, not on cpu"):
        open_file(built, here)
    with pytest.raises(KdxError, match=r"neither an \.onnx nor an \.engine file"):
        open_file(tmp_path / "model.pt", here)


class FakeTensorRT:
    """TensorRT with the network of `network` on the CPU: it reads and writes at the addresses that it is given."""

    __version__ = "1.7.1.116"

    def __init__(self, network: nn.Module, refuses: str = "") -> None:
        self.graph, self.refuses = graph(network), refuses
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.streams: list[int] = []
        self.Runtime = lambda _heard: self
        self.create_execution_context = lambda: None if refuses == "context" else self
        self.deserialize_cuda_engine = lambda data: None if refuses == "engine" else self

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return self.refuses != "shape"

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.streams.append(stream)
        shape = self.shapes["images"]
        held = (ctypes.c_float * int(np.prod(shape))).from_address(self.addresses["images"])
        with torch.no_grad():
            results = self.graph(torch.from_numpy(np.array(held, np.float32)).view(shape))
        for name, result in zip(self.graph.output_names, results, strict=True):
            flat = result.contiguous().numpy()
            ctypes.memmove(self.addresses[name], flat.ctypes.data, flat.nbytes)
        return True


class FakeStream:
    def __init__(self, device: torch.device) -> None:
        self.taken = self._taken

    @contextmanager
    def _taken(self) -> Iterator[int]:
        yield 4711

    def synchronize(self) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with an sm_86, whose memory is the CPU's."""
    monkeypatch.setattr("kdx.runtimes.tensorrt.gpu_device", lambda device, user: CPU)
    monkeypatch.setattr("kdx.runtimes.tensorrt.CudaStream", FakeStream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    return monkeypatch


@pytest.mark.parametrize("n", [2, 5, 6])
def test_an_engine_reads_and_writes_pytorchs_memory(n: int, network: nn.Module, built: Path, gpu: pytest.MonkeyPatch) -> None:
    fake = FakeTensorRT(network)
    gpu.setattr(engine, "load_package", lambda name: fake)
    gpu.setattr(engine, "messages", lambda name: SimpleNamespace(errors=[]))
    expected = EagerRunner(graph(network), CPU).infer(images(n))
    with TensorRtRunner(built) as runner:
        assert (runner.runtime, runner.kind, runner.layers) == ("tensorrt", "features", ("conv2", "norm"))
        assert runner.description.networks["network"].reference == "Small" and runner.engine.arch == "sm_86"
        for pixels in (images(n), images(n).double(), images(n).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
            found = runner.infer(pixels)
            torch.testing.assert_close(found.logits, expected.logits)
            torch.testing.assert_close(found.features["norm"], expected.features["norm"])
        assert fake.shapes == {"images": (n, 3, 11, 9)} and set(fake.streams) == {4711}
        with pytest.raises(ValueError, match="takes images"):
            runner.run({"pictures": images(n)})
    with pytest.raises(ValueError, match="closed"):
        runner.infer(images(n))
    runner.close()


@pytest.mark.parametrize("n", [1, 7, 100])
def test_a_batch_outside_the_engines_profile_is_an_error_that_names_it(
    n: int, network: nn.Module, built: Path, gpu: pytest.MonkeyPatch
) -> None:
    gpu.setattr(engine, "load_package", lambda name: FakeTensorRT(network))
    gpu.setattr(engine, "messages", lambda name: SimpleNamespace(errors=[]))
    with TensorRtRunner(built) as runner, pytest.raises(KdxError, match=f"takes batches of 2 to 6 images, not {n}") as caught:
        runner.infer(images(n))
    assert f"batches of {n}" in caught.value.hint


@pytest.mark.parametrize(("refuses", "said"), [("engine", "cannot load"), ("context", "cannot load"), ("shape", "cannot run the engine")])
def test_what_tensorrt_refuses_is_an_error_with_its_words(
    refuses: str, said: str, network: nn.Module, built: Path, gpu: pytest.MonkeyPatch
) -> None:
    heard = SimpleNamespace(errors=[], last=lambda: "out of memory")
    gpu.setattr(engine, "load_package", lambda name: FakeTensorRT(network, refuses))
    gpu.setattr(engine, "messages", lambda name: heard)
    with pytest.raises(KdxError, match=f"{said}.*out of memory"):
        TensorRtRunner(built).infer(images(3))


@pytest.mark.parametrize(
    ("change", "capability", "said"),
    [
        ({}, (8, 9), "was built for sm_86, and cpu is A GPU .sm_89"),
        ({"gpu": "Another GPU"}, (8, 6), "was built for Another GPU, and cpu is A GPU"),
        ({"version": "1.6.0"}, (8, 6), "built by tensorrt_rtx 1.6.0, and 1.7.1.116 is installed"),
    ],
)
def test_an_engine_for_another_gpu_or_version_is_an_error(
    change: dict[str, str], capability: tuple[int, int], said: str, built: Path, network: nn.Module, gpu: pytest.MonkeyPatch
) -> None:
    described = replace(engine.describe(built), **change)  # type: ignore[arg-type]
    gpu.setattr(engine, "describe", lambda path: described)
    gpu.setattr(engine, "load_package", lambda name: FakeTensorRT(network))
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(KdxError, match=said):
        TensorRtRunner(built)


# ---- with a GPU ----

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU_TOLERANCE = 1e-4
"""Of an output's largest value: float32 without TensorFloat-32, other algorithms."""


def check_on_gpu(runner: Runner, network: nn.Module) -> None:
    """The CPU's numbers, on the GPU, whatever stream is current and whatever follows at once."""
    side = torch.cuda.Stream()
    for stream in (torch.cuda.current_stream(), side):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for n in (2, 5, 6):
                expected = EagerRunner(graph(network), CPU).infer(images(n))
                pixels = images(n).cuda(non_blocking=True)
                for _ in range(3):  # memory is used again while passes are under way
                    found = runner.infer(pixels * 0.5 + pixels * 0.5)
                    summed = found.features["norm"].sum((1, 2, 3))
                    assert found.logits.device == runner.device and runner.device.type == "cuda"
                    for ours, theirs in (
                        (found.logits, expected.logits),
                        (found.features["conv2"], expected.features["conv2"]),
                        (summed, expected.features["norm"].sum((1, 2, 3))),
                    ):
                        assert float((ours.cpu() - theirs).abs().max()) <= GPU_TOLERANCE * float(theirs.abs().max())


@needs_gpu
def test_onnx_runtime_on_the_gpu_gives_the_cpus_numbers(network: nn.Module, path: Path) -> None:
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    with OnnxRuntimeRunner(path, "cuda") as runner:
        check_on_gpu(runner, network)
    with open_file(path, Choice("onnx", torch.device("cuda"), "")) as opened:
        assert opened.infer(images(3)).logits.is_cuda  # images on the CPU are copied


@needs_gpu
def test_an_engine_on_the_gpu_gives_the_cpus_numbers(network: nn.Module, path: Path, tmp_path: Path) -> None:
    try:
        engine.load_package(engine.choose_target().package)
    except KdxError as error:
        pytest.skip(error.problem)
    engine.build(path, tmp_path / "a.engine", batch=(2, 5, 6))
    with TensorRtRunner(tmp_path / "a.engine") as runner:
        check_on_gpu(runner, network)
        with pytest.raises(KdxError, match="batches of 2 to 6"):
            runner.infer(images(7))
    with TensorRtRunner(tmp_path / "a.engine") as first, TensorRtRunner(tmp_path / "a.engine") as second:
        torch.testing.assert_close(first.infer(images(4)).logits, second.infer(images(4)).logits)


# ---- the choice ----


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with ONNX Runtime and without a GPU."""
    return _machine(monkeypatch, onnx=True, cuda=False)


def _machine(
    monkeypatch: pytest.MonkeyPatch, *, onnx: bool, cuda: bool, provider: bool = False, tensorrt: bool = True, openvino: bool = False
) -> pytest.MonkeyPatch:
    real = importlib.util.find_spec
    some = real("math")
    known = {"onnxruntime": onnx, "openvino": openvino, "tensorrt": False, "tensorrt_rtx": tensorrt}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: (some if known[name] else None) if name in known else real(name, *rest)
    )
    monkeypatch.setattr(onnxruntime, "get_available_providers", FakeOnnxRuntime(compiled=provider).get_available_providers)
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
    ("tensorrt", "auto", False, True, True): ("tensorrt", "cuda"),
    ("tensorrt", "cuda:1", True, False, True): ("tensorrt", "cuda:1"),
}

FAILS = {
    ("eager", "auto", True, True, False): "An .onnx file cannot run in PyTorch",
    ("eager", "cpu", True, False, True): "An .onnx file cannot run in PyTorch",
    ("onnx", "auto", False, False, False): "needs the package onnxruntime",
    ("onnx", "auto", False, False, True): "needs the package onnxruntime",
    ("auto", "auto", True, False, False): "needs the package onnxruntime",
    ("onnx", "cuda", False, True, True): "runs only on the CPU",
    ("auto", "cuda", True, True, True): "runs only on the CPU",
    ("tensorrt", "auto", False, True, False): "TensorRT runs on an NVIDIA GPU, and PyTorch sees none",
    ("tensorrt", "cpu", False, True, True): "TensorRT runs on an NVIDIA GPU, not on cpu",
    ("trt", "auto", False, True, True): "There is no runtime 'trt'",
    ("auto", "cuda", False, True, False): "device 'cuda' cannot run here",
    ("eager", "cuda:1", False, True, False): "device 'cuda:1' cannot run here",
    ("onnx", "cuda", False, True, False): "device 'cuda' cannot run here",
    ("auto", "tpu", False, True, True): "device 'tpu' cannot run here",
    ("auto", "", False, True, False): "device '' cannot run here",
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
        assert "as requested" in found.why
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
    assert caught.value.hint and ("kdx[cpu]" in caught.value.hint) == ("package onnxruntime" in caught.value.problem)


@pytest.mark.parametrize(("name", "files"), [("onnx", False), ("onnx", True), ("auto", True)])
def test_onnx_runtime_takes_the_gpu_that_is_named_where_it_has_cuda(
    name: RuntimeName, files: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    _machine(monkeypatch, onnx=True, cuda=True, provider=True)
    found = choose(name, "cuda:1", files=files)
    assert (found.runtime, found.device) == ("onnx", torch.device("cuda:1")) and found.why.startswith("onnx on cuda:1")
    assert choose(name, files=files).device == CPU


@pytest.mark.parametrize("onnx", [True, False])
@pytest.mark.parametrize("cuda", [True, False])
def test_openvino_runs_on_the_cpu_where_it_is_asked_for_or_alone(onnx: bool, cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, onnx=onnx, cuda=cuda, openvino=True)
    for device in ("auto", "cpu"):
        for files in (False, True):
            assert choose("openvino", device, files=files) == Choice("openvino", CPU, "openvino on the CPU: as requested")
            found = choose("auto", device, files=files)
            if device == "auto" and cuda and not files:
                assert found.runtime == "eager"
            elif onnx:
                assert found.runtime == "onnx"
            else:
                assert found == Choice("openvino", CPU, "openvino on the CPU: ONNX Runtime is not installed, and OpenVINO is")
    if cuda:
        with pytest.raises(KdxError, match="OpenVINO runs on the CPU, not on cuda:1"):
            choose("openvino", "cuda:1")
        assert choose("auto", "cuda:1").runtime == "eager"
        with pytest.raises(KdxError, match="package onnxruntime" if not onnx else "runs only on the CPU"):
            choose("auto", "cuda:1", files=True)


def test_openvino_that_is_not_installed_names_its_extra(machine: pytest.MonkeyPatch) -> None:
    with pytest.raises(KdxError, match="The runtime openvino needs the package openvino") as caught:
        choose("openvino")
    assert "kdx[openvino]" in caught.value.hint


@pytest.mark.parametrize("name", ["auto", "eager", "onnx", "tensorrt"])
def test_bfloat16_is_openvinos_alone(name: RuntimeName, monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, onnx=True, cuda=name == "tensorrt", openvino=True)
    monkeypatch.setattr("kdx.runtimes.openvino.has_bfloat16", lambda: True)
    with pytest.raises(KdxError, match=f"runtime {'onnx' if name == 'auto' else name} does not support bfloat16") as caught:
        choose(name, precision="bfloat16")
    assert "--runtime openvino" in caught.value.hint
    found = choose("openvino", precision="bfloat16")
    assert (found.precision, found.why) == ("bfloat16", "openvino on the CPU: as requested, in bfloat16")
    with pytest.raises(KdxError, match="There is no precision 'float16'"):
        choose(name, precision="float16")  # type: ignore[arg-type]


def test_a_cpu_without_bfloat16_does_not_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, onnx=False, cuda=False, openvino=True)
    monkeypatch.setattr("kdx.runtimes.openvino.has_bfloat16", lambda: False)
    for name in ("openvino", "auto"):
        assert choose(name).precision == "float32"
        with pytest.raises(KdxError, match="This CPU does not compute in bfloat16"):
            choose(name, precision="bfloat16")


def test_engines_run_in_tensorrt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, onnx=True, cuda=True)
    for name in ("auto", "tensorrt"):
        found = choose(name, files=True, engines=True)
        assert (found.runtime, found.device) == ("tensorrt", torch.device("cuda"))
    assert "the networks are engines" in choose("auto", engines=True).why
    for name in ("eager", "onnx", "openvino"):
        with pytest.raises(KdxError, match=f"An .engine file cannot run in {name}"):
            choose(name, files=True, engines=True)  # type: ignore[arg-type]
    _machine(monkeypatch, onnx=True, cuda=True, tensorrt=False)
    with pytest.raises(KdxError, match="needs the package tensorrt") as caught:
        choose("tensorrt")
    assert "kdx[gpu]" in caught.value.hint


@pytest.mark.parametrize("device", ["cuda:x", "cuda:-1", "cuda:2", "cuda:", "cudax"])
def test_a_gpu_that_pytorch_does_not_see_is_an_error(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _machine(monkeypatch, onnx=True, cuda=True)
    with pytest.raises(KdxError, match="cannot run here"):
        choose("eager", device)


def test_the_same_choice_compares_equal(machine: pytest.MonkeyPatch) -> None:
    assert choose("auto") == choose("auto", "auto") == Choice("onnx", CPU, choose("auto").why)
    assert RUNTIMES == ("auto", "eager", "onnx", "openvino", "tensorrt")


def test_without_onnx_runtime_a_file_cannot_be_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(KdxError) as caught:
        OnnxRuntimeRunner(path)
    assert "onnxruntime" in caught.value.problem and "kdx[cpu]" in caught.value.hint
