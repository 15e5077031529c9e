"""Check that a network's output for an image depends on that image alone.

Maps and scores describe a function of the image. Dropout that stays active, noise inside forward, and batch norm without running
statistics make a network's output depend on chance or on the other images of the batch, and with them on ``chunk``.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdx.errors import KdxError
from kdx.export.copies import copied
from kdx.export.explainer_graphs import Graph
from kdx.export.graphs import WatchedNetwork

_IMAGES = 4
"""Images per pass; the second pass runs them in two halves."""

_GPU_EPSILON = 2.0**-11
"""The relative rounding of TensorFloat-32, which convolutions on a GPU may use."""

_records: weakref.WeakKeyDictionary[nn.Module, set[tuple[object, ...]]] = weakref.WeakKeyDictionary()
"""Per module, the checks that it has passed. A copy shares the record of its original, so that every call with one network checks once."""


def share_record(network: nn.Module, duplicate: nn.Module) -> None:
    """Let a copy of a network share the network's record of passed checks."""
    _records[duplicate] = _records.setdefault(network, set())


def check_dependence(graph: Graph, image_size: tuple[int, int]) -> None:
    """Raise KdxError if an image's logits or features change from pass to pass or with the batch, with the name of the first module that
    causes it.

    Each network runs four random images, and the same in two halves, once per structure and image size. Differences up to the square
    root of the number format's rounding are allowed (3e-4 of the largest value in float32), and a larger one counts only if it is
    also there in float64. Nothing is checked if the network does not run on four such images or returns values that are not finite.
    """
    networks = [graph] if isinstance(graph, WatchedNetwork) else [graph.network(role) for role in graph.roles]
    for network in networks:
        record = _records.setdefault(network.network, set())
        key = (image_size, *((type(module), module.training) for module in network.network.modules()))
        if key not in record:
            _check(network, image_size)
            record.add(key)


def _check(graph: WatchedNetwork, image_size: tuple[int, int]) -> None:
    images = torch.rand(_IMAGES, 3, *image_size, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(graph.mean)
    with torch.no_grad(), torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        try:
            differs = _differs(graph, images, _tolerance(graph)) and _differs_in_float64(graph, images)
        except KdxError:  # the network does not take four images; the pass that follows reports what it raises
            return
        if differs:
            raise _error(graph, images)


def _differs_in_float64(graph: WatchedNetwork, images: Tensor) -> bool:
    """`_differs` in float64, where rounding decides nothing; true if the network does not run in float64."""
    try:
        return _differs(copied(graph).double(), images.double(), _tolerance(graph))
    except KdxError:
        return True


def _differs(graph: WatchedNetwork, images: Tensor, tolerance: float) -> bool:
    """Whether the images together and in halves give different outputs."""
    whole = _outputs(graph, images)
    if not all(bool(output.isfinite().all()) for output in whole):
        return False
    halves = zip(*(_outputs(graph, half) for half in images.split(_IMAGES // 2)), strict=True)
    return any(_unequal(output, _joined(output, parts), tolerance) for output, parts in zip(whole, halves, strict=True))


def _outputs(graph: WatchedNetwork, images: Tensor) -> list[Tensor]:
    """The logits, and the features whose rows are images."""
    logits, raw = graph.watch(images)
    features = [value for value in raw.values() if isinstance(value, Tensor) and value.is_floating_point()]
    return [logits, *(feature for feature in features if feature.ndim > 1 and len(feature) == len(images))]


def _tolerance(graph: WatchedNetwork) -> float:
    """The largest difference that is rounding, relative to an output's largest value."""
    epsilon = torch.finfo(graph.dtype).eps
    return math.sqrt(max(epsilon, _GPU_EPSILON) if graph.mean.is_cuda else epsilon)


def _unequal(first: Tensor, second: Tensor | None, tolerance: float) -> bool:
    """Whether two outputs differ by more than the tolerance. Outputs whose shapes do not correspond are not compared."""
    if second is None or first.shape != second.shape or not first.numel():
        return False
    first, second = first.double(), second.double()
    return bool((first - second).abs().max() > tolerance * first.abs().max())


def _joined(whole: Tensor, parts: Sequence[Tensor]) -> Tensor | None:
    """The outputs of the halves along the dimension in which the output of the whole batch is longer; None if there is no such dimension.

    An output that does not grow with the batch, such as a table of positions, is that of the first half.
    """
    if all(part.shape == whole.shape for part in parts):
        return parts[0]
    longer = [axis for axis, size in enumerate(whole.shape) if parts[0].ndim == whole.ndim and size != parts[0].shape[axis]]
    return torch.cat(list(parts), longer[0]) if len(longer) == 1 else None


def _error(graph: WatchedNetwork, images: Tensor) -> KdxError:
    tolerance = _tolerance(graph)
    whole, again, *halves = (_calls(graph, part) for part in (images, images, *images.split(_IMAGES // 2)))
    responsible = _responsible(whole, [again], tolerance)
    if responsible is not None:
        return KdxError(
            f"The output of the network changes from pass to pass, because that of {responsible} does.",
            "Turn its dropout or noise off in eval mode: maps and scores would change with every call.",
        )
    responsible = _responsible(whole, halves, tolerance) or "the network"
    return KdxError(
        f"The output of the network for an image depends on the other images of the batch, because that of {responsible} does.",
        "Use a norm that treats each image alone, such as batch norm with running statistics (track_running_stats=True).",
    )


@dataclass(frozen=True)
class _Call:
    """One call of a module, with samples of the tensors that it took and returned."""

    module: str
    inputs: list[Tensor]
    outputs: list[Tensor]


def _calls(graph: WatchedNetwork, images: Tensor) -> list[_Call]:
    """The calls of one pass, in the order in which they end, so that a module comes after the modules inside it."""
    calls: list[_Call] = []
    open_inputs: list[list[Tensor]] = []

    def before(_module: nn.Module, args: object, kwargs: object) -> None:
        open_inputs.append(_samples((args, kwargs)))

    def after(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, _inputs: object, output: object) -> None:
            kind = type(module).__name__
            calls.append(_Call(f"the module {path!r} ({kind})" if path else f"{kind}.forward", open_inputs.pop(), _samples(output)))

        return hook

    modules = dict(graph.network.named_modules())
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in modules.values()]
    handles += [module.register_forward_hook(after(path)) for path, module in modules.items()]
    try:
        graph.watch(images)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _samples(value: object) -> list[Tensor]:
    """Copies of the floating-point tensors in a module's arguments or result, with at most eight entries per dimension after the second."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            return []
        return [value[tuple(slice(None, None, max(1, size // 8) if axis > 1 else 1) for axis, size in enumerate(value.shape))].clone()]
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [sample for item in items for sample in _samples(item)]


def _responsible(whole: list[_Call], parts: Sequence[list[_Call]], tolerance: float) -> str | None:
    """The first module to end whose outputs differ although its inputs do not. parts: the calls of the same pass in one or more parts."""
    for place, call in enumerate(whole):
        others = [part[place] for part in parts if place < len(part)]
        inputs_differ = _any_unequal(call.inputs, [other.inputs for other in others], tolerance)
        if not inputs_differ and _any_unequal(call.outputs, [other.outputs for other in others], tolerance):
            return call.module
    return None


def _any_unequal(whole: list[Tensor], parts: list[list[Tensor]], tolerance: float) -> bool:
    """Whether any tensor of a pass differs from the same tensor in its parts."""
    return any(_unequal(tensor, _joined(tensor, rest), tolerance) for tensor, *rest in zip(whole, *parts, strict=False))
