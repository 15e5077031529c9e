"""Where a graph executes: PyTorch, ONNX Runtime, OpenVINO or TensorRT, and the choice between them."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from kdx.errors import KdxError, first_line, missing_package
from kdx.export import engine, onnx_file
from kdx.export.graphs import Graph
from kdx.export.onnx_file import Description, Shape
from kdx.openvino import OpenVinoRunner, check_precision
from kdx.runner import PRECISIONS, FileRunner, Precision, Runner, check_names

RuntimeName = Literal["auto", "eager", "onnx", "openvino", "tensorrt"]
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
Provider = Literal["cpu", "cuda", "tensorrt"]

_CPU = torch.device("cpu")
_PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_GPU_PACKAGE = "Install it in place of onnxruntime: pip uninstall onnxruntime, then pip install 'kdx[gpu]'"
_SHAPE_ARITHMETIC = (
    "Shape Size Gather Slice Concat Squeeze Unsqueeze Cast Add Sub Mul Div Mod Neg Abs Floor Ceil Round Min Max Equal Less "
    "LessOrEqual Greater GreaterOrEqual Not And Or Where Range ConstantOfShape Expand Reshape Identity Constant "
    "ReduceProd ReduceSum ReduceMin ReduceMax"
)
"""Operators that ONNX Runtime keeps on the CPU on purpose where they work on sizes. On features all of them have CUDA kernels."""


class EagerRunner(Runner):
    """PyTorch, on any device that PyTorch has."""

    runtime = "eager"

    def __init__(self, graph: Graph, device: torch.device) -> None:
        self.device = device
        self.kind = graph.kind
        self.layers = graph.layers
        self._inputs, self._outputs = graph.input_names, graph.output_names
        self._lock = threading.Lock()
        self._graph: Graph | None = graph.eval().to(device)
        numbers = next((held.dtype for held in (*graph.parameters(), *graph.buffers()) if held.is_floating_point()), torch.float32)
        self._numbers = torch.promote_types(numbers, torch.float32)  # half precision is the network's own affair

    @property
    def graph(self) -> Graph:
        """What is run; ValueError where the runner is closed."""
        if self._graph is None:
            raise ValueError("the runner is closed")
        return self._graph

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        graph = self.graph
        check_names(feeds, self._inputs)
        with self._lock, torch.no_grad():  # the graph hooks its layers for the length of a pass
            results = graph(*(feeds[name].to(self.device, self._numbers) for name in self._inputs))
        return dict(zip(self._outputs, results, strict=True))

    def close(self) -> None:
        self._graph = None


class OrtRunner(FileRunner):
    """ONNX Runtime, by one of its execution providers: ``cpu``, ``cuda``, or ``tensorrt`` (of TensorRT 10).

    Inputs and outputs are bound by address, so on a GPU nothing is copied to the host. tf32: whether a GPU may round products
    to TensorFloat-32, which costs three digits; the tensorrt provider has no such switch and may always.

    Raises KdxError where the file is none of kdx's, and where the provider is not compiled in, does not start, or leaves
    part of the network to the CPU.
    """

    runtime = "onnx"

    def __init__(self, path: Path, provider: Provider = "cpu", device: torch.device | None = None, *, tf32: bool = False) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise missing_package("onnxruntime", "cpu", "The runtime onnx") from None
        self.device = _CPU if provider == "cpu" else _gpu(device, f"ONNX Runtime's provider {provider}")
        if device is not None and device.type != self.device.type:
            raise ValueError(f"the provider {provider} does not run on {device}")
        self.description = onnx_file.describe(path)
        self.kind = self.description.kind
        self.layers = self.description.layers
        self._path = path
        self._stream = None if provider == "cpu" else _Stream(self.device)
        self._session: Any = _session(onnxruntime, path, provider, self._stream, tf32)
        self.inputs = _float_shapes(path, self._session.get_inputs())
        self.outputs = _float_shapes(path, self._session.get_outputs())
        known = {size for shape in self.inputs.values() for size in shape}
        for name, shape in self.outputs.items():
            for size in shape:
                if isinstance(size, str) and size not in known:
                    raise KdxError(
                        f"The output {name} of {path} has a dimension {size!r} that no input has.", "Export it again with kdx export."
                    )

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        session = self._session
        if session is None:
            raise ValueError("the runner is closed")
        inputs, sizes = self._fed(feeds)
        outputs = self._empty(sizes)
        place = self.device.type, self.device.index or 0
        binding = session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, *place, np.float32, tuple(tensor.shape), tensor.data_ptr())
        for name, tensor in outputs.items():
            binding.bind_output(name, *place, np.float32, tuple(tensor.shape), tensor.data_ptr())
        try:
            if self._stream is None:
                session.run_with_iobinding(binding)
            else:
                with self._stream.taken():
                    session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's exceptions share no other base
            raise KdxError(
                f"ONNX Runtime cannot run {self._path}: {first_line(error)}.", "Try smaller batches, or --runtime eager."
            ) from error
        return outputs

    def close(self) -> None:
        self._session = None


class TrtRunner(FileRunner):
    """An engine that `kdx.export.engine` built, in TensorRT or TensorRT-RTX, on a GPU.

    Raises KdxError where PyTorch sees no GPU, the package or its version is another than the builder's, the engine was
    built for another GPU, or it does not belong to the description beside it.
    """

    runtime = "tensorrt"

    def __init__(self, path: Path, device: torch.device | None = None) -> None:
        self.engine = engine.describe(path)
        self.description = self.engine.file
        self.kind = self.engine.kind
        self.layers = self.engine.layers
        self.inputs, self.outputs = self.engine.inputs, self.engine.outputs
        # Before anything of TensorRT's: without a driver its runtime ends the process as it reads an engine.
        self.device = _gpu(device, "TensorRT")
        package = _check_fit(path, self.engine, self.device)
        _, serialized = engine.load(path)
        heard = engine.messages(self.engine.package)
        heard.errors.clear()
        with torch.cuda.device(self.device):
            self._runtime: Any = package.Runtime(heard)
            self._engine: Any = self._runtime.deserialize_cuda_engine(serialized)
            self._context: Any = self._engine and self._engine.create_execution_context()
        if self._context is None:
            raise KdxError(f"TensorRT cannot load {path}: {heard.last()}.", "Build it again on this machine with kdx export.")
        self._heard = heard
        self._stream = _Stream(self.device)

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._context is None:
            raise ValueError("the runner is closed")
        inputs, sizes = self._fed(feeds)
        _check_batch(sizes, self.engine.batch)
        outputs = self._empty(sizes)
        with self._stream.taken() as stream:  # the context holds one pass's shapes and addresses
            self._heard.errors.clear()
            taken = [self._context.set_input_shape(name, tuple(tensor.shape)) for name, tensor in inputs.items()]
            taken += [self._context.set_tensor_address(name, tensor.data_ptr()) for name, tensor in (inputs | outputs).items()]
            done = all(taken) and self._context.execute_async_v3(stream)
        if not done:
            raise KdxError(f"TensorRT cannot run the engine: {self._heard.last()}.", "Try smaller batches, or build the engine again.")
        return outputs

    def close(self) -> None:
        if self._context is not None:
            self._stream.synchronize()  # a context may not go while it runs
        self._context = self._engine = self._runtime = None  # in this order: each belongs to the next


def is_file(given: object) -> bool:
    """Whether a network is given as a file that ``kdx export`` wrote, by its path."""
    return isinstance(given, str | Path) and str(given).endswith((".onnx", ".engine"))


def describe_file(path: Path) -> Description:
    """What a file that kdx exported says of itself, .onnx or .engine."""
    return engine.describe(path).file if path.suffix == ".engine" else onnx_file.describe(path)


def layer_not_held(what: object, layer: str, held: Iterable[str]) -> KdxError:
    """The error of a layer that was asked for of a file or runner that holds others."""
    return KdxError(f"{what} does not hold the layer {layer!r}.", f"It holds {', '.join(held)}; export it with the layer.")


def parts(runner: Runner, chunk: int | None, n: int) -> Iterator[slice]:
    """Parts of n images for a runner: of ``chunk`` images, and of no more than an engine takes."""
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be 1 or more, not {chunk}")
    most = min([chunk or n, *([runner.engine.batch[2]] if isinstance(runner, TrtRunner) else [])])
    return (slice(start, min(start + most, n)) for start in range(0, n, most))


# ---- what the runners of files share ----


class _Stream:
    """A stream of a runner's own on the GPU, for one pass at a time.

    Its own, since ONNX Runtime takes one at the start and for good, and TensorRT synchronises at every pass on the default one.
    The pass waits for what PyTorch's current stream has still to do, and that stream then waits for the pass: memory that
    PyTorch reuses afterwards is free by then.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._lock = threading.Lock()

    @property
    def handle(self) -> int:
        return int(self._stream.cuda_stream)

    @property
    def device(self) -> torch.device:
        return self._stream.device

    def synchronize(self) -> None:
        self._stream.synchronize()

    @contextmanager
    def taken(self) -> Iterator[int]:
        with self._lock, torch.cuda.device(self.device):
            current = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(current)
            try:
                yield self.handle
            finally:
                current.wait_stream(self._stream)


def _gpu(device: torch.device | None, who: str) -> torch.device:
    """The GPU asked for, or PyTorch's current one, with its number; KdxError where there is none."""
    _check_gpu("cuda" if device is None else str(device), who)
    return torch.device("cuda", torch.cuda.current_device() if device is None or device.index is None else device.index)


def _check_gpu(device: str, who: str) -> None:
    if not device.startswith("cuda"):
        raise KdxError(f"{who} runs on an NVIDIA GPU, not on {device}.", "Choose --device cuda, or another runtime.")
    if not torch.cuda.is_available():
        raise KdxError(
            f"{who} runs on an NVIDIA GPU, and PyTorch sees none.",
            "Choose --runtime onnx or eager on the CPU; kdx doctor says what is missing.",
        )


def _session(onnxruntime: Any, path: Path, provider: Provider, stream: _Stream | None, tf32: bool) -> Any:
    """A session in which the provider runs the whole network, or a KdxError.

    ONNX Runtime's own switch for that, session.disable_cpu_ep_fallback, also refuses the arithmetic on sizes that ONNX Runtime
    itself keeps on the CPU, so the session is asked where it put each node.
    """
    name = _PROVIDERS[provider]
    options = onnxruntime.SessionOptions()
    # Its threads would go on looking for work after a pass, and keep cores from the other network's, the geometry and the decoders.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    settings: dict[str, str] = {}
    if stream is not None:
        if name not in onnxruntime.get_available_providers():
            raise KdxError(f"The ONNX Runtime that is installed has no provider {provider}.", _GPU_PACKAGE)
        if not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"):
            raise KdxError(
                f"ONNX Runtime {onnxruntime.__version__} does not say what runs on the GPU.", "pip install --upgrade onnxruntime-gpu"
            )
        onnxruntime.preload_dlls()  # CUDA's libraries come with PyTorch
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        options.log_severity_level = 3  # it warns of the sizes that it keeps on the CPU
        settings = {"device_id": str(stream.device.index), "user_compute_stream": str(stream.handle)}
        if provider == "cuda":
            settings["use_tf32"] = str(int(tf32))
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[(name, settings)])
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        raise KdxError(f"ONNX Runtime cannot load {path}: {first_line(error)}.", "Export it again with kdx export.") from error
    session.disable_fallback()
    if session.get_providers()[0] != name:
        raise KdxError(
            f"ONNX Runtime's provider {provider} does not start here.",
            "Its log above names the library that it misses; kdx doctor says what this machine can run.",
        )
    if stream is not None and (strays := _strays(session.get_provider_graph_assignment_info(), name)):
        raise KdxError(
            f"ONNX Runtime's provider {provider} does not run {strays[0]} of {path}.",
            "Choose --device cpu, or --runtime eager for the GPU.",
        )
    return session


def _strays(parts: Collection[Any], name: str) -> list[str]:
    """The nodes that another provider runs, but for arithmetic on sizes."""
    return [
        f"the {node.op_type} node {node.name!r}"
        for part in parts
        if part.ep_name != name
        for node in part.get_nodes()
        if node.op_type not in _SHAPE_ARITHMETIC.split()
    ]


def _float_shapes(path: Path, values: Collection[Any]) -> dict[str, Shape]:
    for value in values:
        if value.type != "tensor(float)":
            raise KdxError(f"{value.name} of {path} is a {value.type}, not float32.", "Export it again with kdx export.")
    return {value.name: tuple(value.shape) for value in values}


def _check_fit(path: Path, described: engine.EngineDescription, device: torch.device) -> Any:
    """The package that the engine runs in; KdxError where the engine was built for another GPU or version."""
    arch = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    gpu = torch.cuda.get_device_name(device)
    if arch != described.arch or described.gpu not in (None, gpu):
        raise KdxError(
            f"{path} was built for {described.gpu or described.arch}, and {device} is {gpu} ({arch}).", "Build it again for this GPU."
        )
    package = engine.load_package(described.package)
    if package.__version__ != described.version:
        raise KdxError(
            f"{path} was built by {described.package} {described.version}, and {package.__version__} is installed.",
            "Build it again with kdx export.",
        )
    return package


def _check_batch(sizes: Mapping[str, int], batch: engine.Batch) -> None:
    lowest, _, highest = batch
    if "batch" in sizes and not lowest <= sizes["batch"] <= highest:
        raise KdxError(
            f"The engine takes batches of {lowest} to {highest} images, and was given {sizes['batch']}.",
            f"Give batches of {lowest} to {highest}, or build an engine for batches of {sizes['batch']}.",
        )


# ---- the choice ----


@dataclass(frozen=True)
class Choice:
    """The runtime, device and precision to use, and why in one line."""

    runtime: str
    device: torch.device
    why: str
    precision: Precision = "float32"


def open_file(path: Path, choice: Choice) -> FileRunner:
    """The runner of a file by its suffix: .onnx in OpenVINO or ONNX Runtime, as was chosen; .engine in TensorRT."""
    if path.suffix == ".engine":
        return TrtRunner(path, choice.device)
    if path.suffix != ".onnx":
        raise KdxError(f"{path} is neither an .onnx nor an .engine file.", "Give a file that kdx export wrote.")
    if choice.runtime == "openvino":
        return OpenVinoRunner(path, precision=choice.precision)
    return OrtRunner(path, "cpu" if choice.device.type == "cpu" else "cuda", choice.device)


def choose(
    runtime: RuntimeName, device: str = "auto", *, precision: Precision = "float32", files: bool = False, engines: bool = False
) -> Choice:
    """Resolve ``auto``; a runtime, device or precision asked for by name that cannot run here is a KdxError.

    files: the networks are given as files, so PyTorch cannot run them. engines: as .engine files, so only TensorRT can.
    """
    if precision not in PRECISIONS:
        raise KdxError(f"There is no precision {precision!r}.", f"Choose one of {', '.join(PRECISIONS)}.")
    found = _place(runtime, device, files, engines)
    if found.runtime == "openvino":
        check_precision(precision)
        return replace(found, precision=precision, why=found.why if precision == "float32" else f"{found.why}, in {precision}")
    if precision != "float32":
        raise KdxError(f"The runtime {found.runtime} does not choose {precision}.", "Choose --runtime openvino, or leave --precision out.")
    return found


def _place(runtime: RuntimeName, device: str, files: bool, engines: bool) -> Choice:
    """The runtime and device, whatever the precision."""
    if runtime not in RUNTIMES:
        raise KdxError(f"There is no runtime {runtime!r}.", f"Choose one of {', '.join(RUNTIMES)}.")
    cuda = torch.cuda.is_available()
    gpus = ("cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))) if cuda else ()
    if device not in ("auto", "cpu", *gpus):
        raise KdxError(f"The device {device!r} cannot run here.", "Choose cpu, or see kdx doctor for what this machine can run.")
    why = "as asked" if runtime != "auto" else f"the networks are {'engines' if engines else 'ONNX files'}"
    if engines and runtime in ("eager", "onnx", "openvino"):
        raise KdxError(f"An .engine file cannot run in {runtime}.", "Choose --runtime tensorrt, or give the ONNX file.")
    if files and runtime == "eager":
        raise KdxError("An .onnx file cannot run in PyTorch.", "Choose --runtime onnx, or give the network itself.")
    if runtime == "tensorrt" or engines:
        _check_gpu("cuda" if device == "auto" else device, "TensorRT")
        if not any(importlib.util.find_spec(package) for package in ("tensorrt", "tensorrt_rtx")):
            raise missing_package("tensorrt", "gpu", "The runtime tensorrt")
        chosen = torch.device("cuda" if device == "auto" else device)
        return Choice("tensorrt", chosen, f"tensorrt on {chosen}: {why}")
    has_onnx, has_openvino = (importlib.util.find_spec(package) is not None for package in ("onnxruntime", "openvino"))
    if runtime == "openvino":
        if device.startswith("cuda"):
            raise KdxError(f"OpenVINO runs on the CPU, not on {device}.", "Choose --device cpu, or another runtime.")
        if not has_openvino:
            raise missing_package("openvino", "openvino", "The runtime openvino")
        return Choice("openvino", _CPU, f"openvino on the CPU: {why}")
    on_cpu = device == "cpu" or (device == "auto" and (files or not cuda))
    if runtime == "auto" and on_cpu and has_openvino and not has_onnx:
        return Choice("openvino", _CPU, "openvino on the CPU: ONNX Runtime is not installed, and OpenVINO is")
    if runtime == "onnx" or files:
        if not has_onnx:
            raise missing_package("onnxruntime", "cpu", "The runtime onnx")
        if device.startswith("cuda"):
            if not _has_cuda_provider():
                raise KdxError("The ONNX Runtime that is installed runs on the CPU only.", _GPU_PACKAGE)
            return Choice("onnx", torch.device(device), f"onnx on {device}: {why}")
        return Choice("onnx", _CPU, f"onnx on the CPU: {why}")
    if runtime == "eager":
        chosen = torch.device("cuda" if device == "auto" and cuda else "cpu" if device == "auto" else device)
        return Choice("eager", chosen, f"eager on {chosen}: as asked")
    if not on_cpu:
        return Choice("eager", torch.device("cuda" if device == "auto" else device), "eager on the GPU: PyTorch sees one")
    if has_onnx:
        return Choice("onnx", _CPU, "onnx on the CPU: no GPU in use, and ONNX Runtime is faster there than PyTorch")
    return Choice("eager", _CPU, "eager on the CPU: ONNX Runtime is not installed (pip install 'kdx[cpu]' makes it faster)")


def _has_cuda_provider() -> bool:
    import onnxruntime

    return _PROVIDERS["cuda"] in onnxruntime.get_available_providers()
