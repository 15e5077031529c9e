"""Trace a graph module's forward pass, or its forward and backward pass, into one program of plain operators.

torch.export traces the forward pass into a functional program in which convolutions, normalisations and attention are still
single operators. For gradients, the part of the program that depends on the layers then runs once more, on fake tensors under
PyTorch's autograd, while make_fx records forward and backward pass together. The recorded operators replace that part. The
operators before the layers stay as they are: they are neither traced twice nor decomposed.

Some operators have derivatives that exist only in PyTorch, such as max-pooling by saved indices, or attention and normalisation
by statistics that their kernels save. `decompositions.FORWARD` replaces these operators before autograd sees them, and
`decompositions.BACKWARD` replaces the derivatives that autograd records.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, OutputSpec, TensorArgument
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx

from kdx.disk import log
from kdx.errors import KdxError
from kdx.export import decompositions
from kdx.export.graphs import GradientGraph, WatchedNetwork
from kdx.export.nodes import argument_values, module_path

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default

_MANY = 2_000
"""The number of operators from which an export announces that it takes minutes."""

DynamicDimensions = tuple[dict[int, Any], ...]
"""The dynamic dimensions of each input, as torch.export takes them."""


def traced_program(graph: nn.Module, inputs: tuple[Tensor, ...], dynamic: DynamicDimensions) -> ExportedProgram:
    """The program of ``graph``, traced on ``inputs``: its forward pass and, for a `GradientGraph`, the vector-Jacobian product.

    Raises KdxError if an operator has no ONNX form, and any exception that the network's own code raises under tracing.
    """
    for network in graph.modules():
        if isinstance(network, WatchedNetwork):
            network.decide_for((inputs[0].shape[2], inputs[0].shape[3]))
    with torch.no_grad():
        if isinstance(graph, GradientGraph):
            forward = torch.export.export(_Forward(graph), inputs, dynamic_shapes=dynamic).run_decompositions({})
            program = _with_gradients(forward, graph)
        else:
            program = torch.export.export(graph, inputs, dynamic_shapes=dynamic)
            # An assignment to a part of a tensor has no ONNX form. The exporter translates relu_ and others itself.
            if any(_is_in_place(node.target) and not _exportable(node.target) for node in program.graph.nodes):
                program = program.run_decompositions({})
        program = _with_translatable_attention(program)
    if len(program.graph.nodes) > _MANY:
        log.warning("converting %d operators to ONNX takes up to a minute per 1,000", len(program.graph.nodes))
    unsupported = unsupported_operators(program)
    if unsupported:
        names = [f"{operator} of {layer or 'the network itself'}" for operator, layer in unsupported]
        more = f" and {len(names) - 3} others" if len(names) > 3 else ""
        raise KdxError(
            f"ONNX has no form of {', '.join(names[:3])}{more}.",
            "Choose layers after these operators, or run the network with --runtime eager.",
        )
    return program


def _is_in_place(operator: Any) -> bool:
    """Whether an operator changes a tensor that it receives."""
    return isinstance(operator, torch._ops.OpOverload) and operator._schema.is_mutable


def _with_translatable_attention(program: ExportedProgram) -> ExportedProgram:
    """The program with its attention as plain operators, if any attention is in a form that torch.onnx.export does not translate."""
    if not any(_needs_plain_attention(node) for node in program.graph.find_nodes(op="call_function", target=_ATTENTION)):
        return program
    plain: ExportedProgram = program.run_decompositions({_ATTENTION: _plain_attention})
    return plain


def _plain_attention(*args: Any, **kwargs: Any) -> Tensor:
    """Attention as plain operators. A result of four dimensions has the strides of PyTorch's kernel, on which later views rely."""
    out: Tensor = decompositions.FORWARD[_ATTENTION](*args, **kwargs)
    return out.transpose(1, 2).contiguous().transpose(1, 2) if out.ndim == 4 else out


def _needs_plain_attention(node: fx.Node) -> bool:
    """Whether the queries, keys or values of an attention have another number of dimensions than four."""
    arguments = argument_values(node)
    return any(arguments[name].meta["val"].ndim != 4 for name in ("query", "key", "value"))


def unsupported_operators(program: ExportedProgram) -> list[tuple[str, str]]:
    """The operators that torch.onnx.export neither knows nor decomposes, each with the path of the module that it comes from."""
    operators: dict[tuple[str, str], None] = {}
    for node in program.graph.nodes:
        operator = node.target
        if isinstance(operator, torch._ops.OpOverload) and not _exportable(operator):
            operators[str(operator), module_path(node)] = None
    return list(operators)


def _exportable(operator: torch._ops.OpOverload) -> bool:
    implemented, decomposed = _exporter_tables()
    if not operator._schema.returns:  # an assertion, which the exporter omits
        return True
    return operator in implemented or operator in decomposed or operator.has_kernel_for_dispatch_key(_COMPOSITE)


@functools.cache
def _exporter_tables() -> tuple[set[Any], dict[Any, Callable[..., Any]]]:
    """The operators that torch.onnx.export implements, and those that it decomposes."""
    from torch.onnx._internal.exporter import _decomp, _registration

    implemented = set(_decomp.get_onnx_implemented_overloads(_registration.ONNXRegistry.from_torchlib()))
    return implemented, _decomp.create_onnx_friendly_decomposition_table(implemented)


class _Forward(WatchedNetwork):
    """The forward pass of a `GradientGraph`. It returns the logits and the tensor of each watched layer.

    The logits are repeated until there are as many outputs as the gradient graph has.
    """

    def __init__(self, graph: GradientGraph) -> None:
        super().__init__(graph.network, graph.watched, graph.preprocessing)
        self.decisions = graph.decisions  # those of a copied network, which has none of its own
        self.output_count = len(graph.output_names)

    def forward(self, images: Tensor, cotangent: Tensor) -> tuple[object, ...]:
        # A copy: a layer that returns its input, as dropout does, would share the node of the layer before it.
        logits, raw = self.watch(images, torch.clone)
        for layer in self.watched:
            self.as_map(raw[layer], layer, images)  # raises KdxError for an output that is not a feature map
        outputs = [logits, *(raw[layer] for layer in self.watched)]
        return tuple(outputs + [logits] * (self.output_count - len(outputs)))


def _with_gradients(forward: ExportedProgram, graph: GradientGraph) -> ExportedProgram:
    """The program of a `_Forward` with the outputs of its `GradientGraph` in place of its own."""
    fx_graph = forward.graph
    outputs = fx_graph.output_node().args[0]
    assert isinstance(outputs, tuple)
    end, *cuts = outputs[: 1 + len(graph.watched)]
    user_inputs = forward.graph_signature.user_inputs
    images, cotangent = (node for node in fx_graph.nodes if node.op == "placeholder" and node.name in user_inputs)
    joint, boundary = _joint(fx_graph, graph, images, cotangent, end, dict(zip(graph.watched, cuts, strict=True)))

    results, inputs, constants = _inserted(joint, boundary, forward)
    fx_graph.output_node().args = (tuple(results),)
    # Dead-code elimination removes the forward pass's own copy of the joint part. Attention counts as impure, because of its
    # dropout; here every unused node with a value may go.
    fx_graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node.meta.get("val") is None)
    fx_graph.lint()
    specs = [
        OutputSpec(spec.kind, TensorArgument(node.name), spec.target)
        for spec, node in zip(forward.graph_signature.output_specs, results, strict=True)
    ]
    return ExportedProgram(
        root=forward.graph_module,
        graph=fx_graph,
        graph_signature=torch.export.ExportGraphSignature(inputs, specs),
        state_dict=forward.state_dict,
        range_constraints=forward.range_constraints,
        module_call_graph=forward.module_call_graph,
        constants=constants,
    )


def _inserted(
    joint: fx.GraphModule, boundary: list[fx.Node], forward: ExportedProgram
) -> tuple[list[fx.Node], list[InputSpec], dict[str, Any]]:
    """Copy the joint part behind the forward pass's nodes; return its outputs, and the program's inputs and constants with its own."""
    fx_graph = forward.graph
    constants = dict(forward.constants)
    copies = dict(zip(joint.graph.find_nodes(op="placeholder"), boundary, strict=True))
    inputs = list(forward.graph_signature.input_specs)
    first, new = next(iter(fx_graph.nodes)), 0
    for node in joint.graph.nodes:
        if node.op == "get_attr":
            with fx_graph.inserting_before(first):
                name = f"c_joint_{len(constants)}"
                constants[name] = getattr(joint, str(node.target))
                copies[node] = fx_graph.placeholder(name)
                copies[node].meta["val"] = node.meta.get("val", constants[name])
            inputs.insert(new, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(copies[node].name), name))
            new += 1  # specifications are in the order of the nodes, which are all inserted before the first old one
        elif node.op == "call_function":
            with fx_graph.inserting_before(fx_graph.output_node()):
                copies[node] = fx_graph.node_copy(node, lambda source: copies[source])
    ends = joint.graph.output_node().args[0]
    assert isinstance(ends, tuple | list)
    return [copies[node] for node in ends if isinstance(node, fx.Node)], inputs, constants


def _joint(
    fx_graph: fx.Graph, graph: GradientGraph, images: fx.Node, cotangent: fx.Node, end: fx.Node, cuts: dict[str, fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The part of the forward pass behind the cuts with its vector-Jacobian product, and the node of each of its inputs."""
    behind = _behind(fx_graph, set(cuts.values()))
    outside = dict.fromkeys([images, cotangent])
    for node in (*behind, *cuts.values(), end):
        sources = node.all_input_nodes if node in behind else [node]
        outside |= dict.fromkeys(source for source in sources if source not in behind)
    boundary = list(outside)

    def differentiate(*tensors: Tensor) -> tuple[Tensor, ...]:
        values: dict[fx.Node, Any] = dict(zip(boundary, tensors, strict=True))
        for node in cuts.values():
            if node not in behind:
                values[node] = values[node].detach().requires_grad_()
        seen: set[Any] = set()
        for node in behind:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            operator: Any = decompositions.FORWARD.get(node.target, node.target)
            _set_module(node)
            values[node] = operator(*args, **kwargs)
            _set_module_of_derivatives(node, values[node], seen)
        raw = {layer: values[node] for layer, node in cuts.items()}
        return graph.with_gradients(values[images], values[cotangent], values[end], raw)

    fakes = [node.meta["val"] for node in boundary]
    mode = next(fake.fake_mode for fake in fakes if isinstance(fake, torch._subclasses.FakeTensor))
    with mode, enable_python_dispatcher(), traceback.preserve_node_meta():
        with torch.enable_grad():
            joint = make_fx(differentiate, decomposition_table=decompositions.BACKWARD, _allow_non_fake_inputs=True)(*fakes)
        joint.graph.eliminate_dead_code()
        if any(_is_in_place(node.target) for node in joint.graph.nodes):
            # Some derivatives use in-place fx_graph, which a program must not contain.
            joint = make_fx(torch.func.functionalize(fx.Interpreter(joint).run), _allow_non_fake_inputs=True)(*fakes)
            joint.graph.eliminate_dead_code()
    return joint, boundary


def _set_module(node: fx.Node) -> None:
    """Record operators from now on as coming from the module of ``node``."""
    traceback.current_meta = {"nn_module_stack": node.meta.get("nn_module_stack", {})}


def _set_module_of_derivatives(node: fx.Node, result: object, seen: set[Any]) -> None:
    """Record the derivatives between ``result`` and the autograd functions already seen as coming from the module of ``node``."""
    results = result if isinstance(result, list | tuple) else [result]
    pending = [tensor.grad_fn for tensor in results if isinstance(tensor, Tensor)]
    while pending:
        function = pending.pop()
        if function is not None and function not in seen:
            seen.add(function)
            function.register_prehook(lambda _gradients, node=node: _set_module(node))
            pending += [source for source, _ in function.next_functions]


def _behind(fx_graph: fx.Graph, cuts: set[fx.Node]) -> dict[fx.Node, None]:
    """The nodes whose values depend on a cut, and all nodes that compute sizes, as an ordered set.

    Sizes are computed again from the inputs.
    """
    dependent: set[fx.Node] = set()
    behind: dict[fx.Node, None] = {}
    for node in fx_graph.nodes:
        if node.op != "call_function":
            continue
        if isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool):
            behind[node] = None
        elif any(source in cuts or source in dependent for source in node.all_input_nodes):
            dependent.add(node)
            behind[node] = None
    return behind
