"""kdx.unicam against the published numbers and the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import kdx
from kdx.kernels import reference
from tests import oracle


@pytest.mark.parametrize("case", oracle.CASES)
@pytest.mark.parametrize(("name", "objective"), [("relevance", "relevance"), ("unique", "uniqueness")])
def test_published_numbers(case: str, name: str, objective: str) -> None:
    known = oracle.load(case)
    result = kdx.unicam(known["x"], known["y"], known["target"], objective=objective)  # type: ignore[arg-type]
    assert isinstance(result.maps, np.ndarray) and isinstance(result.weights, np.ndarray)
    assert oracle.error(result.weights, known[f"{name}/weights"]) < oracle.TOLERANCE["float64"]
    assert oracle.error(result.maps, known[f"{name}/cam"]) < oracle.TOLERANCE["float64"]
    assert result.score == pytest.approx(float(known[f"{name}/score"]), rel=1e-9)


@pytest.mark.parametrize("weighting", ["gap", "elementwise"])
@pytest.mark.parametrize("pooled", [False, True])
def test_every_weighting_by_autograd(weighting: str, pooled: bool) -> None:
    x, y, labels = oracle.features()
    one_hot = torch.nn.functional.one_hot(labels).double()
    score, weights, maps = reference.unicam(x, y, one_hot, "relevance", weighting, pooled)
    result = kdx.unicam(x, y, labels, weighting=weighting, pooled=pooled)  # type: ignore[arg-type]
    assert oracle.error(result.weights, weights) < oracle.TOLERANCE["float64"]
    assert oracle.error(result.maps, maps) < oracle.TOLERANCE["float64"]
    assert result.score == pytest.approx(float(score), rel=1e-9)


def test_labels_and_their_one_hot_rows_are_one_target() -> None:
    x, y, labels = oracle.features()
    by_rows = kdx.unicam(x, y, torch.nn.functional.one_hot(labels))
    assert oracle.error(kdx.unicam(x, y, labels * 7 - 3).maps, by_rows.maps) < 1e-12


def test_a_permutation_of_the_batch_permutes_the_maps() -> None:
    x, y, labels = oracle.features()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    plain, permuted = kdx.unicam(x, y, labels), kdx.unicam(x[order], y[order], labels[order])
    assert oracle.error(permuted.maps, plain.maps[order]) < 1e-12
    assert oracle.error(permuted.weights, plain.weights[order]) < 1e-12


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_results_have_the_kind_of_the_input_also_non_contiguous(dtype: torch.dtype) -> None:
    x, y, labels = oracle.features()
    strided = x.to(dtype).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    result = kdx.unicam(strided, y.to(dtype), labels)
    assert isinstance(result.maps, torch.Tensor) and result.maps.shape == (19, 5, 3)
    assert oracle.error(result.maps, kdx.unicam(x, y, labels).maps) < oracle.TOLERANCE[str(dtype).removeprefix("torch.")]


def test_vectors_are_maps_of_one_position() -> None:
    x, y, labels = oracle.features()
    flat = kdx.unicam(x.flatten(1), y, labels)
    assert flat.maps.shape == (19, 1, 1) and flat.weights.shape == (19, x[0].numel())


def test_a_users_objective() -> None:
    x, y, labels = oracle.features()
    result = kdx.unicam(x, y, labels, objective=lambda r: r.amax(-1).sum(-1))
    assert oracle.error(result.maps, kdx.unicam(x, y, labels, objective="uniqueness").maps) < 1e-12


@pytest.mark.parametrize("objective", ["relevance", "uniqueness"])
@pytest.mark.parametrize("weighting", ["gap", "elementwise"])
@pytest.mark.parametrize("pooled", [False, True])
def test_reference_mode_equals_plain_mode_with_one_query_behind_the_references(objective: str, weighting: str, pooled: bool) -> None:
    x, y, labels = oracle.features(n=16)
    known, queries = slice(0, 11), slice(11, 16)
    among = kdx.ReferenceSet(x[known], y[known], labels[known], pooled=pooled)
    options = {"objective": objective, "weighting": weighting, "pooled": pooled}
    result = kdx.unicam(x[queries], y[queries], labels[queries], reference=among, **options)  # type: ignore[arg-type]
    for query in range(5):
        rows = [*range(11), 11 + query]
        plain = kdx.unicam(x[rows], y[rows], labels[rows], **options)  # type: ignore[arg-type]
        assert oracle.error(result.maps[query], plain.maps[-1]) < oracle.TOLERANCE["float64"]
        assert oracle.error(result.weights[query], plain.weights[-1]) < oracle.TOLERANCE["float64"]


def test_a_map_in_reference_mode_does_not_depend_on_its_batch() -> None:
    x, y, labels = oracle.features(n=21)
    among = kdx.ReferenceSet(x[:9], y[:9], labels[:9])
    alone = kdx.unicam(x[20:], y[20:], labels[20:], reference=among)
    beside = kdx.unicam(x[9:], y[9:], labels[9:], reference=among)
    assert oracle.error(beside.maps[-1:], alone.maps) < 1e-12


def test_scaled_and_resized_maps_are_in_zero_to_one() -> None:
    x, y, labels = oracle.features()
    scaled = kdx.unicam(x.numpy(), y.numpy(), labels.numpy()).scaled((31, 17))
    assert isinstance(scaled, np.ndarray) and scaled.shape == (19, 31, 17)
    assert scaled.min() >= 0 and scaled.max() <= 1


def _broken(change: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y, labels = oracle.features()
    match change:
        case "three images":
            return x[:3], y[:3], labels[:3]
        case "one class":
            return x, y, torch.zeros_like(labels)
        case "each its own class":
            return x, y, torch.arange(len(labels))
        case "constant features":
            return torch.ones_like(x), y, labels
        case "constant given":
            return x, torch.ones_like(y), labels
        case "NaN":
            x[3, 1, 1, 1] = torch.nan
        case "infinity":
            y[5, 0, 0, 0] = torch.inf
        case "rows":
            return x, y[:-1], labels
        case "labels":
            return x, y, labels[:-1]
        case "float labels":
            return x, y, labels.double()
        case "same network":
            return x, x.clone(), labels
        case "scaled network":
            return x, 3 * x, labels
        case "integer features":
            return x.long(), y, labels
        case "three dimensions":
            return x[..., 0], y, labels
        case "no channels":
            return x[:, :0], y, labels
    return x, y, labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("three images", "at least 4"),
        ("one class", "one class"),
        ("each its own class", "of its own"),
        ("constant features", "explained features are constant"),
        ("constant given", "given features are constant"),
        ("NaN", "rows 3"),
        ("infinity", "rows 5"),
        ("rows", "19 .* 18|18 .* 19"),
        ("labels", "18"),
        ("float labels", "labels"),
        ("same network", "Nothing is left"),
        ("scaled network", "Nothing is left"),
        ("integer features", "floating-point"),
        ("three dimensions", "shape"),
        ("no channels", "shape"),
    ],
)
def test_bad_input_is_refused(change: str, message: str) -> None:
    x, y, labels = _broken(change)
    for single in (False, True):
        if single and change == "integer features":
            continue
        inputs = (x.float(), y.float()) if single else (x, y)
        with pytest.raises(kdx.KdxError, match=message):
            kdx.unicam(*inputs, labels)


def test_queries_of_another_layer_or_kind_of_target_are_refused() -> None:
    x, y, labels = oracle.features()
    among = kdx.ReferenceSet(x[:9], y[:9], labels[:9])
    with pytest.raises(kdx.KdxError, match="same layer"):
        kdx.unicam(x[9:, :-1], y[9:], labels[9:], reference=among)
    with pytest.raises(kdx.KdxError, match="target"):
        kdx.unicam(x[9:], y[9:], torch.nn.functional.one_hot(labels[9:]), reference=among)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_a_residual_that_is_only_rounding_is_refused(dtype: torch.dtype) -> None:
    """A scaled copy, and features with another order of channels, have the same geometry up to the rounding of their type."""
    x, _, labels = oracle.features(shape=(64, 9, 9))
    x = x.to(dtype)
    for given in ((3.3 * x.double()).to(dtype), x.flip(1)):
        with pytest.raises(kdx.KdxError, match="Nothing is left"):
            kdx.unicam(x, given, labels)
    with pytest.raises(kdx.KdxError, match="constant"):
        kdx.unicam(torch.eye(19, dtype=dtype), x, labels)


@pytest.mark.parametrize("scale", [1e-4, 1e-6])
def test_near_duplicates_keep_their_weights(scale: float) -> None:
    """Two images that float32 can only just distinguish lead to large opposite entries in the Laplacian, which must cancel."""
    x, y, labels = oracle.features()
    x[4] = x[3] + scale * torch.randn(x[3].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    single, other = x.float(), y.float()
    _, weights, _ = reference.unicam(single, other, torch.nn.functional.one_hot(labels).double(), "relevance")
    assert oracle.error(kdx.unicam(single, other, labels).weights, weights) < oracle.TOLERANCE["float32"]


def test_bad_input_in_reference_mode_is_refused() -> None:
    x, y, labels = oracle.features()
    among = kdx.ReferenceSet(x[:9], y[:9], labels[:9])
    for wrong in (labels[9:10], labels[9:12], labels[9]):
        with pytest.raises(kdx.KdxError, match="labels or class embeddings"):
            kdx.unicam(x[9:], y[9:], wrong, reference=among)
    with pytest.raises(kdx.KdxError, match="rows 1"):
        kdx.unicam(x[9:].index_fill(0, torch.tensor([1]), torch.nan), y[9:], labels[9:], reference=among)
    with pytest.raises(kdx.KdxError, match="too large"):
        kdx.unicam(x[9:] * 1e60, y[9:], labels[9:], reference=among)
    with pytest.raises(kdx.KdxError, match="at least one"):
        kdx.unicam(x[:0], y[:0], labels[:0], reference=among)


def test_four_images_have_zero_maps_of_relevance() -> None:
    """However small the residual is, the rest of its gradient is rounding, and must not become a map."""
    x, _, _ = oracle.features(n=4, classes=2)
    for share in (1.0, 1e-2):
        given = x + share * torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        assert kdx.unicam(x, given, torch.tensor([0, 1, 0, 1])).maps.max() == 0


def test_other_byte_orders_and_long_doubles() -> None:
    x, y, labels = oracle.features()
    plain = kdx.unicam(x.numpy(), y.numpy(), labels.numpy())
    other = kdx.unicam(x.numpy().astype(">f8"), y.numpy().astype(np.longdouble), labels.numpy().astype(">i4"))
    assert np.array_equal(plain.maps, other.maps)


def test_misspelled_options_are_value_errors() -> None:
    x, y, labels = oracle.features()
    with pytest.raises(ValueError, match="objective"):
        kdx.unicam(x, y, labels, objective="relevancy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weighting"):
        kdx.unicam(x, y, labels, weighting="hires")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="array"):
        kdx.unicam([[1.0]], y, labels)  # type: ignore[type-var]
