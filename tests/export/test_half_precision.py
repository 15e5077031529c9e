"""The simulation of half precision against NumPy's float32 arithmetic, rounded after every operator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from kdx.export import half_precision

KINDS: dict[str, tuple[int, Any, float]] = {
    "float16": (TensorProto.FLOAT16, np.float16, 2**-10),
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16, 2**-7),
}


def saved(path: Path, nodes: list[onnx.NodeProto], kinds: dict[str, int], weights: dict[str, NDArray[Any]]) -> Path:
    """A file x [4, 3] -> y [4, 5], both float32, whose other tensors have these types."""
    shapes = {"x": [4, 3], "y": [4, 5]}
    value = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    between = [helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()]
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "by hand", [value["x"]], [value["y"]], initializers, value_info=between)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10), path)
    return path


def run(model: bytes, x: NDArray[np.float32]) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    result: NDArray[np.float32] = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    return result


@pytest.mark.parametrize("name", KINDS)
def test_every_operators_result_is_rounded(name: str, tmp_path: Path) -> None:
    kind, dtype, step = KINDS[name]
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(3, 5)).astype(dtype), "b": rng.normal(size=5).astype(dtype)}
    third = numpy_helper.from_array(np.array(1 / 3).astype(dtype), "third")
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=kind),
        helper.make_node("MatMul", ["half", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["sum"]),
        helper.make_node("Constant", [], ["third"], value=third),
        helper.make_node("Mul", ["sum", "third"], ["share"]),
        helper.make_node("Exp", ["share"], ["power"]),
        helper.make_node("Cast", ["power"], ["y"], to=TensorProto.FLOAT),
    ]
    kinds = dict.fromkeys(("half", "product", "sum", "third", "share", "power"), kind)
    model = half_precision.simulated(saved(tmp_path / "half.onnx", nodes, kinds, weights))
    assert model is not None

    x = rng.normal(size=(4, 3)).astype(np.float32)

    def half(values: Any) -> NDArray[np.float32]:
        result: NDArray[np.float32] = np.asarray(values, dtype=np.float32).astype(dtype).astype(np.float32)
        return result

    total = half(half(half(x) @ half(weights["w"])) + half(weights["b"]))
    expected = half(np.exp(half(total * half(1 / 3))))
    actual = run(model, x)
    assert actual.shape == (4, 5) and np.array_equal(actual, half(actual))
    assert (actual == expected).mean() >= 0.9  # a sum in another order may round to the neighbour
    assert np.abs(actual / expected - 1).max() <= 4 * step
    exact = np.exp((x @ weights["w"].astype(np.float32) + weights["b"].astype(np.float32)) / 3)
    assert np.abs(actual / exact - 1).max() > step / 8  # it was rounded


def test_float32_parts_of_a_file_are_not_rounded(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "wide"], ["product"]),
        helper.make_node("Exp", ["product"], ["y"]),
    ]
    weights = {"w": np.linspace(-1, 1, 15).reshape(3, 5).astype(np.float16)}
    model = half_precision.simulated(
        saved(tmp_path / "mixed.onnx", nodes, {"wide": TensorProto.FLOAT, "product": TensorProto.FLOAT}, weights)
    )
    assert model is not None
    x = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    assert np.allclose(run(model, x), np.exp(x @ weights["w"].astype(np.float32)), rtol=1e-6)


def test_the_simulation_has_half_precision_only_between_its_two_casts(tmp_path: Path) -> None:
    weights = {"w": np.ones((3, 5), dtype=ml_dtypes.bfloat16)}
    nodes = [
        helper.make_node("Cast", ["x"], ["half"], to=TensorProto.BFLOAT16),
        helper.make_node("MatMul", ["half", "w"], ["product"]),
        helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT),
    ]
    model = half_precision.simulated(saved(tmp_path / "b.onnx", nodes, dict.fromkeys(("half", "product"), TensorProto.BFLOAT16), weights))
    assert model is not None
    graph = onnx.load_from_string(model).graph
    assert [tensor.data_type for tensor in graph.initializer] == [TensorProto.FLOAT]
    assert [node.op_type for node in graph.node] == ["Cast", "Cast", "Cast", "MatMul", "Cast", "Cast", "Cast"]
    assert [node.attribute[0].i for node in graph.node if node.op_type == "Cast"] == [1, 16, 1, 16, 1, 1]


def test_a_float32_file_needs_no_simulation(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    assert half_precision.simulated(saved(tmp_path / "float.onnx", nodes, {}, {"w": np.ones((3, 5), np.float32)})) is None
