"""A network with its preprocessing, loaded from a reference or given as an object."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from kdx.export.graphs import Preprocessing
from kdx.models.feature_layers import sensible_layers
from kdx.models.reference import parse_reference
from kdx.models.sources import SOURCES, from_factory, timm_preprocessing
from kdx.models.weights import load_weights


@dataclass(frozen=True)
class Network:
    """A network in eval mode, with what it does to images in [0, 1] first."""

    reference: str
    module: nn.Module
    preprocessing: Preprocessing
    trained: bool = True
    """False where the reference leaves weights random, and where a checkpoint's head is of other classes."""

    @property
    def weights_hash(self) -> str:
        """``weights_hash(module)`` of the weights as they are now."""
        return weights_hash(self.module)

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters())


def weights_hash(module: nn.Module) -> str:
    """The SHA-256, in hexadecimal, of every parameter and buffer: name, type, shape and bytes, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load(reference: str, *, classes: int | None = None, folder: Path | None = None) -> Network:
    """The network that a model reference names, in eval mode.

    ``timm:NAME`` and ``torchvision:NAME`` have random weights unless the reference says ``pretrained=true`` or ends in
    ``@weights``; ``kdx:resnet`` is the residual network that comes with kdx; in ``package.module:factory`` the factory is
    any callable that returns an ``nn.Module``, from an installed package or the current folder. ``hf:NAME`` is an image classifier of
    Hugging Face transformers, by its name on the hub or its folder (``hf:./folder``), with its weights unless it says
    ``pretrained=false``; a path of a ``.pt2`` file is a program that ``torch.export.save`` wrote. Weights are
    ``.safetensors``, or ``.pt`` and ``.pth`` (read with weights_only). Paths are relative to ``folder`` or else to the current folder.
    ``classes`` is the number of classes where the reference does not say it; a factory of your own and a program are not told.

    Preprocessing: timm's as in its configuration; torchvision's is ImageNet's; kdx's is 32 x 32, mean and deviation 0.5;
    hf's as in its preprocessor_config.json; a program's is its size alone;
    a factory's module may carry a ``Preprocessing`` as its attribute ``preprocessing``, else nothing is done.

    Raises KdxError for a reference that is malformed or names nothing, for arguments the model does not take, and for
    weights that are missing, unreadable, or another network's.
    """
    parsed = parse_reference(reference)
    if classes is not None:
        parsed = parsed.with_classes(classes)
    build = SOURCES.get(parsed.source, from_factory)
    arguments = dict(parsed.arguments)
    if parsed.weights:
        arguments.pop("pretrained", None)  # its own weights replace them at once
    module, preprocessing, *complete = build(parsed.located(folder), arguments)
    if parsed.weights:
        path = Path(parsed.weights).expanduser()
        load_weights(module, path if folder is None else folder / path)
    return Network(str(parsed), module.eval(), preprocessing, parsed.is_trained and (bool(parsed.weights) or all(complete)))


def as_network(given: str | Path | Network | nn.Module) -> Network:
    """A network of the caller's own, in eval mode: a reference is loaded, and what is given as an object is copied, since its
    mode and device are its owner's. A bare module has no preprocessing."""
    if isinstance(given, nn.Module):
        given = Network(type(given).__name__, given, Preprocessing())
    if isinstance(given, Network):
        return replace(given, module=copy.deepcopy(given.module).eval())
    return load(str(given))


def layers(model: nn.Module | Network, size: tuple[int, int] | None = None) -> list[str]:
    """`kdx.layers.sensible_layers` of a network, on an image of ``size`` or else of the network's own, or 224 x 224."""
    if isinstance(model, Network):
        return sensible_layers(model.module, size or model.preprocessing.size or (224, 224))
    return sensible_layers(model, size or _own_size(model) or (224, 224))


def _own_size(module: nn.Module) -> tuple[int, int] | None:
    preprocessing = getattr(module, "preprocessing", None)
    if isinstance(preprocessing, Preprocessing):
        return preprocessing.size
    return timm_preprocessing(module).size if hasattr(module, "pretrained_cfg") else None
