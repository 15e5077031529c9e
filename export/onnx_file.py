"""Export a graph to an ONNX file that describes itself and agrees with PyTorch."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, replace
from pathlib import Path

import onnx
import torch
from torch import Tensor
from torch.fx import config as fx_config

from kdx.choices import FilePrecision
from kdx.disk import staging, unwritable, write_through
from kdx.errors import KdxError, first_line
from kdx.export import parity, recurrence, trace, value_names
from kdx.export.copies import copied
from kdx.export.dependence import check_dependence
from kdx.export.description import (
    METADATA_PREFIX,
    Description,
    NetworkDescription,
    Origin,
    ReferenceDescription,
    shapes_by_name,
    versions,
)
from kdx.export.explainer_graphs import ExplainerGraph, Graph, ReferenceGraph
from kdx.export.graphs import GradientGraph, WatchedNetwork, no_influence
from kdx.export.parity import ParityReport
from kdx.export.simplify import simplify
from kdx.kernels import ambient

_TRIALS = 3
"""The most batches in which a layer's gradient is looked for."""

_TRACE_BATCH = 5
"""The batch size of the trace. It is rare, because tracing merges a batch size with an equal dimension, such as three channels."""

_OPSETS: dict[FilePrecision, int] = {"fp32": 21, "fp16": 21, "bf16": 22}
"""The opset of a file: that of bfloat16 is the first whose convolutions and pools take it. ONNX Runtime's CUDA provider does not have
the pools of opset 22, and would leave them to the CPU."""

_DTYPES: dict[FilePrecision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

_LARGEST = 2**31 - 2**20
"""The most bytes of weights that the file itself contains. Protocol Buffers are limited to 2 GiB."""


@ambient.neutral()
def write(
    graph: Graph,
    path: Path,
    *,
    origin: Origin | Mapping[str, Origin],
    image_size: tuple[int, int],
    classes: tuple[str, ...] = (),
    reference_ids: tuple[str, ...] = (),
    precision: FilePrecision = "fp32",
    tolerance: float = parity.TOLERANCE,
) -> ParityReport:
    """Export ``graph`` to ``path``, compare the file with PyTorch, and return the report.

    The batch size is dynamic. Height and width are dynamic too if every network resizes its images; otherwise they are
    ``image_size``.

    precision: the number format of the networks' weights and arithmetic in the file, whatever the modules' own; the comparison is with
    the same weights in float32. Inputs, outputs and the geometry of an explainer file stay
    float32. origin: of the network, or of each role's network. classes: the names of the classes, and reference_ids: the ids of a
    `ReferenceGraph`'s images, both for the description. tolerance: of a float32 file, see `ParityReport`.

    The comparison uses other batch sizes, images and cotangents than the trace. Its report is in the file's metadata, and beside the
    file as PATH.parity.json. Weights over 2 GB go into PATH.data. If the file fails the comparison, or the export is interrupted, no
    new file is left behind, and an earlier one stays as it was.

    Raises KdxError if the network cannot be traced, has no ONNX form or fails the comparison, or if the folder cannot be written.
    """
    graph.eval()
    check_dependence(graph, image_size)
    for network in _networks(graph).values():
        network.decide_for(image_size)
    graph = _in_float32(graph)
    origins = {"network": origin} if isinstance(origin, Origin) else dict(origin)
    name = " and ".join(origin.reference for origin in origins.values())
    resizes = all(network.preprocessing.size is not None for network in _networks(graph).values())
    with staging(path) as folder:
        # A size that differs from all others, such as the one that images are resized to: tracing merges equal dimensions.
        traced_size = (image_size[0] + 3, image_size[1] + 7) if resizes else image_size
        inputs = parity.seeded_inputs(graph, _TRACE_BATCH, traced_size, seed=0)
        if isinstance(graph, GradientGraph):
            recurrence.check_steps(graph, inputs["images"])
            _check_influence(graph, traced_size)
        model = _exported(_converted(graph, precision), inputs, resizes, name, _OPSETS[precision])
        description = _description(graph, model, origins, precision, None if resizes else image_size)
        _add_metadata(model, asdict(replace(description, classes=classes, references=_references(graph, reference_ids))))
        staged = folder / path.name
        _save(model, staged)
        _check(staged, name)
        report = parity.compare(staged, graph, image_size, tolerance if precision == "fp32" else None)
        if not report:
            raise KdxError(
                f"The ONNX file of {name} does not agree with PyTorch: {report.worst()}.",
                "Please report the network; until it exports, run it with --runtime eager.",
            )
        _add_metadata(model, {"parity": report.as_dict()})
        _save(model, staged)
        write_through(folder / f"{path.name}.parity.json", (json.dumps(report.as_dict(), indent=2) + "\n").encode())
        has_weights_file = _weights_path(staged).exists()
    if not has_weights_file:
        _remove_weights_of_earlier_file(path)
    return report


def _check_influence(graph: GradientGraph, size: tuple[int, int]) -> None:
    """Raise KdxError, before the trace, for a layer whose feature map has no gradient in any of several batches."""
    left = list(graph.layers)
    for seed in range(_TRIALS):
        _, *outputs = graph(*parity.seeded_inputs(graph, _TRACE_BATCH, size, seed).values())
        has_gradient = dict(zip(graph.layers, (bool(gradient.any()) for gradient in outputs[len(graph.layers) :]), strict=True))
        left = [layer for layer in left if not has_gradient[layer]]
        if not left:
            return
    raise no_influence(left[0])


def _description(
    graph: Graph,
    model: onnx.ModelProto,
    origins: Mapping[str, Origin],
    precision: FilePrecision,
    image_size: tuple[int, int] | None,
) -> Description:
    networks = {
        role: NetworkDescription(
            reference=origins[role].reference,
            weights=origins[role].weights,
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            preprocessing=network.preprocessing,
            layers=network.layers,
        )
        for role, network in _networks(graph).items()
    }
    return Description(
        kind=graph.kind,
        networks=networks,
        classes=(),
        precision=precision,
        at=graph.at if isinstance(graph, GradientGraph) else None,
        scores=tuple(graph.scores) if isinstance(graph, ExplainerGraph) else (),
        image_size=image_size,
        inputs=shapes_by_name(model.graph.input),
        outputs=shapes_by_name(model.graph.output),
        versions=versions(),
        pooled=isinstance(graph, ExplainerGraph) and graph.pooled,
    )


def _references(graph: Graph, ids: tuple[str, ...]) -> ReferenceDescription | None:
    return ReferenceDescription(ids, tuple(graph.labels.tolist())) if isinstance(graph, ReferenceGraph) else None


def _weights_path(path: Path) -> Path:
    """Where the weights of the file at ``path`` are if they do not fit into it."""
    return path.with_name(f"{path.name}.data")


def _remove_weights_of_earlier_file(path: Path) -> None:
    try:
        _weights_path(path).unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def _networks(graph: Graph) -> dict[str, WatchedNetwork]:
    """The graph's networks by role; the only one is named ``network``."""
    if isinstance(graph, ExplainerGraph):
        return {role: graph.network(role) for role in graph.roles}
    return {"network": graph}


def _converted(graph: Graph, precision: FilePrecision) -> Graph:
    """The graph with its networks in ``precision``; a copy unless that is float32. Preprocessing stays float32."""
    if precision == "fp32":
        return graph
    graph = copied(graph)
    for network in _networks(graph).values():
        network.network.to(_DTYPES[precision])
    return graph


def _in_float32(graph: Graph) -> Graph:
    """The graph with every network in float32; a copy unless all of them already are.

    The format of the file is chosen by ``precision``, and ONNX Runtime computes in neither bfloat16 nor float64 on every machine.
    """
    if all(_is_float32(network) for network in _networks(graph).values()):
        return graph
    graph = copied(graph)
    for network in _networks(graph).values():
        network.float()
    return graph


def _is_float32(network: WatchedNetwork) -> bool:
    tensors = (*network.parameters(), *network.buffers())
    return all(tensor.dtype == torch.float32 for tensor in tensors if tensor.is_floating_point())


def _exported(graph: Graph, inputs: dict[str, Tensor], resizes: bool, reference: str, opset: int) -> onnx.ModelProto:
    dynamic = {name: {0: "batch"} for name in inputs}
    if resizes:
        dynamic["images"] = {0: "batch", 2: "height", 3: "width"}
    if "target" in dynamic:
        dynamic["target"] = {0: "batch", 1: "embedding"}
    dims = {name: torch.export.Dim(name) for names in dynamic.values() for name in names.values()}
    try:
        with _quiet():
            program = trace.traced_program(
                graph,
                tuple(inputs.values()),
                tuple({axis: dims[name] for axis, name in names.items()} for names in dynamic.values()),
            )
            exported = torch.onnx.export(
                program,
                dynamo=True,
                input_names=list(graph.input_names),
                output_names=[value_names.placeholder(index) for index in range(len(graph.output_names))],
                opset_version=opset,
                verbose=False,
                optimize=False,
            )
            assert exported is not None
            simplify(exported.model)
    except KdxError:
        raise
    except Exception as error:  # under tracing, the network's own code may raise any exception
        cause = first_line(error.__cause__ or error)
        hint = "Run it with --runtime eager, or choose other layers."
        if cause.startswith("Constraints violated"):  # torch.export's message if the forward pass turns a size into a number
            cause = "its forward pass fixes the batch or the image size"
            hint = "Take sizes from images.shape, not by len() or int(); until then, run it with --runtime eager."
        raise KdxError(f"{reference} cannot be exported: {cause}.", hint) from error
    model = exported.model_proto
    value_names.name_outputs(model, graph.output_names)
    _name_dimensions(model, dynamic)
    _round_weights_to_bfloat16(model)
    for node in model.graph.node:
        del node.metadata_props[:]  # the source code that a node comes from, with paths that differ between machines
    return model


def _name_dimensions(model: onnx.ModelProto, names: Mapping[str, Mapping[int, str]]) -> None:
    """Replace the symbols that tracing invented for dimensions (such as s34) by the dimensions' names."""
    symbols = {}
    for value in model.graph.input:
        for axis, name in names[value.name].items():
            symbols[value.type.tensor_type.shape.dim[axis].dim_param] = name
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.HasField("dim_param"):
                size.dim_param = symbols.get(size.dim_param, size.dim_param)


def _round_weights_to_bfloat16(model: onnx.ModelProto) -> None:
    """Round the float32 weights of bfloat16 convolutions: the exporter folds bfloat16 batch norms into float32 weights."""
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.value_info)}
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    value_info = {value.name: value for value in model.graph.value_info}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose") or types.get(node.input[0]) != onnx.TensorProto.BFLOAT16:
            continue
        for name in node.input[1:]:
            if name in weights and weights[name].data_type == onnx.TensorProto.FLOAT:
                rounded = onnx.numpy_helper.to_array(weights[name]).astype(onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16))
                weights[name].CopyFrom(onnx.numpy_helper.from_array(rounded, name))
                if name in value_info:
                    value_info[name].type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which warns of its own deprecated calls and prints graphs. Errors that a user can fix are raised.

    It also does not record the source lines of every operator, which would take a sixth of the time and which no file contains.
    """
    logger = logging.getLogger("torch")
    level = logger.level
    before = getattr(fx_config, "do_not_emit_stack_traces", False)
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL)
        fx_config.do_not_emit_stack_traces = True
        try:
            yield
        finally:
            fx_config.do_not_emit_stack_traces = before
            logger.setLevel(level)


def _add_metadata(model: onnx.ModelProto, entries: Mapping[str, object]) -> None:
    for key, value in entries.items():
        model.metadata_props.add(key=METADATA_PREFIX + key, value=json.dumps(value))


def _save(model: onnx.ModelProto, path: Path) -> None:
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) <= _LARGEST:
        data = model.SerializeToString(deterministic=True)
    else:
        weights = _weights_path(path)
        weights.unlink(missing_ok=True)  # onnx appends
        outside = onnx.ModelProto()
        outside.CopyFrom(model)
        onnx.external_data_helper.convert_model_to_external_data(outside, location=weights.name, size_threshold=1024)
        onnx.external_data_helper.write_external_data_tensors(outside, str(path.parent))
        data = outside.SerializeToString(deterministic=True)
    write_through(path, data)


def _check(path: Path, reference: str) -> None:
    """Raise KdxError if the file violates the ONNX specification: ONNX Runtime often accepts such a file, TensorRT does not."""
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise KdxError(
            f"The ONNX file of {reference} is not valid: {first_line(error)}.",
            "Please report the network; until it exports, run it with --runtime eager.",
        ) from error
