"""The layout of a layer's output: the one that the user states, else the one that its library states, else the one that a probe shows.

A layout that none of them gives is an error. The decision is made once per network, layer and image size.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from kdx.errors import KdxError
from kdx.export import library_layouts
from kdx.export.layer_names import find_layer, parse_layer
from kdx.export.probe import Probe
from kdx.features.layout import SYNTAX, Grid, Layout, channels_first
from kdx.kernels import ambient


@dataclass(frozen=True)
class DecidedLayout:
    """A layout, and how it is known: ``stated``, ``convolutions``, a library's name, or ``probe``."""

    layout: Layout
    source: str


Decisions = dict[tuple[str, Grid], DecidedLayout]
"""By layer and size of the network's images."""

_decisions: weakref.WeakKeyDictionary[nn.Module, Decisions] = weakref.WeakKeyDictionary()
"""A copy shares the decisions of its original, so that every call with one network decides once."""


def decisions_of(network: nn.Module) -> Decisions:
    """The decisions about a network's layers, to which the caller adds."""
    return _decisions.setdefault(network, {})


def share_decisions(network: nn.Module, duplicate: nn.Module) -> None:
    """Let a copy of a network share the decisions about it."""
    _decisions[duplicate] = decisions_of(network)


class Decider:
    """Decides on the layouts of one network's layers for one size of images, with one probe.

    run: images [m, 3, h, w] of that size, in [0, 1] -> each watched layer's raw output.
    """

    def __init__(self, network: nn.Module, run: Callable[[Tensor], Mapping[str, object]], image_size: Grid, like: Tensor) -> None:
        self._network = network
        self._run = run
        self._size = image_size
        self._like = like
        self._grids: list[Grid] = []
        self._observed = False

    def decide(self, layer: str, raw: object, images: int) -> DecidedLayout:
        """The layout of an output ``raw`` for this number of images. Raises KdxError if it is not known."""
        feature = checked_feature(raw, layer)
        shape, name = tuple(feature.shape), parse_layer(layer)
        module = find_layer(self._network, layer)
        if name.layout is not None:
            layout = name.layout.layout(layer, shape, self._size)
            check_rows(layout, shape, layer, images)
            return DecidedLayout(layout, "stated")
        if library_layouts.latents(self._network, name.path):
            raise KdxError(
                f"Layer {layer!r} has no positions in the image: its output {list(shape)} contains latents that attend to the whole image.",
                "Choose a layer before the latents, or a network whose layers have positions.",
            )
        if shape[0] == images:
            layout_or_none = library_layouts.convolutional(self._network, module, shape, self._size) if name.index is None else None
            if layout_or_none is not None:
                return DecidedLayout(layout_or_none, "convolutions")
            known = library_layouts.library(self._network, name.path, shape, self._size)
            if known is not None:
                return DecidedLayout(*known)
        return self._probed(layer, module, shape, images)

    def _probed(self, layer: str, module: nn.Module, shape: tuple[int, ...], images: int) -> DecidedLayout:
        try:
            sample, rows = self._probe.sample(layer), self._probe.rows_axis(layer)
        except KdxError as error:
            raise _unknown(layer, shape, images, f"it takes no three images of {_text(self._size)}: {error.problem}") from error
        is_finite = isinstance(sample, Tensor) and bool(sample.isfinite().all())
        # A ReLU that is 0 for the probe's images hides the rows of a block of convolutions.
        is_map = shape[0] == images and library_layouts.usually_convolutional(self._network, module, shape, self._size)
        if rows is None and is_finite and not is_map:
            raise _no_rows(layer, sample)
        layout = self._probe.layout(layer, self._grids) if is_finite else None
        if layout is None and is_map:
            return DecidedLayout(channels_first(shape), "convolutions")
        if not is_finite:
            raise _unknown(layer, shape, images, "it contains values that are not finite")
        if layout is None or not layout.fits(shape):
            raise _unknown(layer, shape, images, "a change of its images does not show where its positions are")
        check_rows(layout, shape, layer, images)
        return DecidedLayout(layout, "probe")

    @functools.cached_property
    def _probe(self) -> Probe:
        return Probe(self._pass, self._size, self._like)

    def _pass(self, images: Tensor) -> Mapping[str, object]:
        """A pass in eval mode without gradients. The first one also collects the sizes of the network's feature maps."""
        with ambient.neutral(), eval_mode(self._network):
            if self._observed:
                return self._run(images)
            self._observed = True
            with _sizes_of_convolutions(self._network, self._grids):
                return self._run(images)


def checked_feature(raw: object, layer: str) -> Tensor:
    """A layer's raw output if it is one floating-point tensor with rows. Raises KdxError otherwise."""
    if isinstance(raw, Tensor) and raw.is_floating_point() and raw.ndim >= 2:
        return raw
    kind = f"a tensor {list(raw.shape)}" if isinstance(raw, Tensor) else type(raw).__name__
    hint = "Choose a layer whose output is one floating-point tensor [n, C, H, W], tokens [n, L, C] or a vector [n, C]."
    if isinstance(raw, list | tuple) and len(raw) > 1:
        hint = f"Name one of its {len(raw)} outputs, such as {layer}[0]."
    raise KdxError(f"The output of layer {layer!r} is {kind}, not one feature map.", hint)


def check_rows(layout: Layout, shape: tuple[int, ...], layer: str, images: int) -> None:
    """Raise KdxError unless an output of this shape has one row per image."""
    if shape[layout.rows] != images:
        raise KdxError(
            f"Layer {layer!r} returns {shape[layout.rows]} rows for {images} images: its output is {list(shape)}.",
            "Choose a layer with one row per image, such as the block around it.",
        )


def _no_rows(layer: str, sample: object) -> KdxError:
    assert isinstance(sample, Tensor)
    shape = list(sample.shape)
    if shape[0] > 3 and shape[0] % 3 == 0:
        return KdxError(
            f"Layer {layer!r} returns {shape[0]} rows for 3 images: its output is {shape}.",
            "Choose a layer with one row per image, such as the block around the attention windows.",
        )
    return KdxError(
        f"The output {shape} of layer {layer!r} for 3 images has no axis along which the images differ.",
        "Choose a layer whose output has one row per image and depends on the image.",
    )


def _unknown(layer: str, shape: tuple[int, ...], images: int, reason: str) -> KdxError:
    name = parse_layer(layer)
    bare = name.path if name.index is None else f"{name.path}[{name.index}]"
    return KdxError(
        f"The layout of layer {layer!r} is not known: its output for {images} images is {list(shape)}, and {reason}.",
        f"State it after the layer's name, as in {bare}:tokens(prefix=1,grid=14x14). Layouts are {SYNTAX}.",
    )


def _text(grid: Grid) -> str:
    return f"{grid[0]} x {grid[1]}"


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Eval mode, without calling the network's own ``train`` or ``eval``, which users override."""
    modes = {module: module.training for module in network.modules()}
    for module in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _sizes_of_convolutions(network: nn.Module, grids: list[Grid]) -> Iterator[None]:
    """Collect the sizes of the feature maps that convolutions return during a pass: tokens are often made from such maps."""

    def observe(_module: nn.Module, _inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and math.prod(output.shape[2:]) > 1:
            grid = output.shape[2], output.shape[3]
            if grid not in grids:
                grids.append(grid)

    hooks = [module.register_forward_hook(observe) for module in network.modules() if isinstance(module, nn.Conv2d)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
