"""What a node of a traced program was called with, and the module that it comes from."""

from __future__ import annotations

from typing import Any

from torch import fx


def argument_values(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, without those that have their default value."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def module_path(node: fx.Node) -> str:
    """The dotted path within the network of the innermost module that a node comes from; empty if it comes from none."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).removeprefix("network").removeprefix(".") if stack else ""
