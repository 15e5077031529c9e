"""Declare torchvision's operators on PyTorch builds that lack them. Importing this module before torchvision is enough."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch


def _is_loaded() -> bool:
    """Whether torchvision is absent, or its compiled operators load with this build of PyTorch, as torchvision itself would load them."""
    spec = importlib.util.find_spec("torchvision")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for library in Path(folder).glob("_C.*"):
            try:
                torch.ops.load_library(str(library))
            except OSError:
                return False
    return True


if not _is_loaded():
    # torchvision's wheel is compiled for PyTorch's CUDA build. With another build its operators do not load, and its import fails
    # while it registers their shapes. If the operators are declared first, the import works. Neither tests nor benchmarks run them.
    # Where they do load, a second declaration would abort the process.
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
