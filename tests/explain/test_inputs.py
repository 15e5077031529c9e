"""The forms of images, labels and networks that the Explainer takes: all give the same explanation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

import kdx
from kdx import Explainer, KdxError
from kdx.explain.results import Explanation
from kdx.export.graphs import Preprocessing
from kdx.maps.class_maps import ClassMaps
from kdx.models.network import Network
from kdx.roles import MAPS
from tests.explain.small_networks import N, assert_same, explainer, images, labels, networks

LEVELS = (images() * 255).round().to(torch.uint8)
PIXELS = LEVELS / 255
NORMALISED = (PIXELS - 0.45) / 0.2


@pytest.fixture(scope="module")
def expected() -> Explanation[Any]:
    with explainer() as opened:
        return opened(PIXELS, labels())


def test_uint8_pictures_and_loaders_are_the_same_images(expected: Explanation[Any], tmp_path: Path) -> None:
    pictures = [Image.fromarray(image) for image in LEVELS.permute(0, 2, 3, 1).numpy()]
    paths = [tmp_path / f"{index}.png" for index in range(N)]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    with explainer() as opened:
        assert isinstance(opened(LEVELS, labels()).logits["base"], torch.Tensor)
        for form in (LEVELS.permute(0, 2, 3, 1).numpy(), pictures, paths):
            actual = opened(form, labels())
            assert isinstance(actual.logits["base"], np.ndarray)
            assert_same(actual, expected, 1e-6)
        assert_same(opened(DataLoader(TensorDataset(PIXELS, labels()), batch_size=5)), expected, 1e-6)


@pytest.mark.parametrize(
    "form",
    [
        labels().tolist(),
        tuple(labels().tolist()),
        list(labels()),
        [["hen", "owl", "emu"][label] for label in labels().tolist()],
        np.array(["b", "a", "c"], dtype=object)[labels().numpy()],
        [[float(label == column) for column in range(3)] for label in labels().tolist()],
    ],
)
def test_labels_may_be_lists_and_names(expected: Explanation[Any], form: Any) -> None:
    with explainer() as opened:
        assert_same(opened(PIXELS, form), expected, 1e-6)


def test_scores_and_maps_of_features_take_lists_and_names_too() -> None:
    features = torch.rand(N, 6, 2, 2)
    names = [["hen", "owl", "emu"][label] for label in labels().tolist()]
    for form in (labels().tolist(), names):
        assert kdx.rs(features, form).value == kdx.rs(features, labels()).value


def test_names_have_the_same_meaning_for_references_and_images() -> None:
    """The names of a later call are other classes than its numbers by order of appearance would say."""
    names = np.array(["hen", "owl", "emu"])
    shifted = (labels() + 1) % 3
    with explainer() as opened:
        opened.use_references(images(seed=1), names[labels()].tolist())
        actual = opened(PIXELS, names[shifted].tolist()).layers["conv2"].distilled.maps
    with explainer() as opened:
        opened.use_references(images(seed=1), labels())
        assert torch.allclose(actual, opened(PIXELS, shifted).layers["conv2"].distilled.maps)


def test_pixels_must_be_in_the_unit_range_where_kdx_normalises_them(expected: Explanation[Any]) -> None:
    with explainer(base=Network("base", networks()["base"], Preprocessing(mean=(0.4,)))) as opened:
        for wrong in (NORMALISED, PIXELS * 255):
            with pytest.raises(KdxError, match="The pixels are between"):
                opened(wrong, labels())
            with pytest.raises(KdxError, match="The pixels are between"):
                opened.use_references(wrong, labels())
    normalises_itself = {role: Network(role, network, Preprocessing(mean=(0.45,), std=(0.2,))) for role, network in networks().items()}
    with explainer() as plain, explainer(**normalises_itself) as others:
        assert_same(plain(NORMALISED, labels()), others(PIXELS, labels()), 1e-4)


@pytest.mark.parametrize("method", [kdx.grad_cam, kdx.hires_cam])
def test_class_maps_take_them_too(method: Any) -> None:
    network = Network("net", networks()["student"], Preprocessing(mean=(0.45,), std=(0.2,)))
    by_list: ClassMaps[Any] = method(network, LEVELS.permute(0, 2, 3, 1).numpy(), "conv1", [1, 4] * 6 + [0])
    by_array = method(network, PIXELS, "conv1", torch.tensor([1, 4] * 6 + [0]))
    assert isinstance(by_list.maps, np.ndarray) and torch.allclose(torch.from_numpy(by_list.maps), by_array.maps)
    with pytest.raises(KdxError, match="as after a normalisation"):
        method(network, NORMALISED, "conv1")
    plain = method(networks()["student"], NORMALISED, "conv1", by_array.classes)
    assert torch.allclose(plain.maps, by_array.maps, atol=1e-5)


def test_salient_images_of_pictures_are_arrays_in_the_unit_range() -> None:
    network = Network("net", networks()["student"], Preprocessing(mean=(0.45,), std=(0.2,)))
    pictures = [Image.fromarray(image) for image in LEVELS.permute(0, 2, 3, 1).numpy()]
    expected = kdx.salient_images(network, PIXELS, "conv1")
    assert torch.equal(torch.from_numpy(kdx.salient_images(network, pictures, "conv1")), expected)
    with pytest.raises(KdxError, match="8-bit levels"):
        kdx.salient_images(network, PIXELS * 255, "conv1")


@pytest.fixture
def models_file(tmp_path: Path) -> Path:
    reference = "kdx:resnet,width=4,depth=1,stages=1"
    for seed, role in enumerate(("student", "base")):
        torch.manual_seed(seed)
        save_file(kdx.models.load(reference, classes=3).module.state_dict(), tmp_path / f"{role}.safetensors")
    return kdx.models.write_models(
        tmp_path / "m.toml",
        base=f"{reference}@base.safetensors",
        student=f"{reference}@student.safetensors",
        layers=["layer1"],
        classes=["hen", "owl", "emu"],
        preprocessing=Preprocessing((16, 16), (0.5,), (0.25,)),
    ).path


def test_a_models_file_gives_all_roles_the_layers_and_the_classes(models_file: Path) -> None:
    pictures = [Image.fromarray(image) for image in LEVELS.permute(0, 2, 3, 1).numpy()]
    names = [["hen", "owl", "emu"][label] for label in labels().tolist()]
    with Explainer(models_file, runtime="eager", permutations=0) as opened:
        assert opened.layers == {"layer1": "layer1"} and opened.roles == ("student", "base")
        actual = opened(pictures, names)
        with pytest.raises(KdxError, match="no class 'hem'") as caught:
            opened(pictures, ["hem"] * N)
        assert "hen" in caught.value.hint
    assert actual.layers["layer1"].distilled.maps.shape == (N, 16, 16)  # pictures become 16 x 16
    roles = {role: f"{models_file}:{role}" for role in ("student", "base")}
    with Explainer(**roles, layers=["layer1"], runtime="eager", permutations=0) as opened:  # type: ignore[arg-type]
        other = opened(pictures, labels().tolist())
    for name in ("distilled", "residual"):
        assert name in MAPS
        assert np.array_equal(getattr(actual.layers["layer1"], name).maps, getattr(other.layers["layer1"], name).maps)
    assert kdx.grad_cam(f"{models_file}:student", pictures, "layer1").maps.shape == (N, 16, 16)


def test_a_models_file_excludes_other_networks_and_needs_a_role(models_file: Path) -> None:
    with pytest.raises(ValueError, match="names all networks"):
        Explainer(models_file, student="kdx:resnet")
    with pytest.raises(KdxError, match="names several networks") as caught:
        kdx.models.as_network(models_file)
    assert f"{models_file}:student" in caught.value.hint


def test_names_in_unicam_are_those_of_the_reference_set() -> None:
    explained, given = torch.rand(N, 6, 2, 2), torch.rand(N, 4, 2, 2)
    names = np.array(["hen", "owl", "emu"])
    by_name = kdx.ReferenceSet(explained, given, names[labels()].tolist())
    by_number = kdx.ReferenceSet(explained, given, labels())
    shifted = (labels() + 1) % 3
    actual = kdx.unicam(explained.flip(0), given.flip(0), names[shifted].tolist(), reference=by_name)
    assert torch.equal(actual.maps, kdx.unicam(explained.flip(0), given.flip(0), shifted, reference=by_number).maps)
    with pytest.raises(KdxError, match="no class 'owl'"):
        kdx.unicam(explained.flip(0), given.flip(0), names[shifted].tolist(), reference=by_number)
