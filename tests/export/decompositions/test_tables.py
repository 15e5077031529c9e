"""The decompositions as they are used: in half precision, and in traced derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from kdx.export import decompositions
from tests.export.decompositions.agreement import HALF, aten, normal, passed


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_results_are_half_precision_and_agree_with_float64(dtype: torch.dtype) -> None:
    x = normal(2, 4, 6, 9, dtype=dtype)
    for operator, args in (
        (aten.max_pool2d.default, ((3, 3), (2, 2), (1, 1))),
        (aten.avg_pool2d.default, ((3, 3), (2, 2), (1, 1), True, False)),
        (aten.adaptive_avg_pool2d.default, ((4, 5),)),
        (aten.adaptive_max_pool2d.default, ((3, 3),)),
        (aten.upsample_bilinear2d.vec, ((9, 13), False, None)),
        (aten.upsample_nearest2d.vec, ((9, 13), None)),
    ):
        for ours, exact in zip(passed(decompositions.FORWARD[operator], (x, *args)), passed(operator, (x.double(), *args)), strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), exact, rtol=0, atol=HALF[dtype] * float(exact.detach().abs().max()))


ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    torch.nn.functional.elu,
    lambda x: torch.nn.functional.elu(x, 0.7),
    torch.nn.functional.celu,
    torch.nn.functional.selu,
    torch.nn.functional.gelu,
    lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    lambda x: torch.nn.functional.glu(x, 1),
    torch.nn.functional.hardsigmoid,
    torch.nn.functional.hardswish,
    torch.nn.functional.hardtanh,
    torch.nn.functional.relu6,
    lambda x: torch.nn.functional.leaky_relu(x, 0.2),
    torch.nn.functional.mish,
    torch.sigmoid,
    torch.nn.functional.silu,
    lambda x: torch.nn.functional.softplus(x, 2.0, 1.5),
    torch.tanh,
    torch.relu,
    lambda x: torch.nn.functional.threshold(x, 0.3, -1.0),
    lambda x: x.softmax(1),
    lambda x: x.log_softmax(-1),
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_traced_derivatives_of_activations(activation: Callable[[Tensor], Tensor]) -> None:
    """The graph that make_fx records with the table agrees on other numbers than the traced ones, and has no derivative operator left."""

    def both(x: Tensor, cotangent: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(activation(leaf), leaf, cotangent)
        return gradient

    x = torch.cat([normal(2, 4, 5) * 3, torch.zeros(2, 4, 1), torch.full((2, 4, 1), 3.0), torch.full((2, 4, 1), -3.0)], -1).double()
    shape = activation(x).shape
    traced = make_fx(both, decomposition_table=decompositions.BACKWARD)(normal(*x.shape, seed=1), normal(*shape, seed=2))
    cotangent = normal(*shape, seed=3)
    torch.testing.assert_close(traced(x, cotangent), both(x, cotangent), rtol=1e-7, atol=1e-12)  # eager hardsigmoid has a float32 1/6
    names = [str(node.target) for node in traced.graph.nodes if node.op == "call_function"]
    assert not any(name.startswith("aten") and "backward" in name for name in names), names
