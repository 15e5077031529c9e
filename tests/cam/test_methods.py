"""What the package does not have: UniCAM, and how kdx treats models, wrong input and rounding."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kdx
from kdx.cam import ClassifierOutputTarget, GradCAM, HiResCAM, LayerCAM, UniCAM, show_cam_on_image
from tests import oracle
from tests.hooked import SIZE, Blocks, Net, batch, hooked

LABELS = torch.arange(8) % 2


def pair() -> tuple[Net, Net]:
    return Net(0).double().eval(), Net(1).double().eval()


def at_image_size(*maps: Tensor) -> Any:
    """The mean over layers of scaled and resized maps, scaled again, one image at a time."""
    images = []
    for layers in zip(*maps, strict=True):
        resized = []
        for layer in layers:
            shifted = layer - layer.min()
            unit = shifted / (shifted.max() or 1)
            resized.append(nn.functional.interpolate(unit[None, None], SIZE, mode="bilinear", align_corners=False)[0, 0])
        mean = torch.stack(resized).mean(0)
        images.append((mean - mean.min()) / ((mean.max() - mean.min()) or 1))
    return torch.stack(images).detach()


def test_unicam_compares_two_networks_layer_by_layer() -> None:
    student, base = pair()
    images = batch()
    features, others = hooked(student, images, "conv2", "conv3")[1:], hooked(base, images, "conv3", "conv2")[1:]
    expected = at_image_size(*(kdx.unicam(x, y, LABELS).maps for x, y in zip(features, others, strict=True)))
    cam = UniCAM(student, [student.conv2, student.conv3], given=base, given_layers=[base.conv3, base.conv2])
    assert oracle.error(cam(images, targets=LABELS), expected) < oracle.TOLERANCE["float32"] / 100


def test_unicam_finds_the_layers_of_the_given_network_by_name() -> None:
    student, base = pair()
    images = batch()
    named, explicit = (UniCAM(student, [student.conv2], given=base, given_layers=layers) for layers in (None, [base.conv2]))
    assert np.array_equal(named(images, LABELS), explicit(images, LABELS))


def test_unicam_takes_labels_as_arrays_as_integers_and_as_targets() -> None:
    student, base = pair()
    cam, images = UniCAM(student, ["conv2"], given=base), batch()
    expected = cam(images, LABELS)
    for targets in (LABELS.numpy(), LABELS.tolist(), [ClassifierOutputTarget(int(label)) for label in LABELS]):
        assert np.array_equal(cam(images, targets), expected)
    embedding = nn.functional.one_hot(LABELS).double()
    assert np.abs(cam(images, embedding) - expected).max() < 1e-6


def test_unicam_smooths_over_six_copies() -> None:
    student, base = pair()
    cam, images = UniCAM(student, ["conv2"], given=base, pooled=True), batch()
    maps = [cam(images * factor, LABELS) for factor in (0.9, 1, 1.1)]
    maps += [cam(images.flip(3) * factor, LABELS)[:, :, ::-1] for factor in (0.9, 1, 1.1)]
    assert np.abs(cam(images, LABELS, aug_smooth=True) - np.mean(maps, 0)).max() < 1e-6


def test_a_component_of_one_channel_is_the_centred_channel() -> None:
    """With one channel, the projection is the centred weighted channel, so the sign that agrees with the sum is known."""
    model = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Flatten(), nn.Linear(77, 3)).double()
    images = batch(5)
    targets = [ClassifierOutputTarget(2)] * 5
    logits, feature = hooked(model, images, "0")
    (gradient,) = torch.autograd.grad(logits[:, 2].sum(), feature)
    weighted = (gradient.mean((2, 3), keepdim=True) * feature)[:, 0]
    expected = at_image_size((weighted - weighted.mean((1, 2), keepdim=True)).relu())
    assert oracle.error(GradCAM(model, [model[0]])(images, targets, eigen_smooth=True), expected) < 1e-6


@pytest.mark.parametrize("method", [GradCAM, HiResCAM, LayerCAM])
def test_the_model_stays_as_it_is_and_maps_follow_its_weights(method: type[GradCAM]) -> None:
    model = Net().double().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cam = method(model, [model.conv2])
    maps = cam(batch())
    assert model.training and not model.conv2._forward_hooks and all(weight.grad is None for weight in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert np.array_equal(maps, method(model.eval(), ["conv2"])(batch()))
    model.load_state_dict(Net(5).double().state_dict())
    assert np.array_equal(cam(batch()), method(Net(5).double(), ["conv2"])(batch()))
    assert not np.array_equal(cam(batch()), maps)


def test_a_wrapped_model_gives_the_same_maps() -> None:
    model = Net().double().eval()
    expected = GradCAM(model, [model.conv2])(batch())
    wrappers: list[Any] = [nn.DataParallel(model), torch.compile(model, backend="eager"), torch.optim.swa_utils.AveragedModel(model)]
    for wrapped in wrappers:
        layer = next(module for name, module in wrapped.named_modules() if name.endswith("conv2"))
        assert np.array_equal(GradCAM(wrapped, [layer])(batch()), expected)


def test_the_ambient_state_of_pytorch_changes_nothing() -> None:
    student, base = Net(0).eval(), Net(1).eval()
    images = batch(dtype=torch.float32)
    methods: list[tuple[Any, Any]] = [(LayerCAM(student, ["conv2"]), [lambda output: output[1] - output[2]] * 8)]
    methods.append((UniCAM(student, ["conv2"], given=base), LABELS))
    for cam, targets in methods:
        expected = cam(images, targets)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            assert np.array_equal(cam(images.clone(), targets), expected)


@pytest.mark.gpu
def test_the_model_may_be_on_a_gpu() -> None:
    student, base = pair()
    images, targets = batch(), [ClassifierOutputTarget(number % 5) for number in range(8)]
    expected = [GradCAM(student, ["conv2"])(images, targets), UniCAM(student, ["conv2"], given=base)(images, LABELS)]
    actual = [GradCAM(student.cuda(), ["conv2"])(images, targets), UniCAM(student, ["conv2"], given=base)(images, LABELS)]
    for maps, others in zip(actual, expected, strict=True):
        assert np.abs(maps - others).max() < 1e-5


def test_outputs_are_those_of_the_model() -> None:
    model = Net().double().eval()
    cam = GradCAM(model, [model.conv2])
    cam(batch())
    assert cam.outputs is not None and oracle.error(cam.outputs, model(batch()).detach()) < 1e-12


def test_maps_do_not_depend_on_the_unit_of_the_features() -> None:
    class Scaled(nn.Module):
        def __init__(self, unit: float) -> None:
            super().__init__()
            self.net, self.unit = Net().double(), unit
            self.layer = nn.Identity()

        def forward(self, images: Tensor) -> Tensor:
            features = self.layer(self.net.conv2(self.net.conv1(images)) * self.unit)
            logits: Tensor = self.net.fc(self.net.pool(self.net.conv3(features / self.unit).relu()).flatten(1))
            return logits

    for smooth in (False, True):
        expected, *others = (GradCAM(Scaled(unit), ["layer"])(batch(), eigen_smooth=smooth) for unit in (1.0, 2.0**-99, 2.0**99))
        assert expected.max() == 1
        assert all(np.abs(maps - expected).max() < 1e-6 for maps in others)


def test_a_map_of_rounding_error_is_zero() -> None:
    """An instance normalisation removes the influence of every channel's mean, so Grad-CAM before it is zero in exact arithmetic."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.InstanceNorm2d(5), nn.Flatten(), nn.Linear(5 * 11 * 7, 4))
    images = batch(dtype=torch.float32)
    assert not GradCAM(model, [model[0]])(images).any()
    assert not GradCAM(model, [model[0]])(images, eigen_smooth=True).any()
    assert HiResCAM(model, [model[1]])(images).max() == 1


def test_a_layer_without_influence_causes_a_warning() -> None:
    model = Blocks().double().eval()
    with pytest.warns(UserWarning, match="'last.mixed.0' influences these targets") as record:
        maps = GradCAM(model, ["last.mixed.0"], lambda tokens: 0 * tokens[:, 1:].mT.unflatten(2, (4, 3)))(batch())
    assert not maps.any() and record[0].filename == __file__


def test_mistakes_are_named() -> None:
    model, images = Net().double(), batch()
    cam = GradCAM(model, [model.conv2])
    target = ClassifierOutputTarget(1)
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 1)).double()
    mistakes: list[tuple[str, Any]] = [
        ("not a module inside the model", lambda: GradCAM(model, [Net().conv2])),
        ("no target layers", lambda: GradCAM(model, [])),
        ("no layer 'conv7'", lambda: GradCAM(model, ["conv7"])(images)),
        ("3 rows of targets and 8 of images", lambda: cam(images, [target] * 3)),
        ("one number", lambda: cam(images, [lambda output: output] * 8)),
        ("one number", lambda: cam(images, [lambda output: output.detach()[0]] * 8)),
        ("input tensor has shape", lambda: cam(images[0])),
        ("input tensor has shape", lambda: cam((images * 255).byte())),
        ("does not predict one class", lambda: GradCAM(dense, [dense[0]])(images)),
        ("reshape_transform makes", lambda: GradCAM(model, [model.conv2], lambda feature: feature.flatten(2))(images)),
        ("not finite", lambda: cam(images * torch.inf)),
        ("1 target layers and 2 given", lambda: UniCAM(model, ["conv2"], given=model, given_layers=["conv1", "conv2"])),
        ("there are none", lambda: UniCAM(model, ["conv2"], given=Net(1).double())(images)),
        ("at least 4 images", lambda: UniCAM(model, ["conv2"], given=Net(1).double())(images[:3], LABELS[:3])),
    ]
    for text, call in mistakes:
        with pytest.raises(kdx.KdxError, match=text):
            call()
    with pytest.raises(TypeError, match="list of modules"):
        GradCAM(model, model.conv2)  # type: ignore[arg-type]


def test_pictures_refuse_what_is_not_in_the_unit_range() -> None:
    image, mask = np.full((4, 3, 3), 0.5), np.full((4, 3), 0.25)
    for picture, map_, options in (
        (image * 300, mask, {}),
        (image, mask * 5, {}),
        (image, mask.T, {}),
        (image, mask * np.nan, {}),
        (image, mask, {"image_weight": 1.5}),
        (image, mask, {"colormap": "nonsense"}),
        (image, mask, {"colormap": 77}),
    ):
        with pytest.raises(kdx.KdxError):
            show_cam_on_image(picture, map_, **options)
    assert np.array_equal(show_cam_on_image(image, mask, image_weight=1), np.full((4, 3, 3), 255))
    assert not show_cam_on_image(0 * image, mask, image_weight=1).any()


def test_unicam_has_the_argument_order_of_the_other_methods() -> None:
    orders = [list(inspect.signature(method).parameters)[:3] for method in (GradCAM, UniCAM)]
    assert orders[0] == orders[1] == ["model", "target_layers", "reshape_transform"]
    student, base = pair()
    with pytest.raises(TypeError):
        UniCAM(student, ["conv2"], None, base)  # type: ignore[call-arg]
