"""The maps and pictures of pytorch-grad-cam itself, from tests/oracle/grad_cam.npz."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import nn

from kdx import cam
from tests.oracle import grad_cam, load

CASES = dict(grad_cam.cases())


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    return grad_cam.networks(load("weights", "grad_cam"))


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return load("maps", "grad_cam")


def maps_of(case: grad_cam.Case, network: nn.Module) -> Any:
    targets = case.targets and [target if callable(target) else cam.ClassifierOutputTarget(target) for target in case.targets]
    layers = [network.get_submodule(layer) for layer in case.layers]
    with getattr(cam, case.method)(model=network, target_layers=layers, reshape_transform=case.reshape_transform) as method:
        return method(input_tensor=grad_cam.images_of(case.network), targets=targets, **case.options)


# The package divides by 1e-7 plus the largest value, and resizes in float32.
TOLERANCE = 1e-5


@pytest.mark.parametrize("name", [name for name in CASES if "eigen" not in name])
def test_maps(name: str, networks: dict[str, nn.Module], expected: dict[str, Any]) -> None:
    case = CASES[name]
    maps = maps_of(case, networks[case.network])
    assert maps.dtype == np.float32 and maps.max() > 0.4
    assert np.abs(maps - expected[name]).max() < TOLERANCE


@pytest.mark.parametrize("name", [name for name in CASES if "eigen" in name])
def test_smoothed_maps(name: str, networks: dict[str, nn.Module], expected: dict[str, Any]) -> None:
    """The sign of the package's component is arbitrary. kdx's agrees with the map that is not smoothed."""
    case = CASES[name]
    maps = maps_of(case, networks[case.network])
    plain = maps_of(case._replace(options={}), networks[case.network])
    for image, answer, other, unsmoothed in zip(maps, expected[name], expected[f"{name}_negated"], plain, strict=True):
        errors = [np.abs(image - values).max() for values in (answer, other)]
        assert min(errors) < TOLERANCE < max(errors)
        right, wrong = (answer, other) if errors[0] < errors[1] else (other, answer)
        assert np.corrcoef(right.ravel(), unsmoothed.ravel())[0, 1] > np.corrcoef(wrong.ravel(), unsmoothed.ravel())[0, 1]


@pytest.mark.parametrize("number", grad_cam.COLOUR_MAPS)
@pytest.mark.parametrize("rgb", [False, True])
def test_pictures(number: int, rgb: bool) -> None:
    stored = load("picture", "grad_cam")
    picture = cam.show_cam_on_image(stored["image"], stored["mask"], use_rgb=rgb, colormap=number, image_weight=0.4)
    assert picture.dtype == np.uint8
    # OpenCV's tables are rounded to 8 bits.
    assert np.abs(picture.astype(int) - stored[f"{number}/{rgb}"].astype(int)).max() <= 2
