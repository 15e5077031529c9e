"""The baselines compute the same as kdx: the published method, the careful implementation, and the compiled one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kdx
from benchmarks import eager
from benchmarks.eager import EagerResult
from kdx.export.graphs import FeatureGraph
from kdx.kernels import reference
from kdx.models.resnet import resnet
from tests import hooked, oracle

Implementation = Callable[[nn.Module, nn.Module, str, Tensor, Tensor], EagerResult]
Geometry = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

IMPLEMENTATIONS: list[Implementation] = [eager.published, eager.fair]


def fair_geometry(explained: Tensor, given: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The distilled map's part of the careful implementation, which computes both maps."""
    (weights, _), (_, score, _) = eager.fair_geometry(explained, given, target)
    return weights, score


def fair_geometry_of_the_base(explained: Tensor, given: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The residual map's part."""
    (_, weights), (_, _, score) = eager.fair_geometry(given, explained, target)
    return weights, score


GEOMETRIES: list[Geometry] = [eager.published_geometry, fair_geometry, fair_geometry_of_the_base]
N, CLASSES = 13, 3


def pair(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A student, and a base that is narrower and has larger maps at the end."""
    torch.manual_seed(0)
    student, base = resnet(5, 1, 4, 2), resnet(4, 1, 4, 2)
    base.get_submodule("layer2.0.conv1").stride = base.get_submodule("layer2.0.downsample.0").stride = (1, 1)  # type: ignore[assignment]
    return student.to(dtype).eval(), base.to(dtype).eval()


def inputs(dtype: torch.dtype = torch.float64, size: tuple[int, int] = (11, 9), n: int = N) -> tuple[Tensor, Tensor]:
    return hooked.batch(n, dtype, size), torch.nn.functional.one_hot(torch.arange(n) % CLASSES).to(dtype)


def features(network: nn.Module, layer: str, images: Tensor) -> Tensor:
    with torch.no_grad():
        _, feature = FeatureGraph(network, [layer])(images)
    assert isinstance(feature, Tensor)
    return feature


def by_kdx(student: nn.Module, base: nn.Module, layer: str, images: Tensor, target: Tensor) -> EagerResult:
    s, b = (features(network, layer, images) for network in (student, base))
    size, labels = (images.shape[2], images.shape[3]), target.argmax(1)
    return EagerResult(
        kdx.unicam(s, b, target).scaled(size),
        kdx.unicam(b, s, target).scaled(size),
        kdx.fss(s, b, permutations=0).value,
        kdx.rs(s, labels, b, permutations=0).value,
        kdx.rs(b, labels, s, permutations=0).value,
    )


def by_definition(student: nn.Module, base: nn.Module, layer: str, images: Tensor, target: Tensor) -> EagerResult:
    s, b = (features(network, layer, images).double() for network in (student, base))
    maps = []
    for x, y in ((s, b), (b, s)):
        _, _, unscaled = reference.unicam(x, y, target, "relevance")
        scaled = torch.stack([(cam - cam.min()) / (cam.max() - cam.min()) if cam.max() > cam.min() else 0 * cam for cam in unscaled])
        maps.append(torch.nn.functional.interpolate(scaled[:, None], size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0])
    centred = [reference.u_centered(reference.distances(rows.double())) for rows in (s.flatten(1), b.flatten(1), target)]
    a, b, g = centred
    scores = (reference.correlation(a, b), reference.semipartial(a, g, b), reference.semipartial(b, g, a))
    return EagerResult(maps[0], maps[1], *(float(score) for score in scores))


def largest_difference(actual: EagerResult, expected: EagerResult) -> float:
    """The largest difference of any map or score. All of them are at most one."""
    maps = [oracle.error(getattr(actual, name), getattr(expected, name)) for name in ("distilled", "residual")]
    scores = [abs(getattr(actual, name) - getattr(expected, name)) for name in ("fss", "rs_distilled", "rs_residual")]
    return float(torch.tensor([*maps, *scores]).max())  # NaN if any is NaN


@pytest.mark.parametrize("case", oracle.CASES)
def test_published_weights(case: str) -> None:
    expected = oracle.load(case)
    x, y, target = (torch.from_numpy(expected[name]) for name in ("x", "y", "target"))
    for geometry, tolerance in zip(GEOMETRIES, (1e-10, *[oracle.TOLERANCE["float64"]] * 2), strict=True):
        weights, score = geometry(x, y, target)
        assert oracle.error(weights, expected["relevance/weights"]) < tolerance
        assert float(score) == pytest.approx(float(expected["relevance/score"]), rel=tolerance)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometry_of_many_images_agrees_with_kdx(geometry: Geometry) -> None:
    x, y, labels = oracle.features(n=31)  # above 25 torch.cdist uses a Gram product
    target = torch.nn.functional.one_hot(labels)
    for dtype in (torch.float64, torch.float32):
        weights, score = geometry(x.to(dtype), y.to(dtype), target.to(dtype))
        expected, tolerance = kdx.unicam(x, y, labels), oracle.TOLERANCE[str(dtype).removeprefix("torch.")]
        assert oracle.error(weights, expected.weights) < tolerance
        assert float(score) == pytest.approx(expected.score, abs=tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layer", ["layer1", "layer2"])
def test_maps_and_scores_agree_with_kdx_and_with_the_definitions(implementation: Implementation, dtype: torch.dtype, layer: str) -> None:
    case = (*pair(dtype), layer, *inputs(dtype))
    actual = implementation(*case)
    assert actual.distilled.shape == actual.residual.shape == (N, 11, 9) and actual.distilled.dtype == dtype
    for expected in (by_kdx(*case), by_definition(*case)):
        assert largest_difference(actual, expected) < oracle.TOLERANCE[str(dtype).removeprefix("torch.")]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_tokens_become_maps_by_kdxs_rule(implementation: Implementation) -> None:
    student, base = (hooked.Blocks().double().eval() for _ in range(2))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3), dtype=parameter.dtype))
    case = (student, base, "first", *inputs(size=(12, 9)))
    assert largest_difference(implementation(*case), by_kdx(*case)) < oracle.TOLERANCE["float64"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_images_have_no_gradient_between_them(implementation: Implementation) -> None:
    images, target = inputs()
    images[6] = images[3]
    case = (*pair(), "layer2", images, target)
    assert largest_difference(implementation(*case), by_kdx(*case)) < oracle.TOLERANCE["float64"]


def test_only_the_published_method_takes_gradients_to_the_parameters_of_both_networks() -> None:
    student, base = pair()
    images, target = inputs()
    eager.fair(student, base, "layer1", images, target)
    assert all(parameter.grad is None for network in (student, base) for parameter in network.parameters())
    eager.published(student, base, "layer1", images, target)
    first_gradients = {}
    for network in (student, base):
        for name, parameter in network.named_parameters():
            before = name.startswith(("conv1", "bn1", "layer1"))
            assert (parameter.grad is not None and bool(parameter.grad.any())) == before, name
            if parameter.grad is not None:
                first_gradients[parameter] = parameter.grad.clone()
        assert not any(module._forward_hooks for module in network.modules())
    # A second call clears the gradients of the first: they do not add up.
    eager.published(student, base, "layer1", images, target)
    for parameter, gradient in first_gradients.items():
        assert parameter.grad is not None and oracle.error(parameter.grad, gradient) < 1e-12


BROKEN: dict[str, Callable[..., Tensor]] = {
    "_u_centred": reference.double_centered,
    "_residual": lambda a, b: a - eager._inner(a, b) * b,
    "_correlation": lambda a, b: eager._inner(a, b),
    "_scaled": lambda maps: maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-30) ** 0.5,
    "interpolate": lambda maps, size, **_: torch.nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=True),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("step", [*BROKEN, "distances"])
def test_a_broken_step_is_noticed(implementation: Implementation, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = (*pair(), "layer2", *inputs())
    expected = by_kdx(*case)
    if step == "distances":
        for name in ("_broadcast_distances", "_distances"):
            monkeypatch.setattr(eager, name, lambda x: torch.cdist(x, x, p=1))
    else:
        monkeypatch.setattr(eager, step, BROKEN[step])
    assert not largest_difference(implementation(*case), expected) < 1e-3


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # PyTorch's compiler raises it on import
def test_compiled_agrees_with_kdx_at_any_number_of_images() -> None:
    student, base = pair(torch.float32)
    run = eager.compiled(student, base, "layer2")
    for n in (N, 9):
        images, target = inputs(torch.float32, n=n)
        assert largest_difference(run(images, target), by_kdx(student, base, "layer2", images, target)) < oracle.TOLERANCE["float32"]
    assert not any(module._forward_hooks for network in (student, base) for module in network.modules())
