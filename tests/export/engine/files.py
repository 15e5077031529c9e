"""Files that engines are built of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

BATCH = (1, 5, 9)
VERSION = "1.7.1.116"


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def handmade(path: Path, like: Path, nodes: list[onnx.NodeProto], weights: dict[str, tuple[int, ...]], width: int = 3) -> Path:
    """A file of these nodes, images [batch, width] -> logits, with the metadata of a file that kdx wrote."""
    graph = helper.make_graph(
        nodes,
        "handmade",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(np.full(shape, 0.5, np.float32), name) for name, shape in weights.items()],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("strange", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    model.metadata_props.extend(onnx.load(like).metadata_props)
    onnx.save(model, path)
    return path
