"""Each form against PyTorch's operator, and its derivative against PyTorch's autograd."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from kdx.export import decompositions

aten = torch.ops.aten

ADDED = 1e-14
"""Values are the same; gradients are sums of the same numbers in another order."""

HALF = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""A few roundings of the largest value: 11 and 8 bits of significand."""


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers that lie in memory with gaps, as a channels-last or sliced feature does."""
    wide = torch.randn(*shape[:-1], 2 * shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return wide[..., ::2].to(dtype)


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Whole numbers from -2 to 2: windows have ties, and windows with nothing above zero."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).double()


def passed(function: Callable[..., Any], args: Sequence[Any], **kwargs: Any) -> tuple[Tensor, ...]:
    """The result, and a vector-Jacobian product to each floating-point tensor among the arguments."""
    leaves = [given.detach().requires_grad_() if isinstance(given, Tensor) and given.is_floating_point() else given for given in args]
    out = function(*leaves, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    cotangent = normal(*out.shape, 1, seed=7, dtype=out.dtype)[..., 0]
    return out, *torch.autograd.grad(out, [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad], cotangent)


def agree(operator: Any, *args: Any, tolerance: float = 1e-12, **kwargs: Any) -> None:
    for ours, theirs in zip(passed(decompositions.FORMS[operator], args, **kwargs), passed(operator, args, **kwargs), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        scale = float(theirs.detach().abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(scale, 1e-30))


def product(seed: int, count: int, **choices: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """``count`` of all combinations, drawn without a second one of any."""
    every = list(itertools.product(*choices.values()))
    for i in torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:count].tolist():
        yield dict(zip(choices, every[i], strict=True))


# ---- pooling ----

SIZES = [(7, 9), (8, 5), (11, 12), (6, 6)]
KERNELS = [(1, 1), (2, 2), (3, 3), (2, 3), (5, 4), (1, 3)]
STRIDES = [(), (1, 1), (2, 2), (2, 1), (3, 4), (1, 5)]


def fits(size: Sequence[int], kernel: Sequence[int], padding: Sequence[int], dilation: Sequence[int] = (1, 1)) -> bool:
    """Whether PyTorch takes the padding (at most half the kernel) and there is room for a window."""
    return all(2 * p <= k and d * (k - 1) < n + 2 * p for n, k, p, d in zip(size, kernel, padding, dilation, strict=True))


def test_max_pooling() -> None:
    """The first largest entry of a window takes its gradient; padding never does."""
    tried = 0
    choices: dict[str, Sequence[Any]] = {"size": SIZES, "kernel": KERNELS, "stride": STRIDES, "padding": [(0, 0), (1, 1), (0, 1), (2, 2)]}
    for case in product(0, 400, **choices, dilation=[(1, 1), (2, 1), (2, 3)], ceil_mode=[False, True]):
        size, kernel, padding = case.pop("size"), case["kernel"], case["padding"]
        if fits(size, kernel, padding, case["dilation"]):
            for x in (whole(2, 3, *size), normal(1, 2, *size) - 3):
                agree(aten.max_pool2d.default, x, *case.values(), tolerance=ADDED)
            tried += 1
    assert tried > 100


def test_average_pooling() -> None:
    """Also windows that ceil_mode lets hang over the padding, which count less than the kernel."""
    tried = 0
    choices: dict[str, Sequence[Any]] = {"size": SIZES, "kernel": KERNELS, "stride": STRIDES, "padding": [(0, 0), (1, 1), (0, 1), (2, 2)]}
    for case in product(1, 400, **choices, ceil_mode=[False, True], include=[True, False], divisor=[None, 5, -2]):
        size = case.pop("size")
        if fits(size, case["kernel"], case["padding"]):
            agree(aten.avg_pool2d.default, normal(2, 3, *size), *case.values())
            tried += 1
    assert tried > 100


def test_pooling_along_one_axis() -> None:
    for stride, padding, ceil_mode in itertools.product([(), (1,), (3,)], [(0,), (1,)], [False, True]):
        agree(aten.max_pool1d.default, whole(2, 3, 11), (3,), stride, padding, (2,), ceil_mode, tolerance=ADDED)
        agree(aten.avg_pool1d.default, normal(2, 3, 11), (4,), stride, padding, ceil_mode, False)
        agree(aten.avg_pool1d.default, normal(2, 3, 11), (4,), stride, padding, ceil_mode)


def test_pooling_takes_single_numbers_and_defaults() -> None:
    agree(aten.max_pool2d.default, whole(2, 3, 8, 9), [3], tolerance=ADDED)
    agree(aten.max_pool2d.default, whole(2, 3, 8, 9), [3], [2], [1], [1], True, tolerance=ADDED)
    agree(aten.avg_pool2d.default, normal(2, 3, 8, 9), [3])
    agree(aten.avg_pool2d.default, normal(2, 3, 8, 9), [3], [2], [1])


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (3, 3), (2, 5), (5, 4), (1, 9), (14, 10)])
def test_adaptive_average_pooling(size: tuple[int, int]) -> None:
    """Sizes that divide, that do not, and that are larger than the image."""
    agree(aten.adaptive_avg_pool2d.default, normal(2, 3, 7, 9), size)
    agree(aten.adaptive_avg_pool1d.default, normal(2, 3, 9), size[1:])


@pytest.mark.parametrize("size", [(1, 1), (6, 9), (3, 3), (2, 1), (4, 5)])
def test_adaptive_max_pooling(size: tuple[int, int]) -> None:
    agree(aten.adaptive_max_pool2d.default, whole(2, 3, 6, 9), size, tolerance=ADDED)
    agree(aten.adaptive_max_pool2d.default, normal(2, 3, 6, 9) - 3, size, tolerance=ADDED)


# ---- resizing ----

TARGETS = [(5, 7), (10, 14), (15, 21), (8, 5), (3, 20), (1, 1), (1, 7), (10, 7)]
FACTORS = [(2.0, 2.0), (1.5, 0.7), (3.3, 3.3), (0.4, 2.6), (1.05, 1.1), (1.99, 2.01), (3.0, 4.0)]


@pytest.mark.parametrize(("size", "factors"), [*((size, None) for size in TARGETS), *((None, factors) for factors in FACTORS)])
def test_resizing(size: tuple[int, int] | None, factors: tuple[float, float] | None) -> None:
    """By a factor that is no ratio of whole sizes, PyTorch steps by the factor given, not by the sizes' ratio."""
    agree(aten.upsample_nearest2d.vec, normal(2, 3, 5, 7), size, factors)
    agree(aten.upsample_bilinear2d.vec, normal(2, 3, 5, 7), size, False, factors)
    agree(aten.upsample_bilinear2d.vec, normal(2, 3, 5, 7), size, True, factors)


def test_nearest_by_a_factor_steps_by_the_factor_also_where_the_sizes_divide() -> None:
    agree(aten.upsample_nearest2d.vec, normal(2, 3, 3, 3), None, (3.3, 3.3))
    assert decompositions.FORMS[aten.upsample_nearest2d.vec](normal(1, 1, 3, 3), None, (3.3, 3.3)).shape == (1, 1, 9, 9)


def test_the_networks_own_resizing_is_what_the_forms_stand_for() -> None:
    """torch.nn.functional passes a given factor on unless told to reckon it again from the sizes."""
    x = normal(2, 3, 5, 7)
    for again, factors in ((None, (1.5, 1.3)), (True, None)):
        size = None if factors else (7, 9)
        theirs = torch.nn.functional.interpolate(x, scale_factor=(1.5, 1.3), mode="bilinear", recompute_scale_factor=again)
        torch.testing.assert_close(decompositions.FORMS[aten.upsample_bilinear2d.vec](x, size, False, factors), theirs)


# ---- normalisation ----


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5), (2, 4, 5, 7)])
def test_normalisations(affine: bool, shape: tuple[int, ...]) -> None:
    x = normal(*shape) * 3 + 2
    channel = (normal(4, seed=1), normal(4, seed=2)) if affine else (None, None)
    mean, var = normal(4, seed=3).detach(), normal(4, seed=4).square()
    ours, theirs = (
        [passed(lambda x, run=run: run(x, *channel, mean, var, 0.1, 1e-3), [x])][0]
        for run in (
            decompositions.FORMS[aten._native_batch_norm_legit_no_training.default],
            aten._native_batch_norm_legit_no_training.default,
        )
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    agree(aten.group_norm.default, x, 2, *channel, 1e-3)
    for dims in range(1, len(shape)):
        last = shape[-dims:]
        weights = (normal(*last, seed=1), normal(*last, seed=2)) if affine else (None, None)
        agree(aten.layer_norm.default, x, last, *weights, 1e-3, tolerance=1e-11)
        agree(aten.rms_norm.default, x, last, weights[0], 1e-3, tolerance=1e-11)
        agree(aten.rms_norm.default, x, last, weights[0], tolerance=1e-11)


@pytest.mark.parametrize("dtype", HALF)
def test_statistics_of_half_precision_are_taken_in_single(dtype: torch.dtype) -> None:
    """Squares of these numbers lie beyond float16's largest, and their sums beyond bfloat16's eight bits."""
    x = normal(3, 4, 6, 50, dtype=dtype) * 300
    weight, bias = (normal(50, seed=seed, dtype=dtype) for seed in (1, 2))
    channel = [normal(4, seed=seed, dtype=dtype) for seed in (3, 4)]
    for operator, args in (
        (aten.layer_norm.default, (x, (50,), weight, bias)),
        (aten.rms_norm.default, (x, (50,), weight)),
        (aten.group_norm.default, (x, 2, *channel)),
    ):
        ours = decompositions.FORMS[operator](*args)
        exact = operator(*(given.double() if isinstance(given, Tensor) else given for given in args))
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=HALF[dtype] * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_stays_half_precision_and_agrees_with_double(dtype: torch.dtype) -> None:
    x = normal(2, 4, 6, 9, dtype=dtype)
    for operator, args in (
        (aten.max_pool2d.default, ((3, 3), (2, 2), (1, 1))),
        (aten.avg_pool2d.default, ((3, 3), (2, 2), (1, 1), True, False)),
        (aten.adaptive_avg_pool2d.default, ((4, 5),)),
        (aten.adaptive_max_pool2d.default, ((3, 3),)),
        (aten.upsample_bilinear2d.vec, ((9, 13), False, None)),
        (aten.upsample_nearest2d.vec, ((9, 13), None)),
    ):
        for ours, exact in zip(passed(decompositions.FORMS[operator], (x, *args)), passed(operator, (x.double(), *args)), strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), exact, rtol=0, atol=HALF[dtype] * float(exact.detach().abs().max()))


# ---- attention ----


def attend(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> None:
    agree(aten.scaled_dot_product_attention.default, q, k, v, **kwargs)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention(scale: float | None) -> None:
    q, k, v = normal(2, 4, 5, 3), normal(2, 4, 7, 3, seed=1), normal(2, 4, 7, 6, seed=2)
    seen = normal(2, 1, 5, 7, seed=3) > 0
    attend(q, k, v, scale=scale)
    attend(q, k, v, scale=scale, is_causal=True)
    attend(q, k, v, attn_mask=normal(5, 7, seed=4), scale=scale)
    attend(q, k, v, attn_mask=seen, scale=scale)
    attend(q, normal(2, 2, 7, 3, seed=5), normal(2, 2, 7, 6, seed=6), scale=scale, enable_gqa=True)


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    seen = torch.ones(5, 7, dtype=torch.bool)
    seen[2] = False
    q, k, v = normal(2, 4, 5, 3), normal(2, 4, 7, 3, seed=1), normal(2, 4, 7, 6, seed=2)
    attend(q, k, v, attn_mask=seen)
    assert not decompositions.FORMS[aten.scaled_dot_product_attention.default](q, k, v, seen)[:, :, 2].any()


@pytest.mark.parametrize("dtype", HALF)
def test_attention_in_half_precision(dtype: torch.dtype) -> None:
    q, k, v = (normal(2, 3, 9, 16, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    ours = decompositions.FORMS[aten.scaled_dot_product_attention.default](q * 8, k * 8, v)
    exact = aten.scaled_dot_product_attention.default((q * 8).double(), (k * 8).double(), v.double())
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=HALF[dtype] * float(exact.abs().max()))


# ---- padding, copies, windows ----


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(1, 2, 0, 1), (3, 0, 2, 4), (0, 0, 0, 0), (2, 1)])
def test_padding(mode: str, padding: tuple[int, ...]) -> None:
    x = normal(2, 3, 5, 6) if len(padding) == 4 else normal(2, 3, 6)
    agree(aten.pad.default, x, padding, mode)


def test_padding_that_crops_is_left_to_pytorch() -> None:
    agree(aten.pad.default, normal(2, 3, 5, 6), (-1, 2, 1, -2))
    agree(aten.pad.default, normal(2, 3, 5, 6), (-1, 2, 1, -2), "replicate")


def test_copies_and_views() -> None:
    source = normal(3, 1, 5, seed=1)
    (gradient,) = passed(lambda x: decompositions.FORMS[aten.copy.default](torch.zeros(2, 3, 4, 5, dtype=torch.float64), x), [source])[1:]
    assert torch.equal(decompositions.FORMS[aten.copy.default](torch.zeros(2, 3, 4, 5), source), source.float().expand(2, 3, 4, 5))
    torch.testing.assert_close(gradient, normal(2, 3, 4, 5, 1, seed=7)[..., 0].sum((0, 2))[:, None])
    agree(aten.view.default, normal(2, 3, 4).contiguous(), (6, -1))
    assert torch.equal(
        decompositions.FORMS[aten.view.default](normal(2, 3, 4).transpose(1, 2), (6, 4)), normal(2, 3, 4).transpose(1, 2).reshape(6, 4)
    )


@pytest.mark.parametrize(("size", "step"), [(3, 1), (3, 2), (2, 5), (9, 1), (4, 4)])
def test_windows_along_one_dimension(size: int, step: int) -> None:
    agree(aten.unfold.default, normal(2, 9, 4), 1, size, step)
    agree(aten.unfold.default, normal(2, 4, 9), -1, size, step)


# ---- derivatives ----


def test_the_input_gradient_of_convolutions() -> None:
    """Also strides that leave the image's end uncovered, padding wider than the kernel, groups, even kernels."""
    tried = 0
    choices: dict[str, Sequence[Any]] = {
        "size": SIZES,
        "kernel": [*KERNELS, (7, 2)],
        "stride": STRIDES[1:],
        "padding": [(0, 0), (1, 1), (0, 2), (4, 3)],
    }
    for case in product(2, 150, **choices, dilation=[(1, 1), (2, 1), (2, 3)], groups=[1, 2, 4]):
        (h, w), (kh, kw), groups, dilation, padding = (case[key] for key in ("size", "kernel", "groups", "dilation", "padding"))
        if dilation[0] * (kh - 1) < h + 2 * padding[0] and dilation[1] * (kw - 1) < w + 2 * padding[1]:
            weight = normal(8, 4 // groups, kh, kw, seed=1)
            convolution_gradients(normal(2, 4, h, w), weight, case["stride"], padding, dilation, False, [0, 0], groups)
            tried += 1
    assert tried > 50


def test_the_input_gradient_of_transposed_convolutions() -> None:
    """Output padding may reach the stride where the dilation is larger."""
    tried = 0
    choices: dict[str, Sequence[Any]] = {
        "kernel": [(1, 1), (3, 3), (4, 2)],
        "stride": STRIDES[1:],
        "padding": [(0, 0), (1, 0)],
        "extra": [(0, 0), (1, 0), (1, 2)],
    }
    for case in product(3, 100, **choices, dilation=[(1, 1), (2, 3)], groups=[1, 2]):
        kernel, stride, padding, extra, dilation, groups = case.values()
        if all(e < max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
            weight = normal(4, 6 // groups, *kernel, seed=1)
            convolution_gradients(normal(2, 4, 5, 6), weight, stride, padding, dilation, True, extra, groups)
            tried += 1
    assert tried > 30


@pytest.mark.parametrize("shape", [(2, 4, 11), (2, 4, 7, 5, 6)])
def test_the_input_gradient_of_convolutions_along_one_and_three_axes(shape: tuple[int, ...]) -> None:
    axes = len(shape) - 2
    for stride, groups in itertools.product([1, 2, 3], [1, 2]):
        weight = normal(6, 4 // groups, *[3, 2, 3][:axes], seed=1)
        convolution_gradients(normal(*shape), weight, [stride] * axes, [1] * axes, [1] * axes, False, [0] * axes, groups)


def convolution_gradients(x: Tensor, weight: Tensor, *geometry: Any) -> None:
    gradient = normal(*aten.convolution.default(x, weight, None, *geometry).shape, seed=5)
    args = gradient, x, weight, None, *geometry, [True, False, False]
    ours, none, nothing = decompositions.BACKWARD[aten.convolution_backward.default](*args)
    assert none is nothing is None
    torch.testing.assert_close(ours, aten.convolution_backward.default(*args)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("output_mask", [(True, True, False), (False, False, True)])
def test_a_convolution_whose_weights_depend_on_the_image_is_left_as_it_is(output_mask: tuple[bool, ...]) -> None:
    x, weight = normal(1, 2, 5, 5), normal(3, 2, 3, 3)
    args = (normal(1, 3, 3, 3), x, weight, [3], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, output_mask)
    assert decompositions.BACKWARD[aten.convolution_backward.default](*args) is NotImplemented


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize(
    ("start", "end", "step"),
    [(0, 9, 1), (2, 7, 1), (-5, -1, 1), (3, 2**63 - 1, 1), (0, 9, 2), (1, 9, 3), (-7, 100, 4), (4, 4, 1), (8, 9, 5), (-100, 3, 2)],
)
def test_the_gradient_of_slices(dim: int, start: int, end: int, step: int) -> None:
    x = normal(9, 9, 9)
    gradient = normal(*aten.slice.Tensor(x, dim, start, end, step).shape, seed=1)
    args = gradient, list(x.shape), dim, start, end, step
    assert torch.equal(decompositions.BACKWARD[aten.slice_backward.default](*args), aten.slice_backward.default(*args))


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("index", [0, 1, 2, -1, -3])
def test_the_gradient_of_selections(dim: int, index: int) -> None:
    x = normal(3, 4, 5)
    gradient = normal(*x.select(dim, index).shape, seed=1)
    args = gradient, list(x.shape), dim, index
    assert torch.equal(decompositions.BACKWARD[aten.select_backward.default](*args), aten.select_backward.default(*args))


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
def test_derivatives_of_activations_as_traced(activation: Callable[[Tensor], Tensor]) -> None:
    """What make_fx records with our table, run on numbers other than those traced; the derivative itself is in no graph."""

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
