"""Recurrent layers in a program whose gradients are exported: their steps are unrolled, and each becomes about 60 operators."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from kdx.disk import log
from kdx.errors import KdxError

MOST_STEPS = 128
"""The most steps that an export unrolls, added over layers and directions. They take about five minutes on two slow cores."""

_SLOW_STEPS = 16

_RECURRENT: dict[Any, str] = {
    torch.ops.aten.lstm.input: "LSTM",
    torch.ops.aten.gru.input: "GRU",
    torch.ops.aten.rnn_tanh.input: "RNN",
    torch.ops.aten.rnn_relu.input: "RNN",
}


def check_steps(nodes: Iterable[fx.Node]) -> None:
    """Raise KdxError if the recurrent layers among these nodes have too many steps to unroll; announce a slow export."""
    steps = {node: _steps(node) for node in nodes if node.target in _RECURRENT}
    total = sum(steps.values())
    if total > MOST_STEPS:
        first = next(iter(steps))
        raise KdxError(
            f"Gradients through {_RECURRENT[first.target]} {module_path(first)!r} cannot be exported: recurrent layers run {total} steps,"
            f" and an export unrolls at most {MOST_STEPS}.",
            "Run the network with --runtime eager, or name layers after its recurrent layers.",
        )
    if total > _SLOW_STEPS:
        log.info("unrolling %d steps of recurrent layers; the export takes up to three seconds per step", total)


def _steps(node: fx.Node) -> int:
    """The steps of a recurrent operator, added over its layers and directions."""
    arguments: dict[str, Any] = dict(zip((argument.name for argument in node.target._schema.arguments), node.args, strict=False))  # type: ignore[union-attr]
    length = arguments["input"].meta["val"].shape[1 if arguments["batch_first"] else 0]
    return int(length) * int(arguments["num_layers"]) * (2 if arguments["bidirectional"] else 1)


def module_path(node: fx.Node) -> str:
    """The dotted path within the network of the innermost module that a node comes from; empty if it comes from none."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).removeprefix("network").removeprefix(".") if stack else ""
