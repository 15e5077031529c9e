"""The networks whose layers are compared: each reference once, with all layers in one pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kdx.errors import KdxError
from kdx.explain.network_set import NetworkRecord
from kdx.explain.networks import NetworkRunners
from kdx.explain.settings import Settings
from kdx.models.feature_layers import sensible_layers
from kdx.models.layer_pairs import LayerNames
from kdx.models.models_file import load_any
from kdx.models.network import Network
from kdx.runtimes.choice import is_file

Size = tuple[int, int]

DEFAULT_SIZE: Size = (224, 224)
"""The size of the images where neither a network nor the user states one, as in `kdx layers`."""

_ROLE = "student"
"""`NetworkRunners` runs roles; each network here is the only one of its runners."""


@dataclass(frozen=True)
class Compared:
    """A network that is compared, ``A``, ``B`` or ``C``: its reference and its layers. A network that plays two parts runs once."""

    name: str
    reference: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Opened:
    """A network that runs: its reference, all its layers that are compared, and its runners."""

    reference: str
    layers: tuple[str, ...]
    runners: NetworkRunners


class ComparedNetworks:
    """The networks of a comparison, ready to run. A context manager.

    ``compared``: the networks by name. ``opened``: those that run, by the name that has the reference first.
    """

    def __init__(self, compared: Mapping[str, Compared], opened: Mapping[str, Opened], size: Size) -> None:
        self.compared, self.opened, self.size = dict(compared), dict(opened), size

    @classmethod
    def of(
        cls,
        references: Mapping[str, str],
        layers: Mapping[str, Sequence[str]],
        settings: Settings,
        folder: Path,
        *,
        most: int,
        image_size: int | None,
        announce: Callable[[str], None],
    ) -> ComparedNetworks:
        """Load each reference once. layers: by name, the layers to compare; by default at most ``most`` of those that `kdx layers` advises.

        Raises KdxError for references, sizes and layers that do not exist.
        """
        loaded: dict[str, Network | Path] = {}
        for name, reference in references.items():
            if reference not in loaded:
                with _about(name):
                    loaded[reference] = Path(reference) if is_file(reference) else _loaded(reference, image_size)
        sizes = [network.preprocessing.size for network in loaded.values() if isinstance(network, Network)]
        given = None if image_size is None else (image_size, image_size)
        size = given or max((size for size in sizes if size is not None), key=lambda size: size[0] * size[1], default=DEFAULT_SIZE)
        compared = {}
        for name, reference in references.items():
            with _about(name):
                chosen = tuple(dict.fromkeys(layers.get(name) or ())) or _advised(name, loaded[reference], size, most, announce)
            compared[name] = Compared(name, reference, chosen)
        opened: dict[str, Opened] = {}
        for name, one in compared.items():
            if one.reference in (other.reference for other in opened.values()):
                continue
            union = dict.fromkeys(layer for other in compared.values() if other.reference == one.reference for layer in other.layers)
            network = loaded[one.reference]
            if isinstance(network, Network):
                _announce_weights(name, network, announce)
            with _about(name):
                names = {layer: LayerNames(layer, layer, layer) for layer in union}
                opened[name] = Opened(one.reference, tuple(union), NetworkRunners({_ROLE: network}, names, settings, folder))
        file_sizes = [opened[name].runners.input_format.size for name in opened]
        size = max((size, *(other for other in file_sizes if other is not None)), key=lambda size: size[0] * size[1]) if not given else size
        return cls(compared, opened, size)

    def open(self, images: int, announce: Callable[[str], None]) -> None:
        """Start the runners for this number of images."""
        for name, network in self.opened.items():
            with _about(name):
                network.runners.open(self.size, images)
            announce(f"Runtime of {name}: {network.runners.choice.why}.")

    def features(self, images: Tensor) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """One pass of each network over images [n, 3, h, w] in [0, 1]: its logits, and per network its features by layer."""
        logits, features = {}, {}
        for name, network in self.opened.items():
            with _about(name):
                outputs, by_layer = network.runners.features(images)
            logits[name] = outputs[_ROLE]
            features[name] = {layer: by_role[_ROLE] for layer, by_role in by_layer.items()}
        return logits, features

    def runs_as(self, name: str) -> str:
        """The name in ``opened`` of the network ``name``."""
        return next(key for key, network in self.opened.items() if network.reference == self.compared[name].reference)

    @property
    def records(self) -> dict[str, NetworkRecord]:
        """What is known about each network that runs."""
        return {name: network.runners.networks()[_ROLE] for name, network in self.opened.items()}

    @property
    def device(self) -> torch.device:
        """The device of the features."""
        return next(iter(self.opened.values())).runners.choice.device

    def __enter__(self) -> ComparedNetworks:
        return self

    def __exit__(self, *_error: object) -> None:
        for network in self.opened.values():
            network.runners.close()


def _announce_weights(name: str, network: Network, announce: Callable[[str], None]) -> None:
    if network.note:
        announce(f"{name}: {network.note}")
    if not network.trained:
        announce(f"Warning: Some or all weights of {name} are random and differ from run to run: {network.reference}. Name a weights file.")


def _loaded(reference: str, image_size: int | None) -> Network:
    """The network of a reference. image_size: the side to which it then resizes images, in place of its own size."""
    network, _ = load_any(reference)
    if image_size is None:
        return network
    return replace(network, preprocessing=replace(network.preprocessing, size=(image_size, image_size)))


def _advised(name: str, network: Network | Path, size: Size, most: int, announce: Callable[[str], None]) -> tuple[str, ...]:
    """At most ``most`` of the layers that `kdx layers` advises, evenly spaced, with the last one; or the layers of a file."""
    from kdx.runtimes.choice import describe_file

    if isinstance(network, Path):
        return tuple(describe_file(network).layers)
    layers = sensible_layers(network.module, network.preprocessing.size or size)
    if not layers:
        raise KdxError("kdx finds no layer whose layout it knows.", f"Name layers with --layer-{name.lower()}.")
    if len(layers) <= most:
        return tuple(layers)
    places = np.linspace(0, len(layers) - 1, most).round().astype(int) if most > 1 else [len(layers) - 1]
    announce(
        f"{name} has {len(layers)} layers to compare; {most} of them, evenly spaced, are taken (--max-layers, --layer-{name.lower()})."
    )
    return tuple(layers[place] for place in dict.fromkeys(int(place) for place in places))


@contextmanager
def _about(name: str) -> Iterator[None]:
    """Put the name of the network before the problem of a KdxError, in place of the role that its runners give it."""
    try:
        yield
    except KdxError as error:
        error.problem = f"{name}: {error.problem.removeprefix(f'{_ROLE.capitalize()}: ')}"
        raise
