"""A GPU gives the CPU's numbers, within the rounding of float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import kdx
from kdx.explain import layer_graphs
from kdx.kernels import cuda
from tests.explain.small_networks import assert_same, explainer, features, images, labels

pytestmark = pytest.mark.gpu
TOLERANCE = 1e-4


@pytest.mark.parametrize("settings", [{}, {"features": "salient", "keep": 0.6}, {"pooled": True}, {"chunk": 5}], ids=str)
def test_maps_and_scores_are_those_of_the_cpu(settings: dict[str, Any]) -> None:
    """With keep = 0.6, the pixels above and below the threshold differ by 6e-5, so that rounding selects the same pixels."""
    with explainer(**settings) as here, explainer(**settings, device="cuda") as there:
        expected, actual = here(images(), labels()), there(images(), labels())
    assert there.choice.device.type == "cuda"
    assert_same(actual, expected, TOLERANCE)


def test_reference_mode_is_that_of_the_cpu() -> None:
    results = []
    for device in ("cpu", "cuda"):
        with explainer(device=device) as opened:
            opened.use_references(images(17, seed=5), labels(17))
            results.append(opened(images(6), labels(6)))
    assert_same_reference_maps(results[1], results[0])


def assert_same_reference_maps(actual: Any, expected: Any) -> None:
    for layer, result in actual.layers.items():
        for name in ("distilled", "residual", "missed", "new"):
            ours, theirs = getattr(result, name).maps, getattr(expected.layers[layer], name).maps
            assert abs(torch.as_tensor(ours) - torch.as_tensor(theirs)).max() <= TOLERANCE * torch.as_tensor(theirs).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_on_a_gpu_need_no_labels_there(dtype: torch.dtype) -> None:
    role_features = {role: maps["conv2"].to(dtype) for role, maps in features().items()}
    student, base = role_features["student"], role_features["base"]
    expected, actual = kdx.unicam(student, base, labels()), kdx.unicam(student.cuda(), base.cuda(), labels())
    assert actual.maps.is_cuda
    torch.testing.assert_close(actual.maps.cpu(), expected.maps, rtol=TOLERANCE, atol=TOLERANCE * float(expected.maps.max()))
    score = kdx.rs(student.cuda(), labels(), base.cuda(), permutations=99)
    assert score.value == pytest.approx(kdx.rs(student, labels(), base, permutations=99).value, abs=TOLERANCE)


@pytest.mark.parametrize("pooled", [False, True])
def test_a_reference_set_on_a_gpu_needs_no_labels_there(pooled: bool) -> None:
    role_features = {role: maps["conv2"] for role, maps in features(images(20)).items()}
    student, base = role_features["student"], role_features["base"]
    maps = []
    for x, y in ((student, base), (student.cuda(), base.cuda())):
        known = kdx.ReferenceSet(x[:14], y[:14], labels(14), pooled=pooled)
        maps.append(kdx.unicam(x[14:], y[14:], labels(6), reference=known, pooled=pooled).maps)
    assert maps[1].is_cuda
    torch.testing.assert_close(maps[1].cpu(), maps[0], rtol=TOLERANCE, atol=TOLERANCE * float(maps[0].max()))


def test_cuda_graphs_give_each_batch_the_results_of_single_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch is launched, the second one is captured, and the others are replayed in the same memory."""
    if not cuda.launcher(torch.device("cuda")).can_be_captured:
        pytest.skip("PyCUDA launches the kernels")
    batches, captures = [images(seed=seed) for seed in range(5)], list[Any]()
    monkeypatch.setenv(layer_graphs.SWITCH, "0")
    with explainer(device="cuda") as opened:
        expected = [opened(batch, labels()) for batch in batches]
    capture = layer_graphs.CudaCapture.__call__

    def counted(*arguments: Any) -> Any:
        captures.append(arguments)
        return capture(*arguments)

    monkeypatch.setattr(layer_graphs.CudaCapture, "__call__", counted)
    monkeypatch.delenv(layer_graphs.SWITCH)
    with explainer(device="cuda") as opened:
        actual = [opened(batch, labels()) for batch in batches]
    assert len(captures) == 2  # one per layer
    for ours, theirs in zip(actual, expected, strict=True):
        assert_same(ours, theirs, 1e-6)
