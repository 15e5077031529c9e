"""Simulate a file in half precision on any CPU: float32 arithmetic, rounded to the half-precision format after every operator.

A GPU's matrix units do the same: they add in float32 and store in half precision. So the rounding error of the file can be measured
on a machine without such a GPU.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def simulated(path: Path) -> bytes | None:
    """The file at ``path`` with its half-precision tensors in float32 and rounded after each operator; None if it has no such tensors."""
    model = onnx.load(path)
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    types |= {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)}
    if not any(element in _HALF for element in types.values()):
        return None
    for tensor in model.graph.initializer:
        if tensor.data_type in _HALF:
            tensor.CopyFrom(_float32(tensor))
    nodes = []
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t") and attribute.t.data_type in _HALF:
                attribute.t.CopyFrom(_float32(attribute.t))
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _HALF:
                attribute.i = TensorProto.FLOAT
        nodes.append(node)
        for index, name in enumerate(node.output):
            if types.get(name) in _HALF:
                node.output[index] = f"{name}.exact"
                nodes.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.half"], to=types[name]))
                nodes.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    del model.graph.value_info[:]
    data: bytes = model.SerializeToString()
    return data


def _float32(tensor: onnx.TensorProto) -> onnx.TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name)
