"""The layers of a network that are worth explaining: the stages and blocks that one forward pass shows."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kdx.errors import KdxError, first_line
from kdx.export.graphs import as_map
from kdx.kernels import ambient


def sensible_layers(module: nn.Module, size: tuple[int, int]) -> list[str]:
    """The layers worth explaining, in order of execution: dotted paths of modules whose output is a feature map.

    One forward pass of a random image of ``size`` (height, width) shows which modules return a map [n, C, H, W] with H W > 1, or
    tokens [n, L, C] that form a grid. From the root's children down, a container is replaced by its children if its stages differ in
    resolution or if it contains more than 90 % of the parameters; a stage is not replaced. Stems, which take the image itself, are
    left out, and so are bare convolutions and norms beside blocks. In a plain sequence of bare layers, the last one with parameters
    at each resolution remains.

    Raises KdxError if the network does not run on such an image.
    """
    trace = _trace(module, size)
    total = sum(_count(child) for name, child in module.named_children() if _contains_map(trace, name))
    names = [name for child, _ in module.named_children() for name in _expand(module, child, trace, total)]
    names.sort(key=trace.order.__getitem__)
    blocks = [name for name in names if not _is_bare(module.get_submodule(name))]
    if blocks:
        return [name for name in blocks if name not in trace.stem] or blocks
    # Later entries of a dict replace earlier ones, so the last layer of each resolution remains.
    return sorted({trace.grid[name]: name for name in names}.values(), key=trace.order.__getitem__)


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


@ambient.neutral()
def _trace(module: nn.Module, size: tuple[int, int]) -> _Trace:
    trace = _Trace()
    like = next(
        (parameter.detach() for parameter in module.parameters() if parameter.is_floating_point()), torch.empty(0, dtype=torch.float32)
    )
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(like)
    modes = {child: child.training for child in module.modules()}
    hooks = [child.register_forward_hook(_observe(trace, name, image.shape)) for name, child in module.named_modules() if name]
    try:
        module.eval()
        try:
            module(image)
        except Exception:  # a network that squeezes its tensors takes no single image
            module(image.repeat(2, 1, 1, 1))
    except Exception as error:  # the network's own code runs here
        raise KdxError(
            f"The network does not run on an image of {size[0]} x {size[1]}: {first_line(error)}.", "Give the image size that it takes."
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
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].shape[1:] == image[1:]:
            trace.stem.add(name)
        with contextlib.suppress(KdxError):
            height, width = as_map(output, name, (image[2], image[3])).shape[2:]
            if height * width > 1:
                trace.grid[name] = (height, width)

    return hook


def _tensor_of(output: Any) -> Any:
    """The tensor of a tuple or list with exactly one: an attention may return its weights, or None, with its features."""
    tensors = [item for item in output if isinstance(item, Tensor)] if isinstance(output, (tuple, list)) else []
    return tensors[0] if len(tensors) == 1 else output


def _expand(root: nn.Module, name: str, trace: _Trace, total: int) -> Iterator[str]:
    """``name``, or the layers in it if it is a container of stages; nothing if it has no map or no parameter."""
    module = root.get_submodule(name)
    if not _count(module):
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
    """Whether only modules inside it return features: a ModuleList does not run, and a backbone may return an object."""
    return name not in trace.order or (_contains_map(trace, name) and not isinstance(trace.output[name], Tensor))


def _is_bare(module: nn.Module) -> bool:
    """Whether no child has parameters, as in a convolution or a norm (some contain their activation) and unlike a block."""
    return not any(_count(child) for child in module.children())


def _is_unit(module: nn.Module) -> bool:
    """Whether the module has at most one weight: a convolution with its norm and activation, so a part of a block and not a stage."""
    return sum(parameter.ndim > 1 for parameter in module.parameters()) < 2


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
