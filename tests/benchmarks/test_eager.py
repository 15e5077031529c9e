"""What kdx is timed against does the same as kdx: the published method, the careful one and the compiled one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kdx
from benchmarks import eager
from benchmarks.eager import Found
from kdx.export.graphs import FeatureGraph
from kdx.kernels import reference
from kdx.models.resnet import resnet
from tests import hooked, oracle

Way = Callable[[nn.Module, nn.Module, str, Tensor, Tensor], Found]
Geometry = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

WAYS: list[Way] = [eager.published, eager.fair]


def fair_geometry(explained: Tensor, given: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The distilled map's side of what the careful way makes for both."""
    (weights, _), (_, score, _) = eager.fair_geometry(explained, given, target)
    return weights, score


def fair_geometry_of_the_base(explained: Tensor, given: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The residual map's side."""
    (_, weights), (_, _, score) = eager.fair_geometry(given, explained, target)
    return weights, score


GEOMETRIES: list[Geometry] = [eager.published_geometry, fair_geometry, fair_geometry_of_the_base]
N, CLASSES = 13, 3


def pair(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A student, and a base that is narrower and ends with larger maps."""
    torch.manual_seed(0)
    student, base = resnet(5, 1, 4, 2), resnet(4, 1, 4, 2)
    base.get_submodule("layer2.0.conv1").stride = base.get_submodule("layer2.0.downsample.0").stride = (1, 1)  # type: ignore[assignment]
    return student.to(dtype).eval(), base.to(dtype).eval()


def inputs(dtype: torch.dtype = torch.float64, size: tuple[int, int] = (11, 9), n: int = N) -> tuple[Tensor, Tensor]:
    return hooked.batch(n, dtype, size), torch.nn.functional.one_hot(torch.arange(n) % CLASSES).to(dtype)


def features(network: nn.Module, layer: str, images: Tensor) -> Tensor:
    with torch.no_grad():
        _, found = FeatureGraph(network, [layer])(images)
    assert isinstance(found, Tensor)
    return found


def by_kdx(student: nn.Module, base: nn.Module, layer: str, images: Tensor, target: Tensor) -> Found:
    s, b = (features(network, layer, images) for network in (student, base))
    size, labels = (images.shape[2], images.shape[3]), target.argmax(1)
    return Found(
        kdx.unicam(s, b, target).scaled(size),
        kdx.unicam(b, s, target).scaled(size),
        kdx.fss(s, b, permutations=0).value,
        kdx.rs(s, labels, b, permutations=0).value,
        kdx.rs(b, labels, s, permutations=0).value,
    )


def by_definition(student: nn.Module, base: nn.Module, layer: str, images: Tensor, target: Tensor) -> Found:
    s, b = (features(network, layer, images).double() for network in (student, base))
    maps = []
    for x, y in ((s, b), (b, s)):
        _, _, found = reference.unicam(x, y, target, "relevance")
        found = torch.stack([(one - one.min()) / (one.max() - one.min()) if one.max() > one.min() else 0 * one for one in found])
        maps.append(torch.nn.functional.interpolate(found[:, None], size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0])
    centred = [reference.u_centered(reference.distances(rows.double())) for rows in (s.flatten(1), b.flatten(1), target)]
    of_s, of_b, g = centred
    scores = (reference.correlation(of_s, of_b), reference.semipartial(of_s, g, of_b), reference.semipartial(of_b, g, of_s))
    return Found(maps[0], maps[1], *(float(score) for score in scores))


def apart(found: Found, expected: Found) -> float:
    """The largest difference in any map or score, all of which are at most one."""
    maps = [oracle.error(getattr(found, name), getattr(expected, name)) for name in ("distilled", "residual")]
    scores = [abs(getattr(found, name) - getattr(expected, name)) for name in ("fss", "rs_distilled", "rs_residual")]
    return float(torch.tensor([*maps, *scores]).max())  # NaN where one is


@pytest.mark.parametrize("case", oracle.CASES)
def test_published_weights(case: str) -> None:
    known = oracle.load(case)
    x, y, target = (torch.from_numpy(known[name]) for name in ("x", "y", "target"))
    for geometry, tolerance in zip(GEOMETRIES, (1e-10, *[oracle.TOLERANCE["float64"]] * 2), strict=True):
        weights, score = geometry(x, y, target)
        assert oracle.error(weights, known["relevance/weights"]) < tolerance
        assert float(score) == pytest.approx(float(known["relevance/score"]), rel=tolerance)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometry_of_many_images_is_kdxs(geometry: Geometry) -> None:
    x, y, labels = oracle.features(n=31)  # past 25 torch.cdist takes a Gram product
    target = torch.nn.functional.one_hot(labels)
    for dtype in (torch.float64, torch.float32):
        weights, score = geometry(x.to(dtype), y.to(dtype), target.to(dtype))
        expected, tolerance = kdx.unicam(x, y, labels), oracle.TOLERANCE[str(dtype).removeprefix("torch.")]
        assert oracle.error(weights, expected.weights) < tolerance
        assert float(score) == pytest.approx(expected.score, abs=tolerance)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layer", ["layer1", "layer2"])
def test_maps_and_scores_are_kdxs_and_the_definitions(way: Way, dtype: torch.dtype, layer: str) -> None:
    case = (*pair(dtype), layer, *inputs(dtype))
    found = way(*case)
    assert found.distilled.shape == found.residual.shape == (N, 11, 9) and found.distilled.dtype == dtype
    for expected in (by_kdx(*case), by_definition(*case)):
        assert apart(found, expected) < oracle.TOLERANCE[str(dtype).removeprefix("torch.")]


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_maps_as_kdx_sees_them(way: Way) -> None:
    student, base = (hooked.Blocks().double().eval() for _ in range(2))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3), dtype=parameter.dtype))
    case = (student, base, "first", *inputs(size=(12, 9)))
    assert apart(way(*case), by_kdx(*case)) < oracle.TOLERANCE["float64"]


@pytest.mark.parametrize("way", WAYS)
def test_equal_images_have_no_gradient_between_them(way: Way) -> None:
    images, target = inputs()
    images[6] = images[3]
    case = (*pair(), "layer2", images, target)
    assert apart(way(*case), by_kdx(*case)) < oracle.TOLERANCE["float64"]


def test_the_published_gradients_reach_the_parameters_of_both_networks_and_no_others_do() -> None:
    student, base = pair()
    images, target = inputs()
    eager.fair(student, base, "layer1", images, target)
    assert all(parameter.grad is None for network in (student, base) for parameter in network.parameters())
    eager.published(student, base, "layer1", images, target)
    once = {}
    for network in (student, base):
        for name, parameter in network.named_parameters():
            before = name.startswith(("conv1", "bn1", "layer1"))
            assert (parameter.grad is not None and bool(parameter.grad.any())) == before, name
            if parameter.grad is not None:
                once[parameter] = parameter.grad.clone()
        assert not any(module._forward_hooks for module in network.modules())
    # What an earlier call left is cleared: the residual's gradients again, not twice those.
    eager.published(student, base, "layer1", images, target)
    for parameter, gradient in once.items():
        assert parameter.grad is not None and oracle.error(parameter.grad, gradient) < 1e-12


BROKEN: dict[str, Callable[..., Tensor]] = {
    "_u_centred": reference.double_centered,
    "_residual": lambda a, b: a - eager._inner(a, b) * b,
    "_correlation": lambda a, b: eager._inner(a, b),
    "_scaled": lambda maps: maps / maps.amax((1, 2), keepdim=True).clamp_min(1e-30) ** 0.5,
    "interpolate": lambda maps, size, **_: torch.nn.functional.interpolate(maps, size=size, mode="bilinear", align_corners=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("step", [*BROKEN, "distances"])
def test_a_broken_step_shows(way: Way, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = (*pair(), "layer2", *inputs())
    expected = by_kdx(*case)
    if step == "distances":
        for name in ("_broadcast_distances", "_distances"):
            monkeypatch.setattr(eager, name, lambda x: torch.cdist(x, x, p=1))
    else:
        monkeypatch.setattr(eager, step, BROKEN[step])
    assert not apart(way(*case), expected) < 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of PyTorch's own, as its compiler is imported
def test_compiled_is_the_careful_way_at_any_number_of_images() -> None:
    student, base = pair(torch.float32)
    run = eager.compiled(student, base, "layer2")
    for n in (N, 9):
        images, target = inputs(torch.float32, n=n)
        assert apart(run(images, target), by_kdx(student, base, "layer2", images, target)) < oracle.TOLERANCE["float32"]
    assert not any(module._forward_hooks for network in (student, base) for module in network.modules())
