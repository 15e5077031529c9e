"""Build the engine of an ONNX file that kdx wrote. TensorRT or TensorRT-RTX runs it on one kind of GPU."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import re
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import onnx
import torch

from kdx.disk import cache_folder, parse_json, replace_file, staging, write_through
from kdx.errors import KdxError, first_line
from kdx.export import description
from kdx.export.description import Description, Shape, shapes_by_name, tuples

log = logging.getLogger("kdx")

PackageName = Literal["tensorrt", "tensorrt_rtx"]
BatchRange = tuple[int, int, int]
"""The smallest, the best and the largest number of images in a batch of an engine."""

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
"""The architectures that TensorRT-RTX builds for, with or without such a GPU in the machine.

On sm_75 it multiplies matrices in float16 only.
"""
_INSTALL: dict[PackageName, str] = {
    "tensorrt": "pip install 'kdx[tensorrt]'",
    "tensorrt_rtx": "pip install 'kdx[tensorrt-rtx]'",
}

_building = threading.Lock()


@dataclass(frozen=True)
class EngineDescription:
    """The description of an engine, which is stored beside it in ENGINE.json.

    file: the description of the ONNX file. inputs, outputs: shapes by name. A dimension is a number or ``batch``, which is any number
    from min to max of ``batch`` = (min, best, max); best is the fastest. gpu: the model of GPU that a TensorRT engine runs on. It is
    None for TensorRT-RTX, whose engines run on any GPU of the architecture ``arch``. tf32: whether products may be rounded to
    TensorFloat-32. onnx_sha256: of the ONNX file with its external data. It is read only by ``==``, which decides whether an
    existing engine is kept. sha256: of the engine.
    """

    file: Description
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    batch: BatchRange
    package: PackageName
    version: str
    arch: str
    gpu: str | None
    tf32: bool
    onnx_sha256: str
    sha256: str

    @property
    def kind(self) -> str:
        return self.file.kind

    @property
    def layers(self) -> tuple[str, ...]:
        return self.file.layers


@dataclass(frozen=True)
class BuildTarget:
    """The package that builds an engine, the GPU that it builds for, and the reason in one line."""

    package: PackageName
    arch: str
    gpu: str | None
    why: str


def choose_target(arch: str | None = None) -> BuildTarget:
    """Choose the package and the GPU for a build: of the architecture ``arch``, or by default of this machine's GPU.

    TensorRT-RTX builds for a named architecture, because it alone builds for a GPU that is not in the machine. For this machine's
    GPU, TensorRT builds if it is installed, because it times its kernels on the GPU. Otherwise TensorRT-RTX builds, if it supports
    the architecture. Raises KdxError if neither package can build.
    """
    known = ", ".join(ARCHITECTURES)
    if arch is not None:
        if arch not in ARCHITECTURES:
            raise KdxError(
                f"TensorRT-RTX does not build for {arch!r}.",
                f"Name one of {known}. For another GPU, build on a machine with that GPU, without naming an architecture.",
            )
        return BuildTarget("tensorrt_rtx", arch, None, f"TensorRT-RTX, which builds for {arch} without such a GPU")
    if not torch.cuda.is_available():
        raise KdxError("An engine is for one kind of GPU, and PyTorch sees none here.", f"Name the architecture to build for: {known}.")
    here = "sm_{}{}".format(*torch.cuda.get_device_capability())
    if importlib.util.find_spec("tensorrt") is not None:
        gpu = torch.cuda.get_device_name()
        return BuildTarget("tensorrt", here, gpu, f"TensorRT, timed on the {gpu} here")
    if here not in ARCHITECTURES:
        raise KdxError(
            f"An engine for {here} needs the package tensorrt, which is not installed.", f"Install it with: {_INSTALL['tensorrt']}"
        )
    return BuildTarget("tensorrt_rtx", here, None, f"TensorRT-RTX for the {here} here, since TensorRT is not installed")


def load_package(name: PackageName) -> Any:
    """Import the Python package. Raises KdxError if it is not installed, or does not find its libraries."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise KdxError(f"The package {name} cannot be loaded: {first_line(error)}.", f"Install it with: {_INSTALL[name]}") from error


@functools.cache
def messages(name: PackageName) -> Any:
    """The logger of a package in this process; its ``errors`` collects the package's error messages.

    There is only one, and it is never freed: the package keeps the address of the first logger that it gets, and ignores later ones.
    """
    package = load_package(name)
    base: Any = package.ILogger
    severe = (base.INTERNAL_ERROR, base.ERROR)

    class Messages(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in severe:
                self.errors.append(" ".join(message.split()))

        def last(self) -> str:
            return self.errors[-1].rstrip(".") if self.errors else "no reason was reported"

    return Messages()


def description_path(path: Path) -> Path:
    """The path of the description of the engine ENGINE: ENGINE.json, beside it."""
    return path.with_name(f"{path.name}.json")


def build(
    onnx_path: Path,
    engine_path: Path,
    *,
    batch: BatchRange,
    arch: str | None = None,
    image_size: tuple[int, int] | None = None,
    tf32: bool = False,
) -> EngineDescription:
    """Build the engine of an ONNX file that kdx wrote, and write it with its description beside it as ENGINE.json.

    batch: the (min, best, max) number of images. arch: as in `choose_target`, by default this machine's GPU. image_size: height and
    width for a file that takes images of any size; an engine takes one size.

    TensorRT keeps its measurements in the user's cache folder, one file per GPU and version, so that the next build is faster.
    TensorRT-RTX measures nothing.

    The precision is that of the file, because networks are strongly typed. By default TensorRT would still round the products of
    float32 to TensorFloat-32. Its mantissa of 10 bits causes errors near 1e-3 in features, and spoils the distances of near pairs,
    which are differences. So this is off, and ``tf32=True`` allows it for speed.

    An existing engine is kept if it was built from the same file, by the same version, for the same GPU, sizes and precision. A build
    that fails or is interrupted leaves no new file behind, and the old engine in place. Two builds of one file differ in a few bytes,
    and so in their sha256.

    Raises KdxError for a file, sizes or an architecture that cannot be built, and for a folder that cannot be written.
    """
    file = description.describe(onnx_path)
    check_batch(batch, file.least_images)
    target = choose_target(arch)
    package = load_package(target.package)
    model = onnx.load(onnx_path, load_external_data=False)
    requested = EngineDescription(
        file=file,
        inputs={name: _fixed_shape(file, name, shape, image_size) for name, shape in shapes_by_name(model.graph.input).items()},
        outputs={name: _fixed_shape(file, name, shape, image_size) for name, shape in shapes_by_name(model.graph.output).items()},
        batch=batch,
        package=target.package,
        version=package.__version__,
        arch=target.arch,
        gpu=target.gpu,
        tf32=tf32,
        onnx_sha256=_digest(onnx_path, model),
        sha256="",
    )
    if (existing := _existing(engine_path, requested)) is not None:
        return existing
    log.info("engine of %s: %s", onnx_path.name, target.why)
    with staging(engine_path) as folder:  # fails at once, not after the minutes of a build, if the folder cannot be written
        engine = _built(onnx_path, requested, package)
        described = replace(requested, sha256=hashlib.sha256(engine).hexdigest())
        write_through(folder / engine_path.name, engine)
        write_through(folder / description_path(engine_path).name, (json.dumps(asdict(described), indent=2) + "\n").encode())
    return described


def describe(path: Path) -> EngineDescription:
    """The description of the engine at ``path``. Raises KdxError if there is no engine, or if kdx did not write it."""
    if not path.is_file():
        raise KdxError(f"There is no file {path}.", "Check the path, or build the engine with kdx export.")
    beside = description_path(path)
    try:
        entries = parse_json(beside.read_text())
        file = Description.of(entries.pop("file"))
        return EngineDescription(file=file, **{key: tuples(value) for key, value in entries.items()})
    except FileNotFoundError:
        raise KdxError(
            f"{path} cannot be loaded: there is no {beside.name} beside it.", "Keep the two files together, or build the engine again."
        ) from None
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise KdxError(
            f"{beside} was not written by this version of kdx: {first_line(error)}.", "Build the engine again with kdx export."
        ) from error


def load(path: Path) -> tuple[EngineDescription, bytes]:
    """The description of the engine at ``path``, and the engine itself. Raises KdxError if the two do not belong together."""
    described = describe(path)
    engine = path.read_bytes()
    if hashlib.sha256(engine).hexdigest() != described.sha256:
        raise KdxError(f"{path} is not the engine that {description_path(path).name} describes.", "Build it again with kdx export.")
    return described, engine


def _built(onnx_path: Path, requested: EngineDescription, package: Any) -> bytes:
    with _building:  # one build at a time, because all share the process's logger
        logger = messages(requested.package)
        logger.errors.clear()
        builder = package.Builder(logger)
        network = builder.create_network(1 << int(package.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = package.OnnxParser(network, logger)
        if not parser.parse_from_file(str(onnx_path)):
            raise _parser_error(onnx_path, parser, logger)
        config = builder.create_builder_config()
        if not requested.tf32:
            config.clear_flag(package.BuilderFlag.TF32)
        if requested.package == "tensorrt_rtx":
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(package.ComputeCapability, requested.arch.upper().replace("_", "")), 0)
        else:  # TensorRT-RTX measures nothing, and with a timing cache it would need a GPU
            _load_timings(config, _timing_cache(requested))
        config.add_optimization_profile(_profile(builder, requested))
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            hint = "Run the file with --runtime onnx, or choose a smaller batch."
            if requested.arch == "sm_75" and requested.package == "tensorrt_rtx":
                hint = "On sm_75 TensorRT-RTX multiplies matrices in float16 only: export with --precision fp16, or use --runtime onnx."
            raise KdxError(f"TensorRT cannot build {onnx_path}: {logger.last()}.", hint)
        if requested.package == "tensorrt":
            _save_timings(config, _timing_cache(requested))
        return bytes(engine)


def _profile(builder: Any, requested: EngineDescription) -> Any:
    profile = builder.create_optimization_profile()
    for name, shape in requested.inputs.items():
        profile.set_shape(name, *(tuple(images if size == "batch" else size for size in shape) for images in requested.batch))
    return profile


def _parser_error(onnx_path: Path, parser: Any, logger: Any) -> KdxError:
    """The parser's first error, with the operator and the name of the node at which it failed."""
    problem = f"TensorRT cannot read {onnx_path}: {logger.last()}."
    if parser.num_errors:
        error = parser.get_error(0)
        reason = " ".join(error.desc().split()).rstrip(".")
        problem = f"TensorRT cannot read {onnx_path}: {reason}."
        if error.node() >= 0:  # -1: the file as a whole
            node = f"{error.node_operator()} node {error.node_name() or f'number {error.node()}'!r}"
            problem = f"TensorRT does not support the {node} of {onnx_path}: {reason}."
    return KdxError(problem, "Run the file with --runtime onnx, or export other layers.")


def _timing_cache(requested: EngineDescription) -> Path:
    gpu = re.sub(r"\W+", "-", requested.gpu or requested.arch)
    return cache_folder() / f"timings-{requested.version}-{gpu}.cache"


def _load_timings(config: Any, path: Path) -> None:
    """Start from the measurements of earlier builds, or from none if the cache is damaged or from another GPU."""
    content = b""
    with suppress(OSError):
        content = path.read_bytes()
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _save_timings(config: Any, path: Path) -> None:
    try:
        replace_file(path, bytes(config.get_timing_cache().serialize()))
    except OSError as error:  # the engine is built; only the next build is slower
        log.info("The timings of this build were not kept in %s: %s", path, error.strerror or error)


def check_batch(batch: BatchRange, least: int) -> None:
    """Raise KdxError if an engine cannot take batches of (min, best, max) images of a file whose batches have ``least`` images or more."""
    lowest, best, highest = batch
    if not 1 <= lowest <= best <= highest:
        raise KdxError(
            f"An engine cannot take batches from {lowest} to {highest}, best {best}.", "Give numbers with 1 <= min <= best <= max."
        )
    if lowest < least:
        raise KdxError(
            f"An explainer compares the images of a batch, so its engine cannot take batches of {lowest}.",
            f"Give a smallest batch of at least {least}.",
        )


def _fixed_shape(file: Description, name: str, shape: Shape, image_size: tuple[int, int] | None) -> Shape:
    """The shape of an input or output with numbers for height, width and embedding. Targets are one-hot rows."""
    fixed = tuple(file.outputs["logits/student"][1] if size == "embedding" else size for size in shape)
    if "height" in shape or "width" in shape:
        if image_size is None:
            raise KdxError("The file takes images of any size, and an engine takes one size.", "Give the height and width of the images.")
        numbers = {"height": image_size[0], "width": image_size[1]}
        fixed = tuple(numbers.get(size, size) if isinstance(size, str) else size for size in fixed)
    elif name == "images" and image_size is not None and shape[2:] != tuple(image_size):
        raise KdxError(
            f"The file takes images of {shape[2]} x {shape[3]}, not {image_size[0]} x {image_size[1]}.",
            "Omit the size, or export the network for the other size.",
        )
    unknown = [size for size in fixed if isinstance(size, str) and size != "batch"]
    if unknown:
        raise KdxError(
            f"{name} of the file has a dimension {unknown[0]!r}, and only the batch of an engine may vary.",
            "Export it again with kdx export.",
        )
    return fixed


def _digest(path: Path, model: onnx.ModelProto) -> str:
    """SHA-256 of the file together with the files that contain its larger weights."""
    locations = {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    digest = hashlib.sha256()
    for part in (path, *(path.parent / location for location in sorted(locations))):
        try:
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise KdxError(
                f"{part} cannot be read: {error.strerror}.", "Keep an ONNX file together with the files that contain its weights."
            ) from error
    return digest.hexdigest()


def _existing(path: Path, requested: EngineDescription) -> EngineDescription | None:
    """The description of the engine at ``path`` if it is the requested one, else None."""
    if not path.exists():
        return None
    try:
        existing, _ = load(path)
    except (KdxError, OSError):  # damaged, or written by another version: it must be built again
        return None
    return existing if replace(existing, sha256="") == requested else None
