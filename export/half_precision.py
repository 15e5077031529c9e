"""A file in half precision as one that any CPU computes: float32 arithmetic, rounded to the type after every operator.

That is what a GPU's matrix units do, which add up in float32 and store in the type, so the file's rounding can be measured
where no such GPU is.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def simulated(path: Path) -> bytes | None:
    """The file at ``path`` with its half-precision tensors in float32 and a rounding behind each; None where it has none."""
    model = onnx.load(path)
    graph = model.graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    kinds |= {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    if not any(kind in _HALF for kind in kinds.values()):
        return None
    for tensor in graph.initializer:
        if tensor.data_type in _HALF:
            tensor.CopyFrom(_float32(tensor))
    nodes = []
    for node in graph.node:
        half = next((kinds[name] for name in node.output if kinds.get(name) in _HALF), None)
        for attribute in node.attribute:
            if attribute.HasField("t") and attribute.t.data_type in _HALF:
                attribute.t.CopyFrom(_float32(attribute.t))
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _HALF:
                attribute.i = TensorProto.FLOAT
        nodes.append(node)
        if half is None:
            continue
        for place, name in enumerate(node.output):
            if kinds.get(name) in _HALF:
                node.output[place] = f"{name}.exact"
                nodes.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.half"], to=kinds[name]))
                nodes.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.value_info[:]
    data: bytes = model.SerializeToString()
    return data


def _float32(tensor: onnx.TensorProto) -> onnx.TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
