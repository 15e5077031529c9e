"""kdx.losses: the values of kdx.fss and kdx.rs, and gradients that equal finite differences, also where images coincide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dcor
import numpy as np
import pytest
import torch
from torch import Tensor

import kdx
from kdx import losses
from tests import oracle


def small(n: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Related features x [n, 2, 2, 1] and y [n, 3], unrelated ones z [n, 2], and labels, in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, 2, 1, generator=generator, dtype=torch.float64)
    y = x.flatten(1)[:, :3] + 0.5 * torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x, y, torch.randn(n, 2, generator=generator, dtype=torch.float64), torch.arange(n) % 2


@pytest.mark.parametrize("case", oracle.CASES)
def test_values_equal_the_oracle_and_the_scores(case: str) -> None:
    known = {key: torch.from_numpy(np.asarray(value)) for key, value in oracle.load(case).items() if isinstance(value, np.ndarray)}
    x, y, target = known["x"], known["y"], known["target"]
    for value, key in (
        (losses.distance_correlation(x, y), "dcor_unbiased_xy"),
        (losses.distance_correlation(x, y, "biased"), "dcor_library_biased_xy"),
        (losses.relevance(x, target), "dcor_unbiased_xg"),
        (losses.relevance(x, target, y), "semipartial_xg_given_y"),
        (losses.relevance(x, target, y, partial=True), "dcor_library_partial_xg_given_y"),
    ):
        assert float(value) == pytest.approx(float(known[key]), rel=1e-9), key
    labels = known["labels"]
    assert float(losses.relevance(x, labels.numpy(), estimator="biased")) == pytest.approx(
        kdx.rs(x, labels, estimator="biased", permutations=0).value, rel=1e-9
    )


FUNCTIONS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Any], Tensor]] = {
    "distance correlation": lambda x, y, z, labels, estimator: losses.distance_correlation(x, y, estimator),
    "relevance": lambda x, y, z, labels, estimator: losses.relevance(x, labels, estimator=estimator),
    "relevance to an embedding": lambda x, y, z, labels, estimator: losses.relevance(x, z, estimator=estimator),
    "relevance beyond": lambda x, y, z, labels, estimator: losses.relevance(x, labels, y, estimator),
    "partial relevance": lambda x, y, z, labels, estimator: losses.relevance(x, z, y, estimator, partial=True),
}


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_equal_finite_differences(name: str, estimator: str) -> None:
    x, y, z, labels = small()
    inputs = [value.requires_grad_() for value in (x, y, z)]
    assert torch.autograd.gradcheck(lambda x, y, z: FUNCTIONS[name](x, y, z, labels, estimator), inputs)


def test_second_derivatives_equal_finite_differences() -> None:
    x, y, _, _ = small(5)
    assert torch.autograd.gradgradcheck(losses.distance_correlation, (x.requires_grad_(), y.requires_grad_()))


def test_coincident_images_have_finite_gradients_equal_to_those_of_autograd_on_the_other_pairs() -> None:
    """torch.cdist has a zero subgradient at equal rows, so autograd through dcor's formulas is an independent computation."""
    x, y, _, labels = small(8)
    x[3], x[5], y[1] = x[0], x[0], y[2]
    ours = [value.clone().requires_grad_() for value in (x, y)]
    theirs = [value.clone().requires_grad_() for value in (x, y)]
    losses.distance_correlation(ours[0], ours[1]).backward()

    def centred(rows: Tensor) -> Tensor:
        n, d = len(rows), torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
        a = d - d.sum(0) / (n - 2) - d.sum(1)[:, None] / (n - 2) + d.sum() / ((n - 1) * (n - 2))
        return a - torch.diag(a.diagonal())

    a, b = (centred(value.flatten(1)) for value in theirs)
    ((a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()).backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None and other.grad is not None and bool(mine.grad.isfinite().all())
        assert oracle.error(mine.grad, other.grad) < 1e-9
    assert bool(torch.autograd.grad(losses.relevance(ours[0], labels), ours[0])[0].isfinite().all())


def test_near_duplicates_in_float32_have_the_gradient_of_float64() -> None:
    x, y, labels = (value.clone() for value in oracle.features())
    x[1] = x[0] + 1e-3 * x[2]
    narrow, exact = x.float().requires_grad_(), x.float().double().requires_grad_()
    for each in (narrow, exact):
        losses.relevance(each, labels, y.to(each.dtype).detach()).backward()
    assert narrow.grad is not None and exact.grad is not None and narrow.grad.dtype == torch.float32
    assert oracle.error(narrow.grad, exact.grad) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gives_a_float32_loss_and_gradients_in_the_features_own_type(dtype: torch.dtype) -> None:
    x, y, _ = oracle.features()
    narrow = x.to(dtype).requires_grad_()
    loss = losses.distance_correlation(narrow, y.float())
    loss.backward()
    assert loss.dtype == torch.float32 and narrow.grad is not None and narrow.grad.dtype == dtype
    wide = narrow.detach().double().requires_grad_()
    losses.distance_correlation(wide, y).backward()
    assert wide.grad is not None and oracle.error(narrow.grad, wide.grad) < oracle.TOLERANCE[str(dtype).removeprefix("torch.")]


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_scale_changes_the_gradient_by_the_inverse_factor_alone(factor: float) -> None:
    x, y, _ = oracle.features()
    gradients = []
    for scale in (1.0, factor):
        rows = (x * scale).float().requires_grad_()
        losses.distance_correlation(rows, y).backward()
        assert rows.grad is not None
        gradients.append(rows.grad.double() * scale)
    assert oracle.error(gradients[1], gradients[0]) < 1e-4


@pytest.mark.parametrize("state", [lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")], ids=["autocast", "device"])
def test_the_ambient_state_changes_neither_value_nor_gradient(state: Callable[[], Any]) -> None:
    x, y, labels = oracle.features()
    x, y = x.float().requires_grad_(), y.float()
    plain = losses.relevance(x, labels, y)
    (expected,) = torch.autograd.grad(plain, x)
    with state():
        value = losses.relevance(x, labels, y)
        (gradient,) = torch.autograd.grad(value, x)
    assert torch.equal(value, plain) and torch.equal(gradient, expected)
    with torch.no_grad():
        assert not losses.relevance(x, labels, y).requires_grad


def test_descent_raises_the_correlation_that_dcor_measures() -> None:
    rng = np.random.default_rng(3)
    teacher = torch.from_numpy(rng.normal(size=(24, 6)))
    student = torch.from_numpy(rng.normal(size=(24, 4))).requires_grad_()
    before = dcor.u_distance_correlation_sqr(student.detach().numpy(), teacher.numpy())
    optimizer = torch.optim.Adam([student], 0.1)
    for _ in range(40):
        optimizer.zero_grad()
        (1 - losses.distance_correlation(student, teacher)).backward()
        optimizer.step()
    assert dcor.u_distance_correlation_sqr(student.detach().numpy(), teacher.numpy()) > before + 0.5


def test_errors() -> None:
    x, y, _, labels = small()
    with pytest.raises(kdx.KdxError, match="at least 4 images"):
        losses.distance_correlation(x[:3], y[:3])
    with pytest.raises(kdx.KdxError, match="5 rows of second features and 6 of first features"):
        losses.distance_correlation(x, y[:5])
    with pytest.raises(kdx.KdxError, match="first features are constant"):
        losses.distance_correlation(torch.ones(6, 3), y)
    with pytest.raises(kdx.KdxError, match="not finite in rows 2"):
        losses.distance_correlation(x.index_fill(0, torch.tensor([2]), torch.nan), y)
    with pytest.raises(kdx.KdxError, match="one class"):
        losses.relevance(x, torch.zeros(6, dtype=torch.long))
    with pytest.raises(kdx.KdxError, match="Nothing is left of the features: the given features explain them"):
        losses.relevance(x, labels, -2 * x)
    with pytest.raises(kdx.KdxError, match="Nothing is left of the target: the given features explain it"):
        losses.relevance(x, y, y, partial=True)
    with pytest.raises(TypeError, match="PyTorch tensor"):
        losses.distance_correlation(x.numpy(), y)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="estimator"):
        losses.distance_correlation(x, y, "exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="partial"):
        losses.relevance(x, labels, partial=True)
