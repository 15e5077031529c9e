"""The names of values in an ONNX graph: outputs get a graph's own names, and inner values give way to them.

An output has the name of a layer, and a network may name its layers as the exporter names its values, such as ``mean`` or ``relu``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx


def placeholder(index: int) -> str:
    """The name of an output during the export, which no layer and no operator has."""
    return f"output {index}"


def name_outputs(model: onnx.ModelProto, names: Sequence[str]) -> None:
    """Give the outputs of ``model`` these names. Inner values of the same name get a name that no other value has."""
    present = set(_names(model.graph))
    renamed = {output.name: name for output, name in zip(model.graph.output, names, strict=True)}
    for name in names:
        if name in present and name not in renamed:
            renamed[name] = _unused(name, present | set(names))
            present.add(renamed[name])
    _rename(model.graph, renamed)


def _unused(name: str, taken: set[str]) -> str:
    return next(candidate for number in range(len(taken) + 1) if (candidate := f"{name} ({number})") not in taken)


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    """The names of all values of a graph and of the graphs inside it."""
    yield from (value.name for value in (*graph.input, *graph.output, *graph.initializer))
    for node in graph.node:
        yield from node.output
        for inner in _inner_graphs(node):
            yield from _names(inner)


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for inner in _inner_graphs(node):
            _rename(inner, names)


def _inner_graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs
