"""The sources of networks: timm, torchvision, Hugging Face, programs, kdx itself, and the user's own factories."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from kdx.errors import KdxError, first_line, import_optional
from kdx.export.graphs import Preprocessing
from kdx.models import exported_program, hugging_face, resnet
from kdx.models.reference import ModelReference, Value

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class SourceNetwork(NamedTuple):
    """A network as its source builds it."""

    module: nn.Module
    preprocessing: Preprocessing
    complete: bool = True
    """False if some weights are random although the source has a checkpoint: those of a head for other classes."""


def build(reference: ModelReference, arguments: dict[str, Value]) -> SourceNetwork:
    """Build the network that a reference names, with these arguments and without the reference's weights file.

    Raises KdxError for an unknown source or name, a missing package, and arguments that the model does not take.
    """
    return SOURCES.get(reference.source, _from_factory)(reference, arguments)


def _construct(reference: ModelReference, factory: Callable[..., Any], arguments: Mapping[str, Value], hint: str) -> nn.Module:
    try:
        module = factory(**arguments)
    except KdxError:
        raise
    except Exception as error:  # code of another package or of the user runs here; the cause stays attached
        raise KdxError(f"{reference.source}:{reference.name} could not be built: {first_line(error)}.", hint) from error
    if not isinstance(module, nn.Module):
        kind = type(module).__name__
        raise KdxError(
            f"{reference.source}:{reference.name} returns a {kind}, not a torch.nn.Module.", "Name a factory that returns the network."
        )
    return module


def _from_timm(reference: ModelReference, arguments: dict[str, Value]) -> SourceNetwork:
    timm = import_optional("timm", "models", f"The model reference {str(reference)!r}")
    if not timm.is_model(reference.name):
        raise _unknown("timm", reference.name, timm.list_models())
    module = _construct(
        reference,
        lambda **extra: timm.create_model(reference.name, **{"pretrained": False, **extra}),
        arguments,
        "Check the arguments against timm.create_model; pretrained=true needs an internet connection or a cache.",
    )
    preprocessing = timm_preprocessing(module)
    side = arguments.get("img_size")  # timm's configuration describes the pretrained size, not this argument
    size = (side, side) if isinstance(side, int) else side if isinstance(side, tuple) and len(side) == 2 else preprocessing.size
    # For other classes than those of the checkpoint, timm makes a new, random head.
    complete = not arguments.get("pretrained") or getattr(module, "num_classes", None) == getattr(module, "pretrained_cfg", {}).get(
        "num_classes"
    )
    return SourceNetwork(module, replace(preprocessing, size=size), complete)


def timm_preprocessing(module: nn.Module) -> Preprocessing:
    """The preprocessing in the configuration of a timm network; ImageNet's if it does not have one."""
    config = getattr(module, "pretrained_cfg", {})
    _, height, width = config.get("input_size", (3, 224, 224))
    return Preprocessing((height, width), tuple(config.get("mean", _IMAGENET[0])), tuple(config.get("std", _IMAGENET[1])))


def _from_torchvision(reference: ModelReference, arguments: dict[str, Value]) -> SourceNetwork:
    models = import_optional("torchvision.models", "models", f"The model reference {str(reference)!r}")
    names = models.list_models(module=models)  # the classifiers; detectors and others are in submodules
    if reference.name not in names:
        raise _unknown("torchvision", reference.name, names)
    weights = "DEFAULT" if arguments.pop("pretrained", False) else None
    if reference.name in ("inception_v3", "googlenet"):
        arguments.setdefault("init_weights", weights is None)
    module = _construct(
        reference,
        lambda **extra: models.get_model(reference.name, weights=weights, **extra),
        arguments,
        "Check the arguments against torchvision.models; pretrained=true keeps the classes and needs an internet connection or a cache.",
    )
    size = 299 if reference.name == "inception_v3" else 224
    return SourceNetwork(module, Preprocessing((size, size), *_IMAGENET))


def _from_kdx(reference: ModelReference, arguments: dict[str, Value]) -> SourceNetwork:
    if reference.name != "resnet":
        raise _unknown("kdx", reference.name, ["resnet"])
    module = _construct(reference, resnet.resnet, arguments, "It takes width, depth, classes, stages, block and stem.")
    return SourceNetwork(module, Preprocessing((32, 32), *_HALF))


def search_current_folder() -> None:
    """Let modules of the current folder be imported, as `python -m` does."""
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))


def _from_factory(reference: ModelReference, arguments: dict[str, Value]) -> SourceNetwork:
    search_current_folder()
    sources = ", ".join(source for source in SOURCES if source != "pt2")
    try:
        module = importlib.import_module(reference.source)
    except ModuleNotFoundError as error:
        if error.name and not (reference.source == error.name or reference.source.startswith(f"{error.name}.")):
            raise KdxError(f"Importing {reference.source!r} failed: it needs {error.name!r}.", f"Install {error.name}.") from error
        near = difflib.get_close_matches(reference.source, SOURCES, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise KdxError(
            f"{reference.source!r} is neither a source of models nor a module that can be imported.",
            f"{hint}Use one of {sources}, or a module from an installed package or the current folder.",
        ) from error
    except Exception as error:  # the user's own module runs here
        raise KdxError(
            f"Importing {reference.source!r} failed: {first_line(error)}.", "Fix the module; python -m shows where it fails."
        ) from error
    factory = getattr(module, reference.name, None)
    if not callable(factory):
        raise _unknown(reference.source, reference.name, [name for name, value in vars(module).items() if callable(value)])
    network = _construct(reference, factory, arguments, "Give the factory arguments that it takes.")
    preprocessing = getattr(network, "preprocessing", None)
    return SourceNetwork(network, preprocessing if isinstance(preprocessing, Preprocessing) else Preprocessing())


def _from_hub(reference: ModelReference, arguments: dict[str, Value]) -> SourceNetwork:
    pretrained = bool(arguments.pop("pretrained", reference.weights is None))
    return SourceNetwork(*hugging_face.load_classifier(reference.name, arguments, pretrained=pretrained))


def _from_program(reference: ModelReference, _arguments: dict[str, Value]) -> SourceNetwork:
    return SourceNetwork(*exported_program.load_program(Path(reference.name)))


SOURCES: dict[str, Callable[[ModelReference, dict[str, Value]], SourceNetwork]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "kdx": _from_kdx,
    "hf": _from_hub,
    "pt2": _from_program,
}


def _unknown(source: str, name: str, names: Sequence[str]) -> KdxError:
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    return KdxError(f"{source} has no model {name!r}.", f"Near matches: {', '.join(near)}." if near else "Check the spelling of the name.")
