"""A graph module's forward, or its forward and backward, as one program of plain operators.

The forward comes from torch.export, made functional, with its operators whole (convolutions, normalisations, attention). For
gradients, the part of it that depends on the layers is run once more on fake tensors under PyTorch's own autograd, which
make_fx records, and what it recorded takes that part's place. What stands before the layers stays as it was: it is
neither traced twice nor taken apart.

Some operators' derivatives have no form outside PyTorch: the indices of max-pooling, the statistics that attention's and
normalisations' kernels save. `forms.FORMS` gives these operators by others before autograd sees them, and `forms.BACKWARD` the
derivatives that autograd writes.
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

from kdx.errors import KdxError
from kdx.export import decompositions
from kdx.export.graphs import GradientGraph, WatchedNetwork

_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd

Shapes = tuple[dict[int, Any], ...]
"""For each input, its dynamic dimensions as torch.export takes them."""


def program(graph: nn.Module, inputs: tuple[Tensor, ...], dynamic: Shapes) -> ExportedProgram:
    """``graph`` traced on ``inputs``: its forward, and for a `GradientGraph` the vector-Jacobian product too.

    Raises KdxError where an operator has no ONNX form, and whatever the network's own code raises under tracing.
    """
    with torch.no_grad():
        if isinstance(graph, GradientGraph):
            forward = torch.export.export(_Forward(graph), inputs, dynamic_shapes=dynamic).run_decompositions({})
            found = _with_gradients(forward, graph)
        else:
            found = torch.export.export(graph, inputs, dynamic_shapes=dynamic)
    missing = unsupported(found)
    if missing:
        named = [f"{operator} of {layer or 'the network itself'}" for operator, layer in missing]
        more = f" and {len(named) - 3} others" if len(named) > 3 else ""
        raise KdxError(
            f"ONNX has no form of {', '.join(named[:3])}{more}.",
            "Choose layers behind it, where there are some, or run the network with --runtime eager.",
        )
    return found


def unsupported(program: ExportedProgram) -> list[tuple[str, str]]:
    """The operators that torch.onnx.export neither knows nor takes apart, each with the path of the module it comes from."""
    found: dict[tuple[str, str], None] = {}
    for node in program.graph.nodes:
        operator = node.target
        if isinstance(operator, torch._ops.OpOverload) and not _exportable(operator):
            found[str(operator), _module_path(node)] = None
    return list(found)


def _exportable(operator: torch._ops.OpOverload) -> bool:
    implemented, taken_apart = _exporter_tables()
    if not operator._schema.returns:  # a check, which the exporter leaves out
        return True
    return operator in implemented or operator in taken_apart or operator.has_kernel_for_dispatch_key(_COMPOSITE)


@functools.cache
def _exporter_tables() -> tuple[set[Any], dict[Any, Callable[..., Any]]]:
    from torch.onnx._internal.exporter import _decomp, _registration

    implemented = set(_decomp.get_onnx_implemented_overloads(_registration.ONNXRegistry.from_torchlib()))
    return implemented, _decomp.create_onnx_friendly_decomposition_table(implemented)


def _module_path(node: fx.Node) -> str:
    """The dotted path within the network of the innermost module that made a node; empty for none."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).removeprefix("network").removeprefix(".") if stack else ""


class _Forward(WatchedNetwork):
    """A gradient graph's forward alone, with as many outputs: the logits, each watched layer's tensor, and the logits again."""

    def __init__(self, graph: GradientGraph) -> None:
        super().__init__(graph.network, graph.watched, graph.preprocessing)
        self.outputs = len(graph.output_names)

    def forward(self, images: Tensor, cotangent: Tensor) -> tuple[object, ...]:
        # A copy: a layer that gives on what it was given, as dropout does, would share the node of what stands before it.
        logits, raw = self.watch(images, torch.clone)
        for layer in self.watched:
            self.as_map(raw[layer], layer, images)  # refuses what is no feature map
        held = [logits, *(raw[layer] for layer in self.watched)]
        return tuple(held + [logits] * (self.outputs - len(held)))


def _with_gradients(forward: ExportedProgram, graph: GradientGraph) -> ExportedProgram:
    """The program of a `_Forward` with its graph's outputs in place of its own."""
    before = forward.graph
    outputs = before.output_node().args[0]
    assert isinstance(outputs, tuple)
    end, *cuts = outputs[: 1 + len(graph.watched)]
    images, cotangent = (node for node in before.nodes if node.op == "placeholder" and node.name in forward.graph_signature.user_inputs)
    joint, boundary = _joint(before, graph, images, cotangent, end, dict(zip(graph.watched, cuts, strict=True)))

    # The joint part goes behind the forward's nodes; dead-code elimination then takes away the forward's own copy of it.
    signature = forward.graph_signature
    constants = dict(forward.constants)
    held = dict(zip(joint.graph.find_nodes(op="placeholder"), boundary, strict=True))
    inputs = list(signature.input_specs)
    first = next(iter(before.nodes))
    for node in joint.graph.nodes:
        if node.op == "get_attr":
            with before.inserting_before(first):
                name = f"c_joint_{len(constants)}"
                constants[name] = getattr(joint, str(node.target))
                held[node] = before.placeholder(name)
                held[node].meta["val"] = node.meta.get("val", constants[name])
            inputs.insert(0, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(held[node].name), name))
        elif node.op == "call_function":
            with before.inserting_before(before.output_node()):
                held[node] = before.node_copy(node, lambda old: held[old])
    ends = joint.graph.output_node().args[0]
    assert isinstance(ends, tuple | list)
    results = [held[node] for node in ends if isinstance(node, fx.Node)]
    before.output_node().args = (tuple(results),)
    # Attention counts as impure, for its dropout; here all that gives a value may go.
    before.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or node.meta.get("val") is None)
    before.lint()
    specs = [
        OutputSpec(spec.kind, TensorArgument(node.name), spec.target) for spec, node in zip(signature.output_specs, results, strict=True)
    ]
    return ExportedProgram(
        root=forward.graph_module,
        graph=before,
        graph_signature=torch.export.ExportGraphSignature(inputs, specs),
        state_dict=forward.state_dict,
        range_constraints=forward.range_constraints,
        module_call_graph=forward.module_call_graph,
        constants=constants,
    )


def _joint(
    before: fx.Graph, graph: GradientGraph, images: fx.Node, cotangent: fx.Node, end: fx.Node, cuts: dict[str, fx.Node]
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """The part of the forward behind the cuts with its vector-Jacobian product, and the nodes that its inputs stand for."""
    behind = _behind(before, set(cuts.values()))
    outside = dict.fromkeys([images, cotangent])
    for node in (*behind, *cuts.values(), end):
        sources = node.all_input_nodes if node in behind else [node]
        outside |= dict.fromkeys(source for source in sources if source not in behind)
    boundary = list(outside)

    def differentiate(*given: Tensor) -> tuple[Tensor, ...]:
        held: dict[fx.Node, Any] = dict(zip(boundary, given, strict=True))
        for node in cuts.values():
            if node not in behind:
                held[node] = held[node].detach().requires_grad_()
        known: set[Any] = set()
        for node in behind:
            args, kwargs = fx.map_arg((node.args, node.kwargs), held.__getitem__)
            operator: Any = decompositions.FORMS.get(node.target, node.target)
            _come_from(node)
            held[node] = operator(*args, **kwargs)
            _let_derivatives_come_from(node, held[node], known)
        raw = {layer: held[node] for layer, node in cuts.items()}
        return graph.differentiated(held[images], held[cotangent], held[end], raw)

    fakes = [node.meta["val"] for node in boundary]
    mode = next(fake.fake_mode for fake in fakes if isinstance(fake, torch._subclasses.FakeTensor))
    with mode, enable_python_dispatcher(), traceback.preserve_node_meta():
        with torch.enable_grad():
            joint = make_fx(differentiate, decomposition_table=decompositions.BACKWARD, _allow_non_fake_inputs=True)(*fakes)
        joint.graph.eliminate_dead_code()
        if any(isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable for node in joint.graph.nodes):
            # Some derivatives are written with in-place operators, and a program has none.
            joint = make_fx(torch.func.functionalize(fx.Interpreter(joint).run), _allow_non_fake_inputs=True)(*fakes)
            joint.graph.eliminate_dead_code()
    return joint, boundary


def _come_from(node: fx.Node) -> None:
    """Operators recorded from now on come from the module that made ``node``."""
    traceback.current_meta = {"nn_module_stack": node.meta.get("nn_module_stack", {})}


def _let_derivatives_come_from(node: fx.Node, result: object, known: set[Any]) -> None:
    """Autograd's functions between ``result`` and the known ones record their operators as coming from ``node``'s module."""
    results = result if isinstance(result, list | tuple) else [result]
    waiting = [tensor.grad_fn for tensor in results if isinstance(tensor, Tensor)]
    while waiting:
        function = waiting.pop()
        if function is not None and function not in known:
            known.add(function)
            function.register_prehook(lambda _gradients, node=node: _come_from(node))
            waiting += [source for source, _ in function.next_functions]


def _behind(graph: fx.Graph, cuts: set[fx.Node]) -> dict[fx.Node, None]:
    """The nodes that depend on a cut's values, as an ordered set, and all that reckon sizes: these follow from the inputs again."""
    values: set[fx.Node] = set()
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool):
            found[node] = None
        elif any(source in cuts or source in values for source in node.all_input_nodes):
            values.add(node)
            found[node] = None
    return found
