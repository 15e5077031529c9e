"""The runtime tensorrt: memory, batches, and engines for another GPU or version."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from kdx.errors import KdxError
from kdx.export import engine
from kdx.runtimes.eager import EagerRunner
from kdx.runtimes.tensorrt import TensorRtRunner
from tests.runtimes.fakes import FakeStream, FakeTensorRT
from tests.runtimes.small_network import CPU, check_on_gpu, graph, images


def test_an_engine_without_a_driver_is_an_error_and_no_crash(built: Path) -> None:
    """In its own process, which TensorRT's runtime would end."""
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


def test_a_missing_engine_or_description_is_an_error(built: Path, tmp_path: Path) -> None:
    with pytest.raises(KdxError, match="There is no file"):
        TensorRtRunner(tmp_path / "absent.engine")
    (tmp_path / "alone.engine").write_bytes(built.read_bytes())
    with pytest.raises(KdxError, match=r"there is no alone\.engine\.json"):
        TensorRtRunner(tmp_path / "alone.engine")
    with pytest.raises(KdxError, match="TensorRT runs on an NVIDIA GPU, not on cpu"):
        TensorRtRunner(built, CPU)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a GPU of sm_86, which uses the CPU's memory."""
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
            actual = runner.infer(pixels)
            torch.testing.assert_close(actual.logits, expected.logits)
            torch.testing.assert_close(actual.features["norm"], expected.features["norm"])
        assert fake.shapes == {"images": (n, 3, 11, 9)} and set(fake.streams) == {4711}
        with pytest.raises(ValueError, match="takes images"):
            runner.run({"pictures": images(n)})
    with pytest.raises(ValueError, match="closed"):
        runner.infer(images(n))
    runner.close()


def test_kernels_are_compiled_for_the_batch_and_kept_for_the_next_process(
    network: nn.Module, built: Path, gpu: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu.setenv("KDX_CACHE", str(tmp_path))
    gpu.setattr(engine, "messages", lambda name: SimpleNamespace(errors=[]))
    for number in range(2):
        fake = FakeTensorRT(network)
        gpu.setattr(engine, "load_package", lambda name, fake=fake: fake)
        with TensorRtRunner(built):
            assert fake.context_settings == (fake.settings,) and fake.used is fake.cache
            assert fake.settings.dynamic_shapes_kernel_specialization_strategy == "eager"
            assert fake.cache.content == b"kernel;" * number
    (kept,) = tmp_path.glob("kernels-*.cache")
    assert kept.read_bytes() == b"kernel;" * 2


def test_an_engine_of_tensorrt_has_no_cache_of_kernels(network: nn.Module, built: Path, gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu.setenv("KDX_CACHE", str(tmp_path))
    fake = FakeTensorRT(network)
    described = replace(engine.describe(built), package="tensorrt", gpu="A GPU")
    gpu.setattr(engine, "describe", lambda path: described)
    gpu.setattr(engine, "load_package", lambda name: fake)
    gpu.setattr(engine, "messages", lambda name: SimpleNamespace(errors=[]))
    with TensorRtRunner(built):
        assert fake.context_settings == ()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("n", [1, 7, 100])
def test_a_batch_outside_the_engines_profile_is_an_error_that_names_it(
    n: int, network: nn.Module, built: Path, gpu: pytest.MonkeyPatch
) -> None:
    gpu.setattr(engine, "load_package", lambda name: FakeTensorRT(network))
    gpu.setattr(engine, "messages", lambda name: SimpleNamespace(errors=[]))
    with TensorRtRunner(built) as runner, pytest.raises(KdxError, match=f"takes batches of 2 to 6 images, not {n}") as caught:
        runner.infer(images(n))
    assert f"batches of {n}" in caught.value.hint


@pytest.mark.parametrize(
    ("refuses", "message"), [("engine", "cannot load"), ("context", "cannot load"), ("shape", "cannot run the engine")]
)
def test_a_refusal_of_tensorrt_is_an_error_with_its_message(
    refuses: str, message: str, network: nn.Module, built: Path, gpu: pytest.MonkeyPatch
) -> None:
    heard = SimpleNamespace(errors=[], last=lambda: "out of memory")
    gpu.setattr(engine, "load_package", lambda name: FakeTensorRT(network, refuses))
    gpu.setattr(engine, "messages", lambda name: heard)
    with pytest.raises(KdxError, match=f"{message}.*out of memory"):
        TensorRtRunner(built).infer(images(3))


@pytest.mark.parametrize(
    ("change", "capability", "message"),
    [
        ({}, (8, 9), "was built for sm_86, and cpu is A GPU .sm_89"),
        ({"gpu": "Another GPU"}, (8, 6), "was built for Another GPU, and cpu is A GPU"),
        ({"version": "1.6.0"}, (8, 6), "built by tensorrt_rtx 1.6.0, and 1.7.1.116 is installed"),
    ],
)
def test_an_engine_for_another_gpu_or_version_is_an_error(
    change: dict[str, str], capability: tuple[int, int], message: str, built: Path, network: nn.Module, gpu: pytest.MonkeyPatch
) -> None:
    described = replace(engine.describe(built), **change)  # type: ignore[arg-type]
    gpu.setattr(engine, "describe", lambda path: described)
    gpu.setattr(engine, "load_package", lambda name: FakeTensorRT(network))
    gpu.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(KdxError, match=message):
        TensorRtRunner(built)


@pytest.mark.gpu
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


def test_the_installed_tensorrt_rtx_has_the_interface_of_the_kernel_cache() -> None:
    """The stand-in has the same attributes."""
    package: Any = pytest.importorskip("tensorrt_rtx")
    assert {"EAGER", "LAZY"} <= set(package.DynamicShapesKernelSpecializationStrategy.__members__)
    for name in ("create_runtime_cache", "set_runtime_cache", "dynamic_shapes_kernel_specialization_strategy"):
        assert hasattr(package.IRuntimeConfig, name)
    assert hasattr(package.IRuntimeCache, "serialize") and hasattr(package.IRuntimeCache, "deserialize")
    assert "IRuntimeConfig" in package.ICudaEngine.create_execution_context.__doc__
