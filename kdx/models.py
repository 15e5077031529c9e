"""Model references -> networks, and the layers worth explaining in one."""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import importlib
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kdx import hub, programs
from kdx.errors import KdxError, first_line, missing_package
from kdx.export.graphs import Preprocessing
from kdx.layers import sensible_layers

_GRAMMAR = (
    "Write SOURCE:NAME[,key=value,...][@weights], for example timm:resnet18,num_classes=10@student.safetensors, or a path of a .pt2 file."
)
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

T = TypeVar("T")
Value = bool | int | float | str | tuple[int, ...]


# ---- references ----


@dataclass(frozen=True)
class Reference:
    """A model reference taken apart; ``str`` puts it together again. The source of a program is ``pt2``, its name the path."""

    source: str
    name: str
    arguments: Mapping[str, Value] = field(default_factory=dict)
    weights: str | None = None

    def __str__(self) -> str:
        arguments = "".join(f",{key}={_written(value)}" for key, value in self.arguments.items())
        source = "" if self.source == "pt2" else f"{self.source}:"
        return f"{source}{self.name}{arguments}" + (f"@{self.weights}" if self.weights else "")

    @property
    def is_trained(self) -> bool:
        """Whether it names weights that exist: its own, a library's, a checkpoint's. A factory may have loaded some, and counts."""
        if self.source in ("timm", "torchvision", "kdx", "hf") and self.weights is None:
            return bool(self.arguments.get("pretrained", self.source == "hf"))
        return True

    def with_classes(self, classes: int) -> Reference:
        """The reference with its number of classes said, where its source has an argument for it and it does not say yet."""
        key = {"timm": "num_classes", "torchvision": "num_classes", "kdx": "classes", "hf": "num_labels"}.get(self.source)
        if key is None or key in self.arguments:
            return self
        return replace(self, arguments={**self.arguments, key: classes})

    def with_weights(self, weights: str | None) -> Reference:
        """The reference to the same architecture with other weights; nothing pretrained is fetched for it."""
        arguments = {key: value for key, value in self.arguments.items() if key != "pretrained"}
        return replace(self, arguments=arguments, weights=weights)

    def located(self, folder: Path | None = None) -> Reference:
        """The reference with the file or folder that it names written in full; ``folder`` (or else the current one) is where it starts."""
        path = (folder or Path()) / Path(self.name).expanduser()
        if self.source == "pt2" or (self.source == "hf" and (self.name.startswith((".", "/", "~")) or path.is_dir())):
            return replace(self, name=str(path.resolve()))
        return self


def parse_reference(reference: str) -> Reference:
    """``SOURCE:NAME[,key=value,...][@weights]``, or a path that ends in .pt2, taken apart; KdxError when it is neither.

    Values are read as true or false, int, float, whole numbers joined by hyphens (``3-4-6-3``, a tuple), or text.
    """
    head, _, weights = reference.strip().partition("@")
    if head.endswith(".pt2"):
        return Reference("pt2", head, {}, weights or None)
    source, colon, rest = head.partition(":")
    name, *pairs = (part.strip() for part in rest.split(","))
    if not (source and colon and name) or (not weights and reference.rstrip().endswith("@")):
        raise KdxError(f"{reference!r} is not a model reference.", _GRAMMAR)
    arguments: dict[str, Value] = {}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not key.isidentifier() or not value or key in arguments:
            raise KdxError(f"{pair!r} in the model reference {reference!r} is not one more key=value.", _GRAMMAR)
        arguments[key] = _read(value)
    return Reference(source, name, arguments, weights or None)


def _read(text: str) -> Value:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"\d+(-\d+)+", text):
        return tuple(int(part) for part in text.split("-"))
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _written(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


# ---- networks ----


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
    build = _SOURCES.get(parsed.source, _from_factory)
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


def _construct(reference: Reference, factory: Callable[..., Any], arguments: Mapping[str, Value], mend: str) -> nn.Module:
    try:
        module = factory(**arguments)
    except KdxError:
        raise
    except Exception as error:  # anything can go wrong in another package's or the user's code; the cause stays attached
        raise KdxError(f"{reference.source}:{reference.name} could not be built: {first_line(error)}.", mend) from error
    if not isinstance(module, nn.Module):
        kind = type(module).__name__
        raise KdxError(
            f"{reference.source}:{reference.name} gives a {kind}, not a torch.nn.Module.", "Name a factory that returns the network."
        )
    return module


def _from_timm(reference: Reference, arguments: dict[str, Value]) -> tuple[nn.Module, Preprocessing]:
    try:
        import timm
    except ImportError as error:
        raise missing_package("timm", "models", f"The model reference {str(reference)!r}") from error
    if not timm.is_model(reference.name):
        raise _unknown("timm", reference.name, timm.list_models())
    module = _construct(
        reference,
        lambda **extra: timm.create_model(reference.name, **{"pretrained": False, **extra}),
        arguments,
        "Check the arguments against timm.create_model; pretrained=true needs the network or a warm cache.",
    )
    preprocessing = _timm_preprocessing(module)
    side = arguments.get("img_size")  # which the pretrained configuration does not know of
    return module, replace(preprocessing, size=(side, side)) if isinstance(side, int) else preprocessing


def _timm_preprocessing(module: nn.Module) -> Preprocessing:
    config = getattr(module, "pretrained_cfg", {})
    _, height, width = config.get("input_size", (3, 224, 224))
    return Preprocessing((height, width), tuple(config.get("mean", _IMAGENET[0])), tuple(config.get("std", _IMAGENET[1])))


def _from_torchvision(reference: Reference, arguments: dict[str, Value]) -> tuple[nn.Module, Preprocessing]:
    try:
        from torchvision import models
    except ImportError as error:
        raise missing_package("torchvision", "models", f"The model reference {str(reference)!r}") from error
    names = models.list_models(module=models)  # the classifiers: detectors and the like are in modules below
    if reference.name not in names:
        raise _unknown("torchvision", reference.name, names)
    weights = "DEFAULT" if arguments.pop("pretrained", False) else None
    if reference.name in ("inception_v3", "googlenet"):
        arguments.setdefault("init_weights", weights is None)
    module = _construct(
        reference,
        lambda **extra: models.get_model(reference.name, weights=weights, **extra),
        arguments,
        "Check the arguments against torchvision.models; pretrained=true needs the network or a warm cache, and keeps the classes.",
    )
    size = 299 if reference.name == "inception_v3" else 224
    return module, Preprocessing((size, size), *_IMAGENET)


def _from_kdx(reference: Reference, arguments: dict[str, Value]) -> tuple[nn.Module, Preprocessing]:
    from kdx import networks

    if reference.name != "resnet":
        raise _unknown("kdx", reference.name, ["resnet"])
    module = _construct(reference, networks.resnet, arguments, "It takes width, depth, classes, stages, block and stem.")
    return module, Preprocessing((32, 32), *_HALF)


def _from_factory(reference: Reference, arguments: dict[str, Value]) -> tuple[nn.Module, Preprocessing]:
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
    sources = ", ".join(source for source in _SOURCES if source != "pt2")
    try:
        module = importlib.import_module(reference.source)
    except ModuleNotFoundError as error:
        if error.name and not (reference.source == error.name or reference.source.startswith(f"{error.name}.")):
            raise KdxError(f"Importing {reference.source!r} failed: it needs {error.name!r}.", f"Install {error.name}.") from error
        near = difflib.get_close_matches(reference.source, _SOURCES, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise KdxError(
            f"{reference.source!r} is neither a source of models nor a module that can be imported.",
            f"{hint}Use one of {sources}, or a module from an installed package or the current folder.",
        ) from error
    except Exception as error:  # the user's own module runs here
        raise KdxError(f"Importing {reference.source!r} failed: {first_line(error)}.", "Mend the module; python -m shows where.") from error
    factory = getattr(module, reference.name, None)
    if not callable(factory):
        raise _unknown(reference.source, reference.name, [name for name, value in vars(module).items() if callable(value)])
    network = _construct(reference, factory, arguments, "Give the factory arguments that it takes.")
    preprocessing = getattr(network, "preprocessing", None)
    return network, preprocessing if isinstance(preprocessing, Preprocessing) else Preprocessing()


def _from_hub(reference: Reference, arguments: dict[str, Value]) -> tuple[nn.Module, Preprocessing, bool]:
    pretrained = bool(arguments.pop("pretrained", reference.weights is None))
    return hub.load_classifier(reference.name, arguments, pretrained=pretrained)


def _from_program(reference: Reference, _arguments: dict[str, Value]) -> tuple[nn.Module, Preprocessing]:
    return programs.load_program(Path(reference.name))


_SOURCES: dict[str, Callable[[Reference, dict[str, Value]], tuple[nn.Module, Preprocessing] | tuple[nn.Module, Preprocessing, bool]]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "kdx": _from_kdx,
    "hf": _from_hub,
    "pt2": _from_program,
}


def _unknown(source: str, name: str, names: Sequence[str]) -> KdxError:
    near = difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    return KdxError(f"{source} has no model {name!r}.", f"Near matches: {', '.join(near)}." if near else "Check the name and its spelling.")


# ---- weights ----


def load_weights(module: nn.Module, path: Path) -> None:
    """Copy a weights file into ``module``; KdxError when it is missing, unreadable, or another network's."""
    loaded = _read_weights(path)
    expected = module.state_dict()
    # Files from before BatchNorm counted its batches lack the counters, which no prediction uses.
    missing = [name for name in expected if name not in loaded and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in loaded if name not in expected]
    differing = [
        f"{name} is {list(loaded[name].shape)} in the file and {list(tensor.shape)} in the network"
        for name, tensor in expected.items()
        if name in loaded and loaded[name].shape != tensor.shape
    ]
    faults = [_some("it lacks", missing), _some("it has beside them", unexpected), _some("shapes differ:", differing)]
    if any(faults):
        raise KdxError(
            f"{path} does not hold this network's weights: {'; '.join(filter(None, faults))}.",
            "Name the architecture the weights were saved from, with its arguments (such as the number of classes).",
        )
    module.load_state_dict(loaded, strict=False)


def _some(heading: str, items: Sequence[str], count: int = 3) -> str:
    if not items:
        return ""
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return f"{heading} {', '.join(items[:count])}{more}"


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise KdxError(f"{path.name!r} is not a kind of weights file that kdx reads.", "Give a .safetensors, .pt or .pth file.")
    if not path.is_file():
        raise KdxError(
            f"There is no weights file {path}.", "Check the path after the @; it is relative to the models file, or to the current folder."
        )
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not loaded or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise KdxError(
            f"{path} does not hold a state dict.", "Save the network's state_dict(), by itself or under the key state_dict or model."
        )
    parallel = all(name.startswith("module.") for name in loaded)  # saved from inside DataParallel
    return {name.removeprefix("module.") if parallel else name: value for name, value in loaded.items()}


def _read_safetensors(path: Path) -> Any:
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise KdxError(
            f"{path} cannot be read: {first_line(error)}.", "The file is damaged or not safetensors; copy or save it again."
        ) from error


def _read_torch(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise KdxError(
            f"{path} cannot be read as tensors: {first_line(error)}.",
            "Save only the state dict (kdx unpickles nothing), or copy the file again if it is damaged.",
        ) from error


def file_name(reference: str) -> str:
    """A name for files made from a model: ``timm:resnet18,num_classes=10@runs/s.safetensors`` -> ``resnet18-s``."""
    parsed = parse_reference(reference)
    name = {"pt2": Path(parsed.name).stem, "hf": Path(parsed.name).name}.get(parsed.source, parsed.name)
    if parsed.weights is not None:
        name = f"{name}-{Path(parsed.weights).stem}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"


def layers(model: nn.Module | Network, size: tuple[int, int] | None = None) -> list[str]:
    """`kdx.layers.sensible_layers` of a network, on an image of ``size`` or else of the network's own, or 224 x 224."""
    if isinstance(model, Network):
        return sensible_layers(model.module, size or model.preprocessing.size or (224, 224))
    return sensible_layers(model, size or _own_size(model) or (224, 224))


def _own_size(module: nn.Module) -> tuple[int, int] | None:
    preprocessing = getattr(module, "preprocessing", None)
    if isinstance(preprocessing, Preprocessing):
        return preprocessing.size
    return _timm_preprocessing(module).size if hasattr(module, "pretrained_cfg") else None
