"""The pairs of layers that a distillation matches and its models file names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from kdx import models
from kdx.errors import about
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.export.layer_names import find_layer
from kdx.models.layer_pairs import parse_layers

Pair = tuple[str, str]
"""A layer of the student and a layer of the teacher."""


def layer_pairs(student: nn.Module, teacher: nn.Module, preprocessing: Preprocessing, layers: Sequence[str] | None = None) -> list[Pair]:
    """The pairs of ``layers``, or by default the layers that both networks have by name, or else pairs by resolution.

    preprocessing: that of the training, with a size. Raises KdxError for a layer that a network does not have.
    """
    if layers is not None:
        pairs = [(layer, names.teacher) for layer, names in parse_layers(layers).items()]
        for student_layer, teacher_layer in pairs:
            with about("student"):
                find_layer(student, student_layer)
            with about("teacher"):
                find_layer(teacher, teacher_layer)
        return pairs
    student_layers, teacher_layers = (models.layers(network, preprocessing.size) for network in (student, teacher))
    common = [(name, name) for name in student_layers if name in teacher_layers]
    if common:
        return common
    return pairs_by_resolution(_resolutions(student, student_layers, preprocessing), _resolutions(teacher, teacher_layers, preprocessing))


def pairs_by_resolution(student: Mapping[str, tuple[int, int]], teacher: Mapping[str, tuple[int, int]]) -> list[Pair]:
    """Pairs of layers of networks of different families, from the resolution (height, width) of each layer in order of execution.

    The last layers of both are a pair. Before it, the last layer of the student at each resolution is paired with the last one of the
    teacher at the same resolution, without those two. So each layer is in one pair at most.
    """
    if not student or not teacher:
        return []
    last = list(student)[-1], list(teacher)[-1]
    # Later entries of a dict replace earlier ones.
    student_last, teacher_last = ({size: name for name, size in layers.items()} for layers in (student, teacher))
    pairs = [(name, teacher_last[size]) for size, name in student_last.items() if size in teacher_last]
    return [pair for pair in pairs if pair[0] != last[0] and pair[1] != last[1]] + [last]


def _resolutions(module: nn.Module, layers: Sequence[str], preprocessing: Preprocessing) -> dict[str, tuple[int, int]]:
    graph = FeatureGraph(module, layers, preprocessing).eval()
    with torch.no_grad():
        _, *features = graph(torch.zeros(2, 3, *(preprocessing.size or (0, 0)), device=graph.mean.device))
    return {layer: (feature.shape[2], feature.shape[3]) for layer, feature in zip(layers, features, strict=True)}
