"""The cases of grad_cam.npz, and the script that writes it with the real package:

    pip install --target FOLDER --no-deps grad-cam ttach opencv-python-headless
    PYTHONPATH=FOLDER python -m tests.oracle.grad_cam

The tests do not need the package: it depends on OpenCV and on torchvision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tests.hooked import CLASSES, Blocks, Net, batch

MASK = np.arange(6 * 4).reshape(6, 4) % 3 == 0
COLOUR_MAPS = (2, 14, 16, 20)
"""OpenCV's jet, inferno, viridis and turbo."""

IMAGES = 4


class Segmenter(nn.Module):
    """Logits [n, classes, 6, 4] per position, and one input channel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(1, 6, 3, 2)
        self.head = nn.Conv2d(6, CLASSES, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.conv(images).tanh())
        return logits


def grid(tokens: Tensor) -> Tensor:
    """The patch tokens of `Blocks`."""
    patches: Tensor = tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 3))
    return patches


def difference(output: Tensor) -> Tensor:
    return 3 * output[4].exp() - output[2]


class Amplified(NamedTuple):
    """1e8 times a logit, because the package adds 1e-7 to the largest value of a map, and in Grad-CAM++ 1e-6 to squared gradients."""

    category: int

    def __call__(self, output: Tensor) -> Tensor:
        return 1e8 * output[self.category]


def region(output: Tensor) -> Tensor:
    return (output[1] * torch.from_numpy(MASK)).sum()


def steep_difference(output: Tensor) -> Tensor:
    return 1e8 * difference(output)


def steep_region(output: Tensor) -> Tensor:
    return 1e8 * region(output)


class Case(NamedTuple):
    method: str
    network: str
    layers: tuple[str, ...]
    targets: tuple[Any, ...] | None
    """Per image a class or a function of the output; None for the predicted classes."""
    options: dict[str, bool] = {}  # noqa: RUF012 - a tuple of constants
    reshape_transform: Callable[[Tensor], Tensor] | None = None


def cases() -> Iterator[tuple[str, Case]]:
    classes = (0, 4, 2, 2)
    for method in ("GradCAM", "HiResCAM", "LayerCAM", "GradCAMPlusPlus"):
        # Grad-CAM++ depends on the unit of the target, and the package adds 1e-6 to a square of gradients.
        steep = method == "GradCAMPlusPlus"
        plain = tuple(map(Amplified, classes)) if steep else classes
        yield f"{method}/predicted", Case(method, "conv", ("conv2",), plain if steep else None)
        yield f"{method}/classes", Case(method, "conv", ("conv2",), plain)
        yield f"{method}/function", Case(method, "conv", ("conv3",), (steep_difference if steep else difference,) * IMAGES)
        yield f"{method}/layers", Case(method, "conv", ("conv3", "conv1", "conv2"), tuple(map(Amplified, classes)))
        yield f"{method}/augmented", Case(method, "conv", ("conv2", "conv3"), tuple(map(Amplified, classes)), {"aug_smooth": True})
        yield f"{method}/tokens", Case(method, "tokens", ("first",), plain, {}, grid)
        yield f"{method}/regions", Case(method, "segmenter", ("conv",), (steep_region if steep else region,) * IMAGES)
        yield f"{method}/eigen", Case(method, "conv", ("conv2",), plain, {"eigen_smooth": True})


def networks(weights: dict[str, Any]) -> dict[str, nn.Module]:
    """The networks in float64, with these weights (NETWORK/PARAMETER) if there are any."""
    built = {"conv": Net().double().eval(), "tokens": Blocks().double().eval(), "segmenter": Segmenter().double().eval()}
    for name, network in built.items():
        state = {key.removeprefix(f"{name}/"): torch.from_numpy(value) for key, value in weights.items() if key.startswith(f"{name}/")}
        if state:
            network.load_state_dict(state)
    return built


def images_of(network: str) -> Tensor:
    images = batch(IMAGES) - 0.5
    return images[:, :1] if network == "segmenter" else images


def _write() -> None:
    import_module("tests.conftest")  # it registers the operators that torchvision misses on some builds of PyTorch
    import pytorch_grad_cam as package
    from pytorch_grad_cam.utils.image import show_cam_on_image
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    built = networks({})
    content: dict[str, Any] = {f"weights/{name}/{key}": value for name, net in built.items() for key, value in net.state_dict().items()}
    decompose: Any = np.linalg.svd

    def negated(*arguments: Any, **options: Any) -> Any:
        left, values, right = decompose(*arguments, **options)
        return -left, values, -right

    for name, case in cases():
        network = built[case.network]
        layers = [network.get_submodule(layer) for layer in case.layers]
        targets = case.targets and [target if callable(target) else ClassifierOutputTarget(target) for target in case.targets]

        def maps(case: Case = case, network: nn.Module = network, layers: Any = layers, targets: Any = targets) -> Any:
            with getattr(package, case.method)(network, layers, case.reshape_transform) as cam:
                return cam(input_tensor=images_of(case.network), targets=targets, **case.options)

        content[f"maps/{name}"] = maps()
        if case.options.get("eigen_smooth"):  # the sign of a principal component is arbitrary, so the other one is an answer too
            np.linalg.svd = negated
            content[f"maps/{name}_negated"] = maps()
            np.linalg.svd = decompose
    image = batch(1, torch.float32)[0].permute(1, 2, 0).numpy()
    content |= {"picture/image": image, "picture/mask": content["maps/GradCAM/classes"][0]}
    for number in COLOUR_MAPS:
        for rgb in (False, True):
            content[f"picture/{number}/{rgb}"] = show_cam_on_image(image, content["picture/mask"], rgb, number, 0.4)
    np.savez_compressed(Path(__file__).with_name("grad_cam.npz"), **content)


if __name__ == "__main__":
    _write()
