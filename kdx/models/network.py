"""A network with its preprocessing, loaded from a reference or taken from an object."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from kdx.choices import COVER, Resizing
from kdx.errors import KdxError
from kdx.export.copies import to_eval_mode
from kdx.export.graphs import Preprocessing
from kdx.export.outputs import CLASS_COUNT, LOGITS_OUTPUT
from kdx.kernels import ambient
from kdx.models.checkpoint_files import recorded_preprocessing
from kdx.models.feature_layers import sensible_layers
from kdx.models.prepared import check_kind, prepared, unwrapped
from kdx.models.reference import LOGITS, NEW_HEAD, ModelReference, parse_reference
from kdx.models.sources import build, timm_preprocessing
from kdx.models.weights import load_weights, split_key

INITIALISED = ("timm", "torchvision", "kdx", "hf")
"""The sources whose architectures kdx can build with random weights."""


@dataclass(frozen=True)
class Network:
    """A network in eval mode, with the preprocessing that it applies to images in [0, 1]."""

    reference: str
    module: nn.Module
    preprocessing: Preprocessing
    trained: bool = True
    """False if weights are random: the reference names none, or the checkpoint's head is for other classes."""
    note: str = field(default="", compare=False)
    """One line about choices that were made in the weights file (`kdx.models.load_weights`); "" if there were none."""
    resizing: Resizing = field(default=COVER, compare=False)
    """How pictures are brought to the network's size: as the models file states, which recorded it in training."""

    @property
    def weights_hash(self) -> str:
        """``weights_hash(module)`` of the current weights."""
        return weights_hash(self.module)

    @property
    def parameters(self) -> int:
        """The number of parameters."""
        return sum(parameter.numel() for parameter in self.module.parameters())


def weights_hash(module: nn.Module) -> str:
    """The SHA-256, in hexadecimal, of the name, type, shape and bytes of every parameter and buffer, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@ambient.neutral()
def load(reference: str, *, classes: int | None = None, folder: Path | None = None) -> Network:
    """The network that a model reference names, in eval mode.

    ``timm:NAME`` and ``torchvision:NAME`` have random weights unless the reference contains ``pretrained=true`` or ends in
    ``@weights``. ``kdx:resnet`` is the residual network that comes with kdx. In ``package.module:factory`` the factory is any callable
    that returns an ``nn.Module``, from an installed package or the current folder. ``hf:NAME`` is an image classifier of Hugging Face
    transformers, by its name on the hub or its folder (``hf:./folder``), with its weights unless the reference contains
    ``pretrained=false``. The path of a ``.pt2`` file names a program that ``torch.export.save`` wrote. Weights are ``.safetensors``, or
    ``.pt``, ``.pth``, ``.ckpt``, ``.tar`` and ``.bin`` (read with weights_only), and ``@file#KEY`` names an entry of the file
    (`kdx.models.load_weights`). ``new_head=true`` leaves the last layer random if the file does not have it for these classes.
    ``logits=1`` and ``logits=pred`` state which of several outputs of the network is the logits, by place or by name;
    `kdx.export.outputs.logits_of` recognises most without it. Paths are relative to ``folder``, by default the current folder.
    ``classes`` is the number of classes if the reference does not set it; a user's factory and a program do not receive it.

    The preprocessing is the configuration's for timm, ImageNet's for torchvision, 32 x 32 with mean and deviation 0.5 for kdx, that of
    preprocessor_config.json for hf, and only the image size for a program. A factory's module may carry a ``Preprocessing`` as its
    attribute ``preprocessing``; otherwise the preprocessing does nothing. Weights that ``kdx distill`` trained have the preprocessing of
    their training.

    Raises KdxError for a reference that is malformed or names nothing, for arguments the model does not take, and for
    weights that are missing, unreadable, or belong to another network.
    """
    parsed = parse_reference(reference)
    if classes is not None:
        parsed = parsed.with_classes(classes)
    arguments = dict(parsed.arguments)
    new_head = parsed.has_new_head
    arguments.pop(NEW_HEAD, None)
    logits = arguments.pop(LOGITS, None)
    if new_head and not parsed.weights:
        raise KdxError(f"{reference!r} asks for a new head and names no weights file.", "Add @ and the file, or leave new_head out.")
    if parsed.weights:
        arguments.pop("pretrained", None)  # the weights file replaces them immediately
    module, preprocessing, complete = build(parsed.located(folder), arguments)
    module = unwrapped(module)
    check_kind(module)
    for attribute, value in ((LOGITS_OUTPUT, logits), (CLASS_COUNT, classes)):
        if value is not None:
            setattr(module, attribute, value)
    note = ""
    if parsed.weights:
        path = (folder or Path()) / Path(parsed.weights).expanduser()
        note = load_weights(module, path, new_head=new_head)
        preprocessing = recorded_preprocessing(split_key(path)[0]) or preprocessing
        complete = not new_head
    to_eval_mode(module)
    return Network(str(parsed), module, preprocessing, parsed.is_trained and complete, note)


def check_initialised(reference: ModelReference) -> None:
    """Raise KdxError for a reference whose architecture kdx cannot build with random weights."""
    if reference.source not in INITIALISED:
        raise KdxError(
            f"How {str(reference)!r} initialises its weights is not known.",
            "Give a network with random weights yourself: kdx.Explainer(random=...).",
        )


def untrained(reference: str, *, seed: int = 0, classes: int | None = None, folder: Path | None = None) -> Network:
    """The network that a model reference names with random weights instead of its own, as its library initialises them.

    seed: of the weights; PyTorch's random state is unchanged. classes, folder: as in `load`. Raises KdxError for a program (.pt2) and for
    a function of the user, whose initialisation kdx does not know, and for what `load` refuses.

    >>> import kdx
    >>> kdx.models.untrained("kdx:resnet,width=4,depth=1,classes=5@student.safetensors", seed=1).trained
    False
    """
    parsed = parse_reference(reference)
    check_initialised(parsed)
    architecture = parsed.with_weights(None)
    if parsed.source == "hf":
        architecture = replace(architecture, arguments={**architecture.arguments, "pretrained": False})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return load(str(architecture), classes=classes, folder=folder)


def layers(model: nn.Module | Network, size: tuple[int, int] | None = None) -> list[str]:
    """`kdx.models.feature_layers.sensible_layers` of a network, on an image of ``size``, by default the network's own or 224 x 224."""
    if isinstance(model, Network):
        return sensible_layers(unwrapped(model.module), size or model.preprocessing.size or (224, 224))
    return sensible_layers(prepared(model), size or _own_size(unwrapped(model)) or (224, 224))


def _own_size(module: nn.Module) -> tuple[int, int] | None:
    preprocessing = getattr(module, "preprocessing", None)
    if isinstance(preprocessing, Preprocessing):
        return preprocessing.size
    return timm_preprocessing(module).size if hasattr(module, "pretrained_cfg") else None
