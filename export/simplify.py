"""Simplify the graph that PyTorch's exporter made: folded constants, no operators without effect, batch norms inside convolutions.

These are the passes of ``torch.onnx.export(optimize=True)`` without the rule that replaces slices by Split. That rule goes through the
whole graph at every node, which took up to half of an export, and it never applied to a graph of kdx.
"""

from __future__ import annotations

import itertools

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import rewriter
from onnxscript.optimizer import fold_constants_ir
from onnxscript.rewriter.rules import common as rules

_RULES = (
    rules.add_0_rule,
    rules.sub_0_rule,
    rules.mul_by_1_rule,
    rules.div_by_1_rule,
    rules.dropout_zero_rule,
    rules.dropout_inference_rule,
    rules.two_reshapes_matmul_reshape_rule,
    rules.one_reshape_matmul_reshape_rule,
    rules.cast_constant_of_shape_rule,
    rules.cast_constant_of_shape_without_value_rule,
    rules.collapse_slice_rule,
    rules.collapse_slice2_rule,
    rules.materialize_reshape_shape_rule,
    rules.min_min_rule,
    rules.max_max_rule,
    rules.min_max_rule,
    rules.max_min_rule,
    rules.successive_relu_rule,
    rules.successive_clip_rule,
    rules.successive_relu_clip_rule,
    rules.successive_clip_relu_rule,
    rules.cast_cast_rule,
    rules.no_op_cast_rule,
    rules.no_op_expand_rule,
    rules.flatten_to_reshape_rule,
    rules.reshape_reshape_rule,
    rules.no_op_transpose_rule,
    rules.transpose_transpose_rule,
    rules.unsqueeze_unsqueeze_rule,
    rules.squeeze_reshape_1d_rule,
    rules.no_op_dynamic_scatter_nd_rule,
    rules.no_op_static_scatter_nd_rule,
    rules.normalize_pad_format_conv_rule,
    rules.fuse_pad_into_conv_rule,
    rules.fuse_batchnorm_into_conv_rule,
    rules.fuse_batchnorm_into_conv_transpose_rule,
    rules.fuse_batchnorm_into_gemm_rule,
    rules.remove_optional_bias_from_conv_rule,
    rules.remove_optional_bias_from_conv_transpose_rule,
    rules.remove_optional_bias_from_gemm_rule,
)

_ROUNDS = 2
"""How often constants are folded and rules applied: a rule can make a constant."""

_CLEANING = ir.passes.Sequential(
    common.RemoveUnusedNodesPass(),
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    common.LiftSubgraphInitializersToMainGraphPass(),
    common.DeduplicateInitializersPass(),
    common.CommonSubexpressionEliminationPass(),
    common.OutputFixPass(),
    common.NameFixPass(),
)


def simplify(model: ir.Model) -> None:
    """Simplify ``model`` in place. Its inputs, outputs and values stay the same, up to rounding."""
    common.InlinePass()(model)
    for _ in range(_ROUNDS):
        fold_constants_ir(model)
        rewriter.rewrite(model, _RULES)
        _keep_constants(model.graph)
    _CLEANING(model)


def _keep_constants(graph: ir.Graph) -> None:
    """Add to ``graph`` the constants that the rules have displaced from it.

    A rule names a new constant after the value that its node reads. If two nodes read the same value, for example two clamps, or two
    convolutions with the same weights, the constant of the second replaces that of the first in the graph's list.
    """
    for node in graph.all_nodes():
        for value in node.inputs:
            if (
                value is None
                or value.const_value is None
                or value.producer() is not None
                or value.is_initializer()
                or value.is_graph_input()
            ):
                continue
            numbers = (f"{value.name}_{number}" for number in itertools.count(1))
            value.name = next(name for name in numbers if name not in graph.initializers)
            graph.initializers[value.name] = value
