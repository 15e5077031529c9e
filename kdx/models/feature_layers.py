"""The layers worth explaining in a network."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdx.errors import KdxError, first_line
from kdx.export.graphs import as_map


def sensible_layers(module: nn.Module, size: tuple[int, int]) -> list[str]:
    """The layers worth explaining, in order of execution: dotted paths of modules whose output is a feature map.

    One forward pass of a random image of ``size`` shows which modules give a
    map [n, C, H, W] with H W > 1, or tokens [n, L, C] that are a grid. From the root's children down, a container is
    replaced by its children where the stages in it differ in resolution and where it holds over 90 % of the parameters;
    a stage is not. Stems, which take the image itself, are left out; so are bare convolutions and norms beside blocks.
    In a plain sequence of those, the last with parameters at each resolution stays.

    Raises KdxError when the network does not run on such an image.
    """
    trace = _run(module, size)
    total = sum(_count(child) for name, child in module.named_children() if _holds_map(trace, name))
    found = [name for child, _ in module.named_children() for name in _expand(module, child, trace, total)]
    found.sort(key=trace.order.__getitem__)
    blocks = [name for name in found if not _is_bare(module.get_submodule(name))]
    if blocks:
        return [name for name in blocks if name not in trace.stem] or blocks
    # The later entries of a dict replace the earlier: the last layer of each resolution.
    return sorted({trace.grid[name]: name for name in found}.values(), key=trace.order.__getitem__)


@dataclass
class _Trace:
    """What one forward pass showed, by module path."""

    order: dict[str, int] = field(default_factory=dict)
    """When each module that ran finished first."""
    grid: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The resolution of each module whose output is a feature map."""
    stem: set[str] = field(default_factory=set)
    """The modules that were given the image."""
    output: dict[str, Any] = field(default_factory=dict)
    """What each module gave last."""


def _run(module: nn.Module, size: tuple[int, int]) -> _Trace:
    trace = _Trace()
    like = next((parameter.detach() for parameter in module.parameters() if parameter.is_floating_point()), torch.empty(0))
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).to(like)
    modes = {child: child.training for child in module.modules()}
    hooks = [child.register_forward_hook(_observe(trace, name, image.shape)) for name, child in module.named_modules() if name]
    try:
        module.eval()
        with torch.no_grad():
            module(image)
    except Exception as error:  # the network's own code runs here
        raise KdxError(
            f"The network does not run on an image of {size[0]} x {size[1]}: {first_line(error)}.", "Give the size it takes."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for child, training in modes.items():
            child.training = training
    return trace


def _observe(trace: _Trace, name: str, image: torch.Size) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        output = _tensor_of(output)
        trace.order.setdefault(name, len(trace.order))
        trace.output[name] = output
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].shape == image:
            trace.stem.add(name)
        with contextlib.suppress(KdxError):
            height, width = as_map(output, name, (image[2], image[3])).shape[2:]
            if height * width > 1:
                trace.grid[name] = (height, width)

    return hook


def _tensor_of(output: Any) -> Any:
    """The one tensor in a tuple or list that has no other: an attention gives its weights, or None, beside its features."""
    tensors = [item for item in output if isinstance(item, Tensor)] if isinstance(output, (tuple, list)) else []
    return tensors[0] if len(tensors) == 1 else output


def _expand(root: nn.Module, name: str, trace: _Trace, total: int) -> Iterator[str]:
    """``name``, or where it is a container of stages, the layers in it; nothing where there is no map or parameter."""
    module = root.get_submodule(name)
    if not _count(module):
        return
    children = [f"{name}.{child}" for child, _ in module.named_children()]
    inside = [child for child in children if child in trace.grid]
    composite = [child for child in inside if not _is_unit(root.get_submodule(child))]
    # A block's own convolutions may differ in resolution (a bottleneck's stride); only whole stages, or a plain sequence, count.
    stages = inside if isinstance(module, nn.Sequential) and not composite else composite
    # Branches that are joined are no stages: a container of stages gives what the last one gave.
    ends = any(trace.output[child] is trace.output.get(name) for child in stages)
    differing = ends and len({trace.grid[child] for child in stages}) > 1
    dominant = _count(module) > 0.9 * total and any(not _is_bare(root.get_submodule(child)) for child in children)
    if differing or dominant or _only_holds(trace, name):
        yield from itertools.chain.from_iterable(_expand(root, child, trace, total) for child in children)
    elif name in trace.grid:
        yield name


def _holds_map(trace: _Trace, name: str) -> bool:
    """Whether a map comes from the module or from one in it: a backbone may give an object that holds its features."""
    return any(path == name or path.startswith(f"{name}.") for path in trace.grid)


def _only_holds(trace: _Trace, name: str) -> bool:
    """Whether features come from what is in the module only: a ModuleList does not run, a backbone may give an object."""
    return name not in trace.order or (_holds_map(trace, name) and not isinstance(trace.output[name], Tensor))


def _is_bare(module: nn.Module) -> bool:
    """Whether no parameter is in a module below: a convolution, a norm (some hold their activation), not a block."""
    return not any(_count(child) for child in module.children())


def _is_unit(module: nn.Module) -> bool:
    """Whether the module has one weight at most: a convolution with its norm and activation, a part of a block and no stage."""
    return sum(parameter.ndim > 1 for parameter in module.parameters()) < 2


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def parse_layers(names: Sequence[str]) -> dict[str, str]:
    """``layer`` or ``student_layer=teacher_layer`` -> the student's and base's layer to the teacher's.

    Raises KdxError for a layer without a name and for one that is named twice.
    """
    paired: dict[str, str] = {}
    for name in names:
        student, pairs, teacher = name.partition("=")
        if not student or (pairs and not teacher):
            raise KdxError(f"{name!r} is not a layer or a pair of layers.", "Write LAYER, or STUDENT_LAYER=TEACHER_LAYER.")
        if student in paired:
            raise KdxError(f"The layer {student!r} is named twice.", "Name each layer of the student once.")
        paired[student] = teacher or student
    return paired
