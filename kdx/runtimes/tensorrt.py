"""The runtime tensorrt: TensorRT or TensorRT-RTX."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdx.disk import cache_folder, log, replace_file
from kdx.errors import KdxError
from kdx.export import engine
from kdx.runtimes.cuda_stream import CudaStream, gpu_device
from kdx.runtimes.runner import FileRunner


class TensorRtRunner(FileRunner):
    """An engine that `kdx.export.engine` built, in TensorRT or TensorRT-RTX, on a GPU.

    Raises KdxError if PyTorch sees no GPU, if the installed package or its version differs from the builder's, if the engine was
    built for another GPU, and if it does not belong to the description beside it.
    """

    runtime = "tensorrt"

    def __init__(self, path: Path, device: torch.device | None = None) -> None:
        self.engine = engine.describe(path)
        # Check the GPU first: without a driver TensorRT's runtime ends the process when it reads an engine.
        self._set_file(path, self.engine.file, gpu_device(device, "TensorRT"))
        self.inputs, self.outputs = self.engine.inputs, self.engine.outputs
        package = _check_fit(path, self.engine, self.device)
        _, serialized = engine.load(path)
        self._log = engine.messages(self.engine.package)
        self._log.errors.clear()
        with torch.cuda.device(self.device):
            self._runtime: Any = package.Runtime(self._log)
            self._engine: Any = self._runtime.deserialize_cuda_engine(serialized)
            self._kernels = _KernelCache(package, self.engine, self._engine) if self._engine and _is_rtx(self.engine) else None
            settings = () if self._kernels is None else (self._kernels.settings,)
            self._context: Any = self._engine and self._engine.create_execution_context(*settings)
        if self._context is None:
            raise KdxError(f"TensorRT cannot load {path}: {self._log.last()}.", "Build it again on this machine with kdx export.")
        self._stream = CudaStream(self.device)

    @property
    def max_batch(self) -> int:
        return self.engine.batch[2]

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._context is None:
            raise ValueError("the runner is closed")
        inputs, sizes = self._prepared(feeds)
        _check_batch(sizes, self.engine.batch)
        outputs = self._empty_outputs(sizes)
        with self._stream.taken() as stream:  # the context stores the shapes and addresses of one pass
            self._log.errors.clear()
            accepted = [self._context.set_input_shape(name, tuple(tensor.shape)) for name, tensor in inputs.items()]
            accepted += [self._context.set_tensor_address(name, tensor.data_ptr()) for name, tensor in (inputs | outputs).items()]
            done = all(accepted) and self._context.execute_async_v3(stream)
        if not done:
            raise KdxError(f"TensorRT cannot run the engine: {self._log.last()}.", "Try smaller batches, or build the engine again.")
        return outputs

    def close(self) -> None:
        if self._context is not None:
            self._stream.synchronize()  # a context must not be freed while it runs
            if self._kernels is not None:
                self._kernels.store()
        self._context = self._kernels = self._engine = self._runtime = None  # in this order: each belongs to the next one


def _is_rtx(description: engine.EngineDescription) -> bool:
    return description.package == "tensorrt_rtx"


class _KernelCache:
    """TensorRT-RTX's settings for the context of an engine, with the kernels that earlier processes compiled for it.

    TensorRT-RTX compiles kernels when an engine runs. By default it starts with general kernels and replaces them later by kernels for the
    size of the batch, so equal batches would not give equal bits. With these settings, the kernels for a size are compiled before the batch
    runs.
    """

    def __init__(self, package: Any, description: engine.EngineDescription, opened: Any) -> None:
        self._path = cache_folder() / f"kernels-{description.sha256[:16]}-{description.version}-{description.arch}.cache"
        self.settings: Any = opened.create_runtime_config()
        self.settings.dynamic_shapes_kernel_specialization_strategy = package.DynamicShapesKernelSpecializationStrategy.EAGER
        self._cache: Any = self.settings.create_runtime_cache()
        with suppress(OSError):  # no earlier process ran this engine
            self._cache.deserialize(self._path.read_bytes())  # false for another GPU or version, whose kernels are compiled again
        self.settings.set_runtime_cache(self._cache)

    def store(self) -> None:
        """Keep the kernels for later processes."""
        try:
            replace_file(self._path, bytes(memoryview(self._cache.serialize())))
        except OSError as error:  # only the next process is slower
            log.info("The compiled kernels were not kept in %s: %s", self._path, error.strerror or error)


def _check_fit(path: Path, description: engine.EngineDescription, device: torch.device) -> Any:
    """The package that runs the engine. KdxError if the engine was built for another GPU or version."""
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    gpu = torch.cuda.get_device_name(device)
    if arch != description.arch or description.gpu not in (None, gpu):
        raise KdxError(
            f"{path} was built for {description.gpu or description.arch}, and {device} is {gpu} ({arch}).", "Build it again for this GPU."
        )
    package = engine.load_package(description.package)
    if package.__version__ != description.version:
        raise KdxError(
            f"{path} was built by {description.package} {description.version}, and {package.__version__} is installed.",
            "Build it again with kdx export.",
        )
    return package


def _check_batch(sizes: Mapping[str, int], batch: engine.BatchRange) -> None:
    lowest, _, highest = batch
    if "batch" in sizes and not lowest <= sizes["batch"] <= highest:
        raise KdxError(
            f"The engine takes batches of {lowest} to {highest} images, not {sizes['batch']}.",
            f"Give batches of {lowest} to {highest}, or build an engine for batches of {sizes['batch']}.",
        )
