"""Declare torchvision's operators on PyTorch builds that lack them. Importing this module before torchvision is enough."""

from __future__ import annotations

import importlib.util

import torch

if importlib.util.find_spec("torchvision") and not hasattr(torch.ops.torchvision, "nms"):
    # torchvision's wheel is compiled for PyTorch's CUDA build. With another build its operators do not load, and its import fails
    # while it registers their shapes. If the operators are declared first, the import works. Neither tests nor benchmarks run them.
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
