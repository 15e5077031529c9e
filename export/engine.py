"""An ONNX file that kdx wrote -> an engine that TensorRT, or TensorRT-RTX, runs on one kind of GPU."""

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

from kdx.disk import cache_folder, replace_file, staging, write_through
from kdx.errors import KdxError, first_line
from kdx.export import description
from kdx.export.description import Description, Shape, shapes, tuples
from kdx.features.arrays import MIN_IMAGES

log = logging.getLogger("kdx")

PackageName = Literal["tensorrt", "tensorrt_rtx"]
BatchRange = tuple[int, int, int]

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
"""What TensorRT-RTX builds for, with or without such a GPU in the machine. On sm_75 it multiplies matrices in float16 only."""
_INSTALL: dict[PackageName, str] = {"tensorrt": "pip install 'kdx[gpu]'", "tensorrt_rtx": "pip install tensorrt-rtx-cu13"}
LEAST_EXPLAINED = MIN_IMAGES
"""Images that the geometry of an explainer file needs."""

_building = threading.Lock()


@dataclass(frozen=True)
class EngineDescription:
    """What ENGINE.json says of the engine beside it.

    file: what the ONNX file says of itself. inputs, outputs: shapes by name; a dimension is a number, or ``batch``, which
    may be anything from the first to the last of ``batch`` = (min, best, max) and is fastest at best. gpu: TensorRT's
    engines run on this model of GPU; None where any GPU of the architecture ``arch`` will do, as TensorRT-RTX's do. tf32:
    whether products may be rounded to TensorFloat-32. onnx_sha256: of the ONNX file with its external data. sha256: of the engine.
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
    """The package that builds, the GPU that it builds for, and why in one line."""

    package: PackageName
    arch: str
    gpu: str | None
    why: str


def choose_target(arch: str | None = None) -> BuildTarget:
    """Who builds for whom: a named architecture is TensorRT-RTX's, this machine's own GPU is TensorRT's where that is installed.

    Only TensorRT-RTX builds for a GPU that is not there. TensorRT times its kernels on the GPU it builds for, so it gets that
    GPU; without it TensorRT-RTX does, where it knows the architecture. Raises KdxError where neither can.
    """
    known = ", ".join(ARCHITECTURES)
    if arch is not None:
        if arch not in ARCHITECTURES:
            raise KdxError(
                f"TensorRT-RTX does not build for {arch!r}.",
                f"Name one of {known}; for another GPU, build on a machine that has it, without naming an architecture.",
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
    """The Python package; KdxError where it is not installed, or does not find its libraries."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:
        raise KdxError(f"The package {name} cannot be loaded: {first_line(error)}.", f"Install it with: {_INSTALL[name]}") from error


@functools.cache
def messages(name: PackageName) -> Any:
    """The one logger that this process gives to a package; ``errors`` collects what it heard.

    One only, for good: the package keeps the first that it is given, by its address, and later ones hear nothing.
    """
    package = load_package(name)
    logger: Any = package.ILogger
    severe = (logger.INTERNAL_ERROR, logger.ERROR)

    class Messages(logger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in severe:
                self.errors.append(" ".join(message.split()))

        def last(self) -> str:
            return self.errors[-1].rstrip(".") if self.errors else "it gave no reason"

    return Messages()


def description_path(path: Path) -> Path:
    """Where an engine's description lies: beside it, as ENGINE.json."""
    return path.with_name(f"{path.name}.json")


def build(
    onnx_path: Path,
    engine_path: Path,
    *,
    batch: BatchRange,
    arch: str | None = None,
    image_size: tuple[int, int] | None = None,
    tf32: bool = False,
    timing_cache: Path | None = None,
) -> EngineDescription:
    """Build the engine of an ONNX file that kdx wrote, and write it with its description beside it as ENGINE.json.

    batch: (min, best, max) number of images. arch: as in `choose_target`; by default this machine's GPU. image_size: height and
    width for a file that takes any; an engine has one size. timing_cache: where TensorRT keeps what it measured, so that the next
    build is quicker; by default a file for each GPU and version in the user's cache folder. TensorRT-RTX measures nothing.

    Precision is the file's: networks are strongly typed. TensorRT would still round the products of float32 to TensorFloat-32,
    whose 10 bits of mantissa leave an error near 1e-3 in features and spoil the distances of near pairs, which are differences;
    so that is off, and ``tf32=True`` allows it for speed.

    An engine already there that was built from the same file, by the same version for the same GPU, sizes and precision, is
    kept. One that fails, or is interrupted, leaves nothing behind and the old one in place. Two builds of one file differ in a
    few bytes, so their sha256 does too.

    Raises KdxError for a file, sizes or an architecture that cannot be built, and for a folder that cannot be written.
    """
    file = description.describe(onnx_path)
    check_batch(batch, file.kind)
    target = choose_target(arch)
    package = load_package(target.package)
    model = onnx.load(onnx_path, load_external_data=False)
    wanted = EngineDescription(
        file=file,
        inputs={name: _sized(file, name, shape, image_size) for name, shape in shapes(model.graph.input).items()},
        outputs={name: _sized(file, name, shape, image_size) for name, shape in shapes(model.graph.output).items()},
        batch=batch,
        package=target.package,
        version=package.__version__,
        arch=target.arch,
        gpu=target.gpu,
        tf32=tf32,
        onnx_sha256=_digest(onnx_path, model),
        sha256="",
    )
    if (found := _held(engine_path, wanted)) is not None:
        return found
    log.info("engine of %s: %s", onnx_path.name, target.why)
    with staging(engine_path) as folder:  # before the build, whose minutes a folder that cannot be written would waste
        engine = _built(onnx_path, wanted, package, timing_cache or _timing_cache(wanted))
        described = replace(wanted, sha256=hashlib.sha256(engine).hexdigest())
        write_through(folder / engine_path.name, engine)
        write_through(folder / description_path(engine_path).name, (json.dumps(asdict(described), indent=2) + "\n").encode())
    return described


def describe(path: Path) -> EngineDescription:
    """What the description beside the engine at ``path`` says; KdxError where there is no engine, or none of kdx's."""
    if not path.is_file():
        raise KdxError(f"There is no file {path}.", "Check the path, or build the engine with kdx export.")
    beside = description_path(path)
    try:
        held = json.loads(beside.read_text())
        file = Description.of(held.pop("file"))
        return EngineDescription(file=file, **{key: tuples(value) for key, value in held.items()})
    except FileNotFoundError:
        raise KdxError(f"Beside {path} there is no {beside.name}.", "Keep the two files together, or build the engine again.") from None
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise KdxError(
            f"{beside} was not written by this version of kdx: {first_line(error)}.", "Build the engine again with kdx export."
        ) from error


def load(path: Path) -> tuple[EngineDescription, bytes]:
    """The description of the engine at ``path`` and the engine itself; KdxError where the two do not belong together."""
    described = describe(path)
    engine = path.read_bytes()
    if hashlib.sha256(engine).hexdigest() != described.sha256:
        raise KdxError(f"{path} is not the engine that {description_path(path).name} describes.", "Build it again with kdx export.")
    return described, engine


def _built(onnx_path: Path, wanted: EngineDescription, package: Any, timings: Path) -> bytes:
    with _building:  # the messages are the process's
        heard = messages(wanted.package)
        heard.errors.clear()
        builder = package.Builder(heard)
        network = builder.create_network(1 << int(package.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = package.OnnxParser(network, heard)
        if not parser.parse_from_file(str(onnx_path)):
            raise _refused(onnx_path, parser, heard)
        config = builder.create_builder_config()
        if not wanted.tf32:
            config.clear_flag(package.BuilderFlag.TF32)
        if wanted.package == "tensorrt_rtx":
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(package.ComputeCapability, wanted.arch.upper().replace("_", "")), 0)
        else:  # TensorRT-RTX measures nothing, and given a timing cache it would ask for a GPU
            _take_timings(config, timings)
        config.add_optimization_profile(_profile(builder, wanted))
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            hint = "Run the file with --runtime onnx, or choose a smaller batch."
            if wanted.arch == "sm_75" and wanted.package == "tensorrt_rtx":
                hint = "On sm_75 TensorRT-RTX multiplies matrices in float16 only: export the network in that, or use --runtime onnx."
            raise KdxError(f"TensorRT cannot build {onnx_path}: {heard.last()}.", hint)
        if wanted.package == "tensorrt":
            _keep_timings(config, timings)
        return bytes(engine)


def _profile(builder: Any, wanted: EngineDescription) -> Any:
    profile = builder.create_optimization_profile()
    for name, shape in wanted.inputs.items():
        profile.set_shape(name, *(tuple(images if size == "batch" else size for size in shape) for images in wanted.batch))
    return profile


def _refused(onnx_path: Path, parser: Any, heard: Any) -> KdxError:
    """The parser's first error, with the operator and name of the node that it failed at."""
    problem = f"TensorRT cannot read {onnx_path}: {heard.last()}."
    if parser.num_errors:
        error = parser.get_error(0)
        reason = " ".join(error.desc().split()).rstrip(".")
        problem = f"TensorRT cannot read {onnx_path}: {reason}."
        if error.node() >= 0:  # -1: the file as a whole
            node = f"{error.node_operator()} node {error.node_name() or f'number {error.node()}'!r}"
            problem = f"TensorRT does not take the {node} of {onnx_path}: {reason}."
    return KdxError(problem, "Run the file with --runtime onnx, or export other layers.")


def _timing_cache(wanted: EngineDescription) -> Path:
    gpu = re.sub(r"\W+", "-", wanted.gpu or wanted.arch)
    return cache_folder() / f"timings-{wanted.version}-{gpu}.cache"


def _take_timings(config: Any, path: Path) -> None:
    """Start from what earlier builds measured; a cache that is damaged, or another GPU's, is begun anew."""
    held = b""
    with suppress(OSError):
        held = path.read_bytes()
    cache = config.create_timing_cache(held)
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _keep_timings(config: Any, path: Path) -> None:
    try:
        replace_file(path, bytes(config.get_timing_cache().serialize()))
    except OSError as error:  # the engine is built; only the next build is slower
        log.info("The timings of this build were not kept in %s: %s", path, error.strerror or error)


def check_batch(batch: BatchRange, kind: str) -> None:
    """KdxError where an engine of a file of this kind cannot take batches of (min, best, max) images."""
    lowest, best, highest = batch
    if not 1 <= lowest <= best <= highest:
        raise KdxError(
            f"An engine cannot take batches from {lowest} to {highest}, best {best}.", "Give numbers with 1 <= min <= best <= max."
        )
    if kind == "explainer" and lowest < LEAST_EXPLAINED:
        raise KdxError(
            f"An explainer compares the images of a batch, so its engine cannot take batches of {lowest}.",
            f"Give a smallest batch of {LEAST_EXPLAINED} or more.",
        )


def _sized(file: Description, name: str, shape: Shape, image_size: tuple[int, int] | None) -> Shape:
    """An input's or output's shape with its height, width and embedding as numbers; targets are one-hot rows."""
    fixed = tuple(file.outputs["logits/student"][1] if size == "embedding" else size for size in shape)
    if "height" in shape or "width" in shape:
        if image_size is None:
            raise KdxError("The file takes images of any size, and an engine takes one.", "Give the size of the images, height and width.")
        given = {"height": image_size[0], "width": image_size[1]}
        fixed = tuple(given.get(size, size) if isinstance(size, str) else size for size in fixed)
    elif name == "images" and image_size is not None and shape[2:] != tuple(image_size):
        raise KdxError(
            f"The file takes images of {shape[2]} x {shape[3]}, not {image_size[0]} x {image_size[1]}.",
            "Leave the size out, or export the network for the other size.",
        )
    unknown = [size for size in fixed if isinstance(size, str) and size != "batch"]
    if unknown:
        raise KdxError(
            f"{name} of the file has a dimension {unknown[0]!r}, and an engine of kdx has none but the batch.",
            "Export it again with kdx export.",
        )
    return fixed


def _digest(path: Path, model: onnx.ModelProto) -> str:
    """SHA-256 over the file and the files that hold its larger weights."""
    outside = {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
    digest = hashlib.sha256()
    for part in (path, *(path.parent / location for location in sorted(outside))):
        try:
            with part.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise KdxError(
                f"{part} cannot be read: {error.strerror}.", "Keep an ONNX file together with the files that hold its weights."
            ) from error
    return digest.hexdigest()


def _held(path: Path, wanted: EngineDescription) -> EngineDescription | None:
    """The description of the engine at ``path`` where that is the one wanted."""
    if not path.exists():
        return None
    try:
        found, _ = load(path)
    except (KdxError, OSError):  # damaged, or another version's: to be built again
        return None
    return found if replace(found, sha256="") == wanted else None
