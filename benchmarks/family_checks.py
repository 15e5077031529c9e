"""What `benchmarks.families --all` checks of one network: advice, Grad-CAM, positions, and the three kinds of exported files."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kdx
from benchmarks.family_networks import CLASSES, build
from kdx.errors import KdxError, first_line
from kdx.explain.graph import explainer_graph
from kdx.export import onnx_file
from kdx.export.description import Origin
from kdx.export.graphs import FeatureGraph, GradientGraph, Preprocessing
from kdx.models.feature_layers import described_layers, sensible_layers
from kdx.models.network import Network
from kdx.models.prepared import check_kind

EXPORTS = ("features", "gradients", "explainer")
STAGES = ("layers", "grad_cam", "patch", *EXPORTS)

TOLERANCE = 1e-4
"""The largest error of Grad-CAM, relative to the largest value of the map."""

MARGIN = 1
"""The number of cells that the largest change may be away from the brightened patch."""

_OUT_OF_MEMORY = ("MemoryError", "allocate memory", "bad_alloc", "bad allocation")
"""Parts of the messages of Python, PyTorch and ONNX Runtime if a process reaches its limit of memory."""

_PATCHES = ((0.125, 0.625), (0.625, 0.25))
"""Top and left edge of each patch, as shares of the image. A transposed, mirrored or shifted grid puts at least one elsewhere."""

_PATCH_SIDE = 0.25


def check(row: dict[str, Any], stages: Sequence[str], store: Callable[[dict[str, Any]], None]) -> None:
    """Run ``stages`` of the network ``row["network"]`` and add their results, each with its seconds of processor time, to the row.

    The result of a stage has the key ``refused`` if kdx raised its own error or a package is missing, and ``failed`` for any other
    exception. store: receives the row before and after each stage, so that results survive if the process is stopped; the result of
    a stopped stage is ``{"stopped": true}``.
    """
    name = row["network"]
    built: list[Network] = []
    _run(row, "build", store, lambda: _built(name, built))
    if not built:
        return
    network = built[0]
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "grad_cam": lambda: grad_cam_error(network, row["layer"]),
        "patch": lambda: patch_in_grid(network, row["layer"], row["layers"]["names"]),
        **{kind: partial(_export_row, network, row, kind) for kind in EXPORTS},
    }
    if "layers" in stages or "layer" not in row:
        _run(row, "layers", store, lambda: _advised(network))
        names = row["layers"].get("names")
        if not names:
            return
        row["layer"] = names[len(names) // 2]
    for stage in stages:
        if stage in work:
            _run(row, stage, store, work[stage])


def _advised(network: Network) -> dict[str, Any]:
    size = _size(network.preprocessing)
    names = sensible_layers(network.module, size)
    if names:
        return {"names": names}
    problem = next((layer.problem for layer in described_layers(network.module, size) if layer.problem), "No layer returns a feature map.")
    return {"refused": f"kdx.models.layers names no layer. {problem}"}


def _export_row(network: Network, row: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return exported(network, row["layer"], kind)


def _built(name: str, built: list[Network]) -> dict[str, Any]:
    module, preprocessing = build(name, 0)
    check_kind(module)  # as kdx.models.load does
    built.append(Network(name, module, preprocessing))
    return {"parameters": built[0].parameters, "size": preprocessing.size}


def is_successful(result: Mapping[str, Any] | None) -> bool:
    """Whether a stage ran and raised nothing."""
    return result is not None and not any(key in result for key in ("refused", "failed", "stopped"))


def agrees(row: Mapping[str, Any], stage: str) -> bool:
    """Whether a stage of a network succeeded, with a result within the tolerance. An export checks its parity itself."""
    result = row.get(stage)
    if result is None or not is_successful(result):
        return False
    if stage == "grad_cam":
        return bool(result["error"] <= TOLERANCE)
    return stage != "patch" or bool(result["distance"] <= MARGIN)


def _run(row: dict[str, Any], stage: str, store: Callable[[dict[str, Any]], None], work: Callable[[], dict[str, Any]]) -> None:
    row[stage] = {"stopped": True}
    store(row)
    start = time.process_time()
    try:
        result = work()
    except KdxError as error:
        result = _reason("refused", f"{error.problem} {error.hint}")
    except ImportError as error:  # transformers needs another package for some architectures
        result = {"refused": first_line(error)}
    except Exception as error:  # code of other packages runs here; the table shows the exception
        result = _reason("failed", f"{type(error).__name__}: {first_line(error)}")
    row[stage] = result | {"seconds": round(time.process_time() - start, 1)}
    store(row)


def _reason(key: str, text: str) -> dict[str, Any]:
    """The result of a stage that raised an exception with this text. A lack of memory is no failure of the network."""
    if any(part in text for part in _OUT_OF_MEMORY):
        return {"stopped": "it needs more memory than the limit"}
    return {key: text}


def grad_cam_error(network: Network, layer: str) -> dict[str, Any]:
    """The largest difference between `kdx.grad_cam` and Grad-CAM by PyTorch's hooks, relative to the map's largest value.

    The values of each map are compared in ascending order, because `patch_distance` checks their positions.
    """
    preprocessing = network.preprocessing
    images = torch.rand(3, 3, *_size(preprocessing), generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 1, 2])
    maps = kdx.grad_cam(network, images, layer, classes)
    feature, gradient = _hooked(network, layer, images, classes)
    channels = maps.weights.shape[1]
    axes = [axis for axis in range(1, feature.ndim) if feature.shape[axis] == channels]
    if len(feature) != len(images) or not axes:
        raise ValueError(f"the layer's output {list(feature.shape)} has no row per image with {channels} channels")
    errors = [_largest_difference(maps.maps, feature.movedim(axis, 1), gradient.movedim(axis, 1)) for axis in axes]
    return {"error": min(errors), "grid": list(maps.maps.shape[1:])}


def _hooked(network: Network, layer: str, images: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's own output and its gradient."""
    match = re.fullmatch(r"([^:\[\]]+)(?:\[(\d+)\])?(?::.*)?", layer)
    assert match is not None
    features: list[Tensor] = []

    def capture(_module: nn.Module, _inputs: object, output: Any) -> Any:
        items = list(output) if isinstance(output, tuple | list) else [output]
        index = int(match[2] or 0)
        features.append(items[index])
        items[index] = features[-1].clone()
        return type(output)(items) if isinstance(output, tuple | list) else items[0]

    handle = network.module.get_submodule(match[1]).register_forward_hook(capture)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (network.preprocessing.mean, network.preprocessing.std))
    try:
        logits = network.module((images - mean) / std)
    finally:
        handle.remove()
    logits = getattr(logits, "logits", logits)
    logits = logits if isinstance(logits, Tensor) else next(part for part in logits.values() if part.shape == (len(images), CLASSES))
    (gradient,) = torch.autograd.grad(logits[torch.arange(len(images)), classes].sum(), features[-1])
    return features[-1].detach(), gradient


def _largest_difference(maps: Tensor, feature: Tensor, gradient: Tensor) -> float:
    """The difference of maps [n, H, W] from Grad-CAM of a feature and its gradient [n, C, ...] without the tokens before the grid."""
    extra = feature[0, 0].numel() - maps[0].numel()
    if extra < 0:
        return float("inf")
    feature, gradient = feature.flatten(2)[:, :, extra:], gradient.flatten(2)[:, :, extra:]
    expected = (gradient.mean(2, keepdim=True) * feature).sum(1).relu().sort(1).values
    return float((maps.flatten(1).sort(1).values - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def patch_in_grid(network: Network, layer: str, names: Sequence[str]) -> dict[str, Any]:
    """`patch_distance` of a layer or, if the change is elsewhere, of the first in ``names`` with the same grid. The result names it.

    Attention with random weights can spread the change of a patch over all positions, so that no cell stands out any more. Earlier layers
    with the same grid have the same layout, and show where a patch lies in it.
    """
    result = patch_distance(network, layer)
    if result["distance"] > MARGIN:
        for earlier in names[: names.index(layer)]:
            other = patch_distance(network, earlier)
            if other["grid"] == result["grid"]:
                return other | {"layer": earlier}
    return result


def patch_distance(network: Network, layer: str) -> dict[str, Any]:
    """How far the largest change of the feature map is from a brightened patch of the image, in cells: the larger of two patches.

    contrast: the mean change of the cells on the patch, divided by that of the other cells; the smaller of the two patches.
    """
    height, width = _size(network.preprocessing)
    graph = FeatureGraph(network.module, [layer], network.preprocessing)
    image = 0.5 * nn.functional.interpolate(torch.rand(1, 3, 7, 7, generator=torch.Generator().manual_seed(0)), (height, width))
    distances, contrasts = [], []
    for top, left in _PATCHES:
        bright = image.clone()
        rows, columns = ((round(start * side), round((start + _PATCH_SIDE) * side)) for start, side in ((top, height), (left, width)))
        bright[:, :, slice(*rows), slice(*columns)] += 0.5
        with torch.no_grad():
            features = graph(torch.cat([image, bright]))[1]
        change = (features[1] - features[0]).abs().sum(0)
        cells_high, cells_wide = change.shape
        row, column = divmod(int(change.argmax()), cells_wide)
        covered = [
            (edges[0] * cells // side, max(edges[0] * cells // side, -(-edges[1] * cells // side) - 1))
            for edges, cells, side in ((rows, cells_high, height), (columns, cells_wide, width))
        ]
        distances.append(max(max(first - cell, cell - last, 0) for cell, (first, last) in zip((row, column), covered, strict=True)))
        inside = torch.zeros_like(change, dtype=torch.bool)
        inside[covered[0][0] : covered[0][1] + 1, covered[1][0] : covered[1][1] + 1] = True
        contrasts.append(float(change[inside].mean() / change[~inside].mean().clamp_min(1e-30)) if not inside.all() else 1.0)
    return {"distance": max(distances), "contrast": min(contrasts), "grid": [cells_high, cells_wide]}


def exported(network: Network, layer: str, kind: str) -> dict[str, Any]:
    """Export one kind of file, which compares it with PyTorch: the largest error, and the file's megabytes."""
    size = _size(network.preprocessing)
    origin: Any = Origin(network.reference, "random")
    if kind == "explainer":
        other, _ = build(network.reference, 1)
        pair = {"student": network, "base": Network(network.reference, other, network.preprocessing)}
        graph: Any = explainer_graph(pair, {layer: layer})
        origin = dict.fromkeys(pair, origin)
    else:
        graph = (FeatureGraph if kind == "features" else GradientGraph)(network.module, [layer], network.preprocessing)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        report = onnx_file.write(graph, path, origin=origin, image_size=size)
        megabytes = path.stat().st_size / 1e6
    errors = [output.max if output.smooth is None else output.smooth for output in report.outputs.values()]
    return {"error": max(errors), "megabytes": round(megabytes, 1), "images_at_a_jump": max(o.kinked for o in report.outputs.values())}


def _size(preprocessing: Preprocessing) -> tuple[int, int]:
    assert preprocessing.size is not None
    return preprocessing.size
