"""`kdx export`: writes the networks of model references as files for other runtimes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from kdx import models
from kdx.choices import FileFormat, FileKind, FilePrecision
from kdx.commands.references import ChosenReferences, choose_references, models_file_of
from kdx.errors import KdxError
from kdx.explain.graph import ReferenceImages, explainer_graph, largest_size
from kdx.export import engine, onnx_file
from kdx.export.description import Origin, Shape, describe
from kdx.export.engine import BatchRange
from kdx.export.explainer_graphs import Graph
from kdx.export.graphs import FeatureGraph, GradientGraph
from kdx.export.parity import ParityReport
from kdx.features.arrays import MIN_IMAGES
from kdx.models.models_file import load_any
from kdx.models.network import Network
from kdx.roles import ROLES


@dataclass(frozen=True)
class ExportOptions:
    """The properties of the files that `export` writes.

    at: the layer of a gradients file's cotangent, by default the logits. image_size: the side of the square to which the file resizes
    images, by default the network's own size. to: ``tensorrt`` also builds an engine from the ONNX file. batch: the engine's (min, best,
    max) images per pass, by default (1, 32, 64), or (4, 32, 64) for an explainer without reference images. arch: the architecture of the
    engine's GPU, such as sm_86, by default that of this machine. tf32: whether the engine may round products to TensorFloat-32.
    reference: with m > 0, an explainer file contains m class-balanced images of the train split of ``data``, chosen with ``seed`` (by
    default 0), and compares each image with them. pooled: an explainer file measures distances between spatial means.
    """

    at: str | None = None
    precision: FilePrecision = "fp32"
    image_size: int | None = None
    to: FileFormat = "onnx"
    batch: BatchRange | None = None
    arch: str | None = None
    tf32: bool = False
    reference: int = 0
    data: str | None = None
    seed: int | None = None
    pooled: bool = False


@dataclass(frozen=True)
class Exported:
    """A file that was written: its size in bytes, its shapes by name, and the seconds that it took. An engine has no parity report."""

    path: Path
    bytes: int
    inputs: dict[str, Shape]
    outputs: dict[str, Shape]
    parity: ParityReport | None
    seconds: float


def export(
    references: dict[str, str],
    layers: Sequence[str],
    kind: FileKind,
    out: Path,
    options: ExportOptions = ExportOptions(),
    *,
    announce: Callable[[str], None] = print,
) -> list[Exported]:
    """Export networks to a file of a kind, and optionally build its engine. ``out`` is a folder, or the path of the .onnx file.

    references: the model reference (or ``MODELS.toml:ROLE``) of ``network``. For an explainer file, those of ``student`` and optionally
    ``base`` and ``teacher``; a layer may then be ``student_layer=teacher_layer`` or ``student=layer,teacher=layer``. ``network`` may also
    be an .onnx file that kdx wrote, from which an engine is built. Raises KdxError for anything that the user can fix.
    """
    file = references.get("network", "")
    if file.endswith(".onnx"):
        if options.to != "tensorrt":
            raise KdxError(f"{file} is already an ONNX file.", "Build its engine with --to tensorrt.")
        if set(references) != {"network"} or layers or options.at or options.precision != "fp32" or options.image_size:
            raise KdxError(
                f"The networks, layers and numbers of {file} are fixed.",
                "Name it alone, with --for, --batch and --tf32; for another file, export its network.",
            )
        return [_build_engine(Path(file), out if out.suffix == ".engine" else out / f"{Path(file).stem}.engine", options, announce)]
    _check_options(set(references), kind, options)
    announce(f"Loading {' and '.join(references.values())}")
    loaded = {role: load_any(reference) for role, reference in references.items()}
    for network, _ in loaded.values():
        if network.note:
            announce(network.note)
    networks = {role: _resized(network, options.image_size) for role, (network, _) in loaded.items()}
    if not layers:
        network = networks.get("network") or networks["student"]
        raise KdxError("No layer was named.", f"Name one or more with --layer; this network has {', '.join(models.layers(network))}.")
    size = largest_size(network.preprocessing.size for network in networks.values())
    chosen = _references(options, references, size, announce)
    graph = _graph(networks, layers, kind, options, None if chosen is None else chosen.images)
    path = out if out.suffix == ".onnx" else out / f"{_stem(networks, kind, options.precision)}.onnx"
    announce(f"Exporting {path.name} and comparing it with PyTorch")
    start = time.perf_counter()
    parity = onnx_file.write(
        graph,
        path,
        origin={role: Origin(network.reference, network.weights_hash) for role, network in networks.items()},
        image_size=size,
        classes=next(classes for _, classes in loaded.values()) if chosen is None else chosen.classes,
        reference_ids=() if chosen is None else chosen.ids,
        precision=options.precision,
    )
    description = describe(path)
    exported = [Exported(path, _size(path), description.inputs, description.outputs, parity, time.perf_counter() - start)]
    if options.to == "tensorrt":
        exported.append(_build_engine(path, path.with_suffix(".engine"), options, announce))
    return exported


def file_table(file: Exported) -> Table:
    """A description of an exported file, one line per property."""

    def shapes(tensors: dict[str, tuple[int | str, ...]]) -> str:
        return "\n".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in tensors.items())

    table = Table(box=None, show_header=False, pad_edge=False)
    properties = {
        "file": str(file.path),
        "size": f"{file.bytes / 1e6:.1f} MB",
        "inputs": shapes(file.inputs),
        "outputs": shapes(file.outputs),
        "parity": "as for the ONNX file" if file.parity is None else file.parity.summary(),
        "time": f"{file.seconds:.1f} s",
    }
    for name, value in properties.items():
        table.add_row(name, Text(value, overflow="fold"))
    return table


def parse_batch(text: str) -> BatchRange:
    """``MIN:BEST:MAX``, or one number for all three."""
    try:
        lowest, best, highest = (int(part) for part in (text.split(":") if ":" in text else [text] * 3))
    except ValueError:
        raise KdxError(f"{text!r} is not a range of batches.", "Write MIN:BEST:MAX, for example 1:32:64.") from None
    return lowest, best, highest


def _check_options(roles: set[str], kind: FileKind, options: ExportOptions) -> None:
    """KdxError for options that contradict each other, before an export that may take minutes."""
    if kind == "explainer" and not {"student"} <= roles <= set(ROLES):
        raise KdxError(
            "An explainer file contains a student, and optionally a base and a teacher.",
            "Name them with --student, --base and --teacher.",
        )
    if kind != "explainer" and roles != {"network"}:
        raise KdxError(
            f"A file of {kind} contains one network.", "Name it alone, without --student, --base and --teacher; or choose --kind explainer."
        )
    if kind != "gradients" and options.at is not None:
        raise KdxError(f"A file of {kind} has no cotangent.", "Leave --at out, or choose --kind gradients.")
    if kind != "explainer" and options.pooled:
        raise KdxError(f"A file of {kind} contains no distances.", "Leave --pooled out, or choose --kind explainer.")
    if options.to != "tensorrt" and (options.arch or options.batch or options.tf32):
        raise KdxError("Only an engine is built for a GPU, a range of batches and TF32.", "Give --to tensorrt, or leave these options out.")
    _check_references(kind, options)
    if options.to == "tensorrt":
        least = MIN_IMAGES if kind == "explainer" and not options.reference else 1
        engine.check_batch(options.batch or _batch(least), least)
        engine.choose_target(options.arch)


def _check_references(kind: FileKind, options: ExportOptions) -> None:
    """KdxError for options of reference images that contradict each other."""
    if not options.reference and options.data is None:
        if options.seed is not None:
            raise KdxError(
                "No reference images are chosen, so the seed has no effect.", "Give --reference and --data, or leave --seed out."
            )
        return
    if kind != "explainer":
        raise KdxError(f"A file of {kind} has no reference images.", "Leave --reference and --data out, or choose --kind explainer.")
    if options.data is None:
        raise KdxError("There are no data to choose reference images from.", "Name them with --data, as for kdx explain.")
    if options.reference < MIN_IMAGES:
        raise KdxError(
            f"A reference set of {options.reference} images is too small.", f"Give --reference {MIN_IMAGES} or more, for example 256."
        )


def _batch(least: int) -> BatchRange:
    return least, 32, 64


def _graph(
    networks: dict[str, Network], layers: Sequence[str], kind: FileKind, options: ExportOptions, references: ReferenceImages | None
) -> Graph:
    if kind == "explainer":
        return explainer_graph(networks, layers, references, pooled=options.pooled)
    network = networks["network"]
    if kind == "features":
        return FeatureGraph(network.module, layers, network.preprocessing)
    return GradientGraph(network.module, layers, network.preprocessing, options.at)


def _references(
    options: ExportOptions, references: dict[str, str], size: tuple[int, int], announce: Callable[[str], None]
) -> ChosenReferences | None:
    if options.data is None:
        return None
    announce(f"Running the networks on {options.reference} reference images of {options.data}")
    models_file = models_file_of(references["student"])
    chosen = choose_references(options.data, options.reference, options.seed or 0, models_file, size)
    if len(chosen.ids) < options.reference:
        announce(f"The train split has only {len(chosen.ids)} images; all of them are reference images.")
    return chosen


def _resized(network: Network, side: int | None) -> Network:
    if side is not None:
        return replace(network, preprocessing=replace(network.preprocessing, size=(side, side)))
    if network.preprocessing.size is None:
        raise KdxError(f"{network.reference} does not specify an image size.", "Give --image-size.")
    return network


def _stem(networks: dict[str, Network], kind: FileKind, precision: FilePrecision) -> str:
    name = "-given-".join(
        models.file_name(networks[role].reference) for role in ("network", "student", _given(networks)) if role in networks
    )
    return f"{name}.{kind}" + ("" if precision == "fp32" else f".{precision}")


def _given(networks: dict[str, Network]) -> str:
    """The role beside the student in the name of an explainer file."""
    return "base" if "base" in networks else "teacher"


def _size(path: Path) -> int:
    weights = path.with_name(f"{path.name}.data")  # a large network keeps its weights beside the file
    return path.stat().st_size + (weights.stat().st_size if weights.exists() else 0)


def _build_engine(onnx_path: Path, path: Path, options: ExportOptions, announce: Callable[[str], None]) -> Exported:
    target = engine.choose_target(options.arch)
    announce(f"Building {path.name} with {target.why}")
    start = time.perf_counter()
    file = describe(onnx_path)
    size: tuple[int, int] | None = None
    if file.image_size is None:
        size = largest_size(network.preprocessing.size for network in file.networks.values())
    built = engine.build(
        onnx_path, path, batch=options.batch or _batch(file.least_images), arch=options.arch, image_size=size, tf32=options.tf32
    )
    return Exported(path, path.stat().st_size, built.inputs, built.outputs, None, time.perf_counter() - start)
