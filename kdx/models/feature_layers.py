"""The layers of a network that are worth explaining: the stages and blocks that one forward pass shows."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdx.errors import KdxError, first_line
from kdx.export import layouts
from kdx.export.copies import copied
from kdx.export.graphs import FeatureGraph, GradientGraph
from kdx.features.layout import Grid, has_aspect, possible_grids
from kdx.kernels import ambient

_STEM = 0.1
"""The share of the parameters below which a module that takes the image is a stem, with all that is inside it."""


def sensible_layers(module: nn.Module, size: tuple[int, int]) -> list[str]:
    """The layers worth explaining, in order of execution: names of layers whose output is a feature map.

    One forward pass of two random images of ``size`` (height, width) shows which modules return a map or tokens with more than one
    position. From the root's children down, a container is replaced by its children if its stages differ in resolution or if it contains
    more than 90 % of the parameters; a stage is not replaced. Stems, which take the image itself, are left out. So are bare convolutions
    and norms beside blocks, and layers of one weight before a block of their resolution, such as embeddings of patches. In a plain
    sequence of bare layers, the last one with parameters at each resolution remains. If one container is left that is a stack of blocks,
    its blocks replace it.

    A layer is left out if `kdx.export.layouts` does not know its layout or it does not have one row per image, and if no position has a
    gradient, as after the last block of a transformer whose head reads only the class token. Of a module with several outputs, the
    first that is a feature map and that it does not only pass on is named: ``name[0]``.

    Raises KdxError if the network does not run on such an image.
    """
    trace = _trace(module, size)
    return _usable(module, [trace.names[path] for path in _stages(module, trace)], size)


@dataclass(frozen=True)
class LayerDescription:
    """A layer for one size of images. feature: the shape (C, H, W) of its feature map; None if there is none. layout: that of its output.

    source: how the layout is known: ``stated``, ``convolutions``, a library's name, or ``probe``. advised: whether `sensible_layers` names
    the layer. problem: why it is not usable or not advised, or "".
    """

    name: str
    feature: tuple[int, int, int] | None
    layout: str
    source: str
    advised: bool
    problem: str


@ambient.neutral()
def described_layers(module: nn.Module, size: tuple[int, int], layers: Sequence[str] = ()) -> list[LayerDescription]:
    """The named layers; by default the stages and blocks of the network, also those that are not advised, in order of execution.

    Raises KdxError if the network does not run on an image of ``size``, if no stage or block has a map there, and for a layer that does not
    exist.
    """
    trace = _trace(module, size)
    stages = [trace.names[path] for path in _stages(module, trace)]
    if not (layers or stages):
        raise KdxError(
            f"The network has no stage or block with a map on images of {size[0]} x {size[1]}.", "Give larger images, or name a layer."
        )
    advised = _usable(module, stages, size)
    graph = FeatureGraph(module, layers or stages)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(graph.mean)
    with layouts.eval_mode(module):
        _, raw = graph.watch(images)
        return [_described(graph, layer, raw[layer], images, layer.partition(":")[0] in advised, layer in stages) for layer in graph.layers]


def _described(graph: FeatureGraph, layer: str, raw: object, images: Tensor, advised: bool, stage: bool) -> LayerDescription:
    try:
        channels, height, width = graph.as_map(raw, layer, images).shape[1:]
    except KdxError as error:
        return LayerDescription(layer, None, "", "", False, error.problem)
    decided = graph.decisions[layer, (images.shape[2], images.shape[3])]
    problem = "" if advised or not stage else "No position has a gradient."
    return LayerDescription(layer, (channels, height, width), str(decided.layout), decided.source, advised, problem)


def _stages(module: nn.Module, trace: _Trace) -> list[str]:
    """The paths of the stages and blocks that a pass shows."""
    total = sum(_count(child) for name, child in module.named_children() if _contains_map(trace, name))
    paths = [path for child, _ in module.named_children() for path in _expand(module, child, trace, total)]
    paths.sort(key=trace.order.__getitem__)
    blocks = [path for path in paths if not _is_bare(module.get_submodule(path))]
    if blocks:
        blocks = [path for path in blocks if path not in trace.stem] or blocks
        blocks = [path for path in blocks if not _is_part_of_another(module, path, blocks)]
        blocks = [path for place, path in enumerate(blocks) if not _prepares(module, path, blocks[place + 1 :], trace)]
        return _blocks_of(module, blocks[0], trace) if len(blocks) == 1 else blocks
    # Later entries of a dict replace earlier ones, so the last layer of each resolution remains.
    return sorted({trace.grid[path]: path for path in paths}.values(), key=trace.order.__getitem__)


def _is_part_of_another(module: nn.Module, path: str, layers: Sequence[str]) -> bool:
    """Whether one of the layers contains the module at this path as well: blocks may share a module that the network also registers."""
    shared = module.get_submodule(path)
    others = [other for other in map(module.get_submodule, layers) if other is not shared]
    return any(inner is shared for other in others for inner in other.modules())


def _prepares(module: nn.Module, path: str, later: Sequence[str], trace: _Trace) -> bool:
    """Whether a layer only prepares the features of a block that follows at its resolution.

    It has one weight, as an embedding of patches, a convolution that encodes positions, or a convolution between two stages.
    """
    if not _is_unit(module.get_submodule(path)):
        return False
    return any(trace.grid[block] == trace.grid[path] and not _is_unit(module.get_submodule(block)) for block in later)


def _blocks_of(module: nn.Module, path: str, trace: _Trace) -> list[str]:
    """The blocks of a stack, or the path itself if it is not a stack of blocks with one resolution."""
    children = [f"{path}.{name}" for name, _ in module.get_submodule(path).named_children()]
    blocks = [child for child in children if child in trace.grid and not _is_bare(module.get_submodule(child))]
    kinds = {type(module.get_submodule(child)) for child in blocks}
    return blocks if len(blocks) > 1 and len(kinds) == 1 and len(blocks) == len(children) else [path]


@ambient.neutral()
def _usable(module: nn.Module, layers: list[str], size: tuple[int, int]) -> list[str]:
    """Those of the layers whose layout is known, and at whose positions the logits have a gradient if they have one at any layer."""
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    with layouts.eval_mode(module):
        try:
            known = known_layers(FeatureGraph(module, layers), images)
        except KdxError:  # a part of a network, which returns no logits, has no gradients
            return layers
        return _with_gradient(module, known, images) or _with_gradient(_with_random_zeros(module), known, images) or known


def known_layers(graph: FeatureGraph, images: Tensor) -> list[str]:
    """The layers of a graph whose layout is known for images of this size."""
    images = images.to(graph.mean)
    _, raw = graph.watch(images)
    known = []
    with contextlib.suppress(KdxError):
        graph.decide(raw, images)  # of all layers with one probe
    for layer in graph.layers:
        with contextlib.suppress(KdxError):
            graph.as_map(raw[layer], layer, images)
            known.append(layer)
    return known


def _with_gradient(module: nn.Module, layers: list[str], images: Tensor) -> list[str]:
    """The layers of which some position has a gradient."""
    try:
        graph = GradientGraph(module, layers)
        images = images.to(graph.mean)
        cotangent = torch.rand(graph.cotangent_shape(images), generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        gradients = graph(images, cotangent.to(graph.mean))[-len(layers) :]
    except KdxError:  # one layer without a gradient is an error for all of them
        return [layer for one in layers for layer in _with_gradient(module, [one], images)] if len(layers) > 1 else []
    return [layer for layer, gradient in zip(layers, gradients, strict=True) if bool(gradient.any())]


def _with_random_zeros(module: nn.Module) -> nn.Module:
    """A copy with random weights in place of matrices of zeros: a head that starts at zero has no gradient before its training."""
    duplicate = copied(module)
    layouts.share_decisions(module, duplicate)
    generator = torch.Generator().manual_seed(0)
    for parameter in duplicate.parameters():
        if parameter.ndim > 1 and parameter.is_floating_point() and not bool(parameter.any()):
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).mul(0.02).to(parameter)
    return duplicate


@dataclass
class _Trace:
    """What one forward pass shows, by module path."""

    order: dict[str, int] = field(default_factory=dict)
    """The position of each module in the order in which modules first finished."""
    grid: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The resolution of each module whose output is a feature map."""
    stem: set[str] = field(default_factory=set)
    """The modules that took the image as input."""
    output: dict[str, Any] = field(default_factory=dict)
    """The last output of each module."""
    several: set[str] = field(default_factory=set)
    """The modules with several outputs that are feature maps."""
    names: dict[str, str] = field(default_factory=dict)
    """The name of the layer of each module whose output is a feature map: its path, with an index if the output has several parts."""


@ambient.neutral()
def _trace(module: nn.Module, size: tuple[int, int]) -> _Trace:
    trace = _Trace()
    like = next(
        (parameter.detach() for parameter in module.parameters() if parameter.is_floating_point()), torch.empty(0, dtype=torch.float32)
    )
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(like)
    hooks = [child.register_forward_hook(_observe(trace, name, images.shape)) for name, child in module.named_modules() if name]
    try:
        with layouts.eval_mode(module):
            module(images)
    except Exception as error:  # the network's own code runs here
        raise KdxError(
            f"The network does not run on an image of {size[0]} x {size[1]}: {first_line(error)}.", "Give the image size that it takes."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return trace


def _observe(trace: _Trace, path: str, images: torch.Size) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        trace.order.setdefault(path, len(trace.order))
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].ndim == 4 and inputs[0].shape[:2] == images[:2]:  # of any size
            trace.stem.add(path)
        parts = list(output) if isinstance(output, (tuple, list)) else [output]
        grids = [_possible_grid(part, images) for part in parts]
        computed = [place for place, part in enumerate(parts) if not any(part is taken for taken in inputs)]
        place = next((place for place in (*computed, *range(len(parts))) if grids[place] is not None), 0)
        only = sum(isinstance(part, Tensor) and part.is_floating_point() for part in parts) == 1
        trace.output[path] = parts[place] if only else output
        if sum(grid is not None for grid in grids) > 1:
            trace.several.add(path)
        if parts and (grid := grids[place]) is not None:
            trace.grid[path] = grid
            trace.names[path] = path if only else f"{path}[{place}]"

    return hook


def _possible_grid(output: Any, images: torch.Size) -> Grid | None:
    """The grid with the images' aspect ratio that an output of this shape may have, if it has more than one position.

    It may be a wrong one. `_usable` removes layers whose layout is not known.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point() or not 3 <= output.ndim <= 4:
        return None
    count, (height, width) = images[0], (images[2], images[3])
    shape = tuple(output.shape)
    if len(shape) == 4 and shape[0] == count:
        for grid in ((shape[2], shape[3]), (shape[1], shape[2])):
            if has_aspect(*grid, (height, width)):
                return grid if math.prod(grid) > 1 else None
    tokens = math.prod(shape[1:-1]) if shape[0] == count else shape[0] if shape[1] == count else 0
    return next(iter(possible_grids(tokens, (height, width))), None)


def _expand(root: nn.Module, name: str, trace: _Trace, total: int) -> Iterator[str]:
    """``name``, or the layers in it if it is a container of stages; nothing if it has no map or no parameter."""
    module = root.get_submodule(name)
    if not _count(module) or (name in trace.stem and _count(module) < _STEM * total):
        return
    children = [f"{name}.{child}" for child, _ in module.named_children()]
    inside = [child for child in children if child in trace.grid]
    composite = [child for child in inside if not _is_unit(root.get_submodule(child))]
    # The convolutions of one block may differ in resolution (a bottleneck's stride), so only whole stages or a plain sequence count.
    stages = inside if isinstance(module, nn.Sequential) and not composite else composite
    # Branches that are joined are not stages: the output of a container of stages is the output of its last stage.
    ends_with_stage = any(trace.output[child] is trace.output.get(name) for child in stages)
    differing = ends_with_stage and len({trace.grid[child] for child in stages}) > 1
    dominant = _count(module) > 0.9 * total and any(not _is_bare(root.get_submodule(child)) for child in children)
    if differing or dominant or _has_no_own_map(trace, name):
        yield from itertools.chain.from_iterable(_expand(root, child, trace, total) for child in children)
    elif name in trace.grid:
        yield name


def _contains_map(trace: _Trace, name: str) -> bool:
    """Whether the module or a module inside it returns a map. A backbone may return an object that contains its features."""
    return any(path == name or path.startswith(f"{name}.") for path in trace.grid)


def _has_no_own_map(trace: _Trace, name: str) -> bool:
    """Whether only modules inside it return features: a ModuleList does not run, and a backbone may return an object or a list of them.

    A block may also return several features itself: one per resolution, which no module inside it returns, or its last feature with another
    one of the same shape, such as that of its shortcut.
    """
    if name not in trace.order:
        return True
    output = trace.output[name]
    if isinstance(output, Tensor) or not _contains_map(trace, name):
        return False
    if name not in trace.several:
        return True
    inside = [result for path, result in trace.output.items() if path.startswith(f"{name}.") and path in trace.grid]
    returned = {id(part) for part in output if any(part is result for result in inside)}
    shapes = {part.shape[2:] for part in output if isinstance(part, Tensor)}
    return len(returned) > 1 or (len(returned) == 1 and len(shapes) > 1)


def _is_bare(module: nn.Module) -> bool:
    """Whether no child has parameters, as in a convolution or a norm (some contain their activation) and unlike a block."""
    return not any(_count(child) for child in module.children())


def _is_unit(module: nn.Module) -> bool:
    """Whether the module has at most one weight: a convolution with its norm and activation, so a part of a block and not a stage.

    A parameter for one image, such as a table of positions, is no weight.
    """
    return sum(parameter.ndim > 1 and len(parameter) > 1 for parameter in module.parameters()) < 2


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
