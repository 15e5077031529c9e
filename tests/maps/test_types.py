"""The static types of public results: NumPy in, NumPy out; Tensor in, Tensor out. mypy checks `assert_type`, pytest checks the values."""

from __future__ import annotations

from typing import Any, assert_type

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import kdx
from kdx.maps.scaling import scaled
from kdx.models.resnet import resnet
from kdx.scores.score import Contrast
from tests import oracle
from tests.explain.test_layer import roles
from tests.hooked import Net, batch

Numbers = NDArray[Any]


def test_unicam() -> None:
    x, y, labels = oracle.features()
    of_tensors = kdx.unicam(x, y, labels)
    assert_type(of_tensors, kdx.Maps[Tensor])
    assert_type(of_tensors.maps, Tensor)
    assert_type(of_tensors.weights, Tensor)
    assert_type(of_tensors.scaled((5, 5)), Tensor)
    of_arrays = kdx.unicam(x.numpy(), y.numpy(), labels.numpy())
    assert_type(of_arrays, kdx.Maps[Numbers])
    assert_type(of_arrays.scaled(), Numbers)
    for tensor in (of_tensors.maps, of_tensors.weights, of_tensors.scaled((5, 5))):
        assert isinstance(tensor, Tensor)
    for array in (of_arrays.maps, of_arrays.weights, of_arrays.scaled()):
        assert isinstance(array, np.ndarray)


def test_maps_of_a_class_and_of_an_earlier_layer() -> None:
    network, images = Net().eval(), batch(dtype=torch.float32)
    x, y, labels = oracle.features(n=8, shape=(4, 4, 2))
    assert_type(kdx.grad_cam(network, images, "conv2"), kdx.ClassMaps[Tensor])
    assert_type(kdx.hires_cam(network, images, "conv2").scaled(), Tensor)
    of_arrays = kdx.grad_cam(network, images.numpy(), "conv2")
    assert_type(of_arrays, kdx.ClassMaps[Numbers])
    for array in (of_arrays.maps, of_arrays.weights, of_arrays.classes, of_arrays.logits):
        assert_type(array, Numbers)
        assert isinstance(array, np.ndarray)

    def earlier(pixels: Numbers) -> kdx.Maps[Numbers]:
        return kdx.unicam_before(network, pixels, "conv1", x, y, labels, at="conv3")

    def earlier_of_tensors(pixels: Tensor) -> kdx.Maps[Tensor]:
        return kdx.unicam_before(network, pixels, "conv1", x, y, labels, at="conv3")


def test_images_and_masks() -> None:
    network, images = Net().eval(), batch(dtype=torch.float32)
    maps = kdx.hires_cam(network, images, "conv2").scaled((13, 9))
    assert_type(kdx.top_mask(maps), Tensor)
    assert_type(kdx.top_mask(maps.numpy()), Numbers)
    assert_type(kdx.impute(images, kdx.top_mask(maps)), Tensor)
    assert_type(kdx.impute(images.numpy(), kdx.top_mask(maps)), Numbers)
    assert_type(kdx.salient_images(network, images, "conv2"), Tensor)
    assert_type(kdx.salient_images(network, images.numpy(), "conv2"), Numbers)
    assert_type(scaled(maps), Tensor)
    assert isinstance(kdx.impute(images.numpy(), kdx.top_mask(maps)), np.ndarray)


def test_an_argument_of_either_kind_gives_a_result_of_either_kind() -> None:
    def masks(maps: Numbers | Tensor) -> Numbers | Tensor:
        return kdx.top_mask(maps)

    for maps in (torch.rand(2, 3, 3), np.random.default_rng(0).random((2, 3, 3))):
        assert type(masks(maps)) is type(maps)


def test_a_contrast_is_a_value_and_its_interval() -> None:
    features, labels = roles()
    contrast = kdx.compare({"layer": features}, labels, permutations=0)["layer"].contrasts["FSS(S,T) - FSS(B,T)"]
    assert_type(contrast, Contrast)
    value, interval = contrast
    assert (value, interval) == (contrast.value, contrast.interval) and interval[0] < value < interval[1]


def test_the_explainer() -> None:
    images, labels = torch.rand(8, 3, 16, 16), torch.arange(8) % 2
    student, base = (resnet(width=2, depth=1, classes=2) for _ in range(2))
    with kdx.Explainer(student=student, base=base, layers=["layer1"], runtime="eager", permutations=0) as explainer:
        of_tensors, of_arrays = explainer(images, labels), explainer(images.numpy(), labels.numpy())
    assert_type(of_tensors, kdx.Explanation[Tensor])
    assert_type(of_arrays.layers["layer1"].distilled.maps, Numbers)
    assert_type(of_arrays.logits["student"], Numbers)
    assert isinstance(of_tensors.layers["layer1"].distilled.maps, Tensor)
    assert isinstance(of_arrays.layers["layer1"].distilled.maps, np.ndarray)
    value, interval = of_arrays.layers["layer1"].contrasts["RS(S|B) - RS(B|S)"]
    assert interval[0] <= value <= interval[1]
