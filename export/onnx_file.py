"""Write an ONNX file that says what it holds, and read that back."""

from __future__ import annotations

import glob
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
import torch
from google.protobuf.message import DecodeError

from kdx.errors import KdxError, first_line
from kdx.export import parity
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.export.parity import ParityReport

_PREFIX = "kdx."
_TRACE_BATCH = 5
_PARITY_BATCH = 3
"""A batch size equal to another dimension (three channels, say) would be merged with it, so the trace takes a rare one."""


@dataclass(frozen=True)
class Description:
    """What a file written by kdx says of itself."""

    kind: str
    reference: str
    layers: tuple[str, ...]
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    weights: str
    parameters: int
    image_size: tuple[int, int] | None
    versions: dict[str, str]


def write(
    graph: FeatureGraph,
    path: Path,
    *,
    reference: str,
    weights: str,
    image_size: tuple[int, int],
    classes: tuple[str, ...] = (),
    tolerance: float = parity.TOLERANCE,
) -> ParityReport:
    """Export ``graph`` (images -> logits and every layer's feature) to ``path``, compare it with PyTorch, return the report.

    The batch is dynamic; height and width are too where the graph resizes, else they are ``image_size``. The file is compared
    at another batch size, on other images, than it was traced with; the report is stored in its metadata and beside it as
    PATH.parity.json. A file that fails parity, or is interrupted, is not left behind. weights: a hash that names them.

    Raises KdxError where the network cannot be traced, has no ONNX form, fails parity, or the folder cannot be written.
    """
    graph = graph.eval()
    resizes = graph.preprocessing.size is not None
    if resizes:  # two sizes that neither equal each other nor the size resized to, so that no dimension is merged
        traced, compared = (image_size[0] + 3, image_size[1] + 7), image_size
    else:
        traced = compared = image_size
    partial = path.with_name(f".{path.name}.partial")
    beside = path.with_name(f"{path.name}.parity.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        model = _trace(graph, _images(_TRACE_BATCH, traced, seed=0), resizes, reference)
        fixed = None if resizes else image_size
        parameters = sum(parameter.numel() for parameter in graph.parameters())
        description = Description(
            "features", reference, graph.layers, graph.preprocessing, classes, weights, parameters, fixed, _versions()
        )
        _describe_in(model, asdict(description))
        _save(model, partial)
        report = parity.compare(partial, graph, _images(_PARITY_BATCH, compared, seed=1), tolerance)
        if not report:
            raise KdxError(
                f"The ONNX file of {reference} does not agree with PyTorch: {report.worst()}.",
                "Please report the network; until it exports, run it with --runtime eager.",
            )
        _describe_in(model, {"parity": report.as_dict()})
        _save(model, partial)
        partial.replace(path)
        beside.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    except OSError as error:
        raise KdxError(
            f"{path} cannot be written: {error.strerror or error}.", "Choose a folder that you may write to, on a disk with room."
        ) from error
    finally:
        for leftover in path.parent.glob(f"{glob.escape(partial.name)}*"):
            leftover.unlink()
    return report


def describe(path: Path) -> Description:
    """What the file at ``path`` says of itself; KdxError where it is no ONNX file or none of kdx's."""
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError:
        raise KdxError(f"There is no file {path}.", "Check the path, or export the network with kdx export.") from None
    except (DecodeError, OSError) as error:
        raise KdxError(f"{path} is not a readable ONNX file.", "Export it again with kdx export.") from error
    try:
        held = {entry.key.removeprefix(_PREFIX): entry.value for entry in model.metadata_props if entry.key.startswith(_PREFIX)}
        entries = {key: json.loads(value) for key, value in held.items()}
        size, mean, std = (entries["preprocessing"][key] for key in ("size", "mean", "std"))
        preprocessing = Preprocessing(tuple(size) if size else None, tuple(mean), tuple(std))
        return Description(
            entries["kind"],
            entries["reference"],
            tuple(entries["layers"]),
            preprocessing,
            tuple(entries["classes"]),
            entries["weights"],
            entries["parameters"],
            tuple(entries["image_size"]) if entries["image_size"] else None,
            entries["versions"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise KdxError(
            f"{path} was not written by this version of kdx: its metadata lacks or garbles {first_line(error)}.",
            "Export it again with kdx export.",
        ) from None


def holds(path: Path, graph: FeatureGraph, weights: str) -> bool:
    """Whether the file at ``path`` is ``graph`` with the weights of this hash, exported by these versions."""
    if not path.exists():
        return False
    try:
        found = describe(path)
    except KdxError:  # damaged, or another version's: to be written again
        return False
    return (found.weights, found.layers, found.preprocessing, found.versions) == (weights, graph.layers, graph.preprocessing, _versions())


def _images(n: int, size: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def _trace(graph: FeatureGraph, images: torch.Tensor, resizes: bool, reference: str) -> onnx.ModelProto:
    dynamic = {0: torch.export.Dim("batch")}
    if resizes:
        dynamic |= {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph,
                (images.to(graph.mean.device),),
                dynamo=True,
                dynamic_shapes=(dynamic,),
                input_names=["images"],
                output_names=["logits", *graph.layers],
                verbose=False,
            )
    except KdxError:
        raise
    except Exception as error:  # the exporter raises whatever the network's own code does under tracing
        raise KdxError(
            f"{reference} cannot be exported: {first_line(error.__cause__ or error)}.",
            "Run it with --runtime eager, or choose other layers.",
        ) from error
    assert program is not None
    return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """No word from the exporter: it warns of its own deprecated calls and dumps graphs; what the user can mend it raises."""
    logger = logging.getLogger("torch")
    level = logger.level
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            logger.setLevel(level)


def _describe_in(model: onnx.ModelProto, entries: Mapping[str, object]) -> None:
    for key, value in entries.items():
        model.metadata_props.add(key=_PREFIX + key, value=json.dumps(value))


def _save(model: onnx.ModelProto, path: Path) -> None:
    with path.open("wb") as file:
        file.write(model.SerializeToString(deterministic=True))
        file.flush()
        os.fsync(file.fileno())


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {package: version(package) for package in ("kdx", "torch", "onnx", "onnxscript")}
