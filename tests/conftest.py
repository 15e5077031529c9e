"""What every test shares: torchvision on PyTorch builds that lack its operators, dcor uncompiled, and one thread for each worker."""

from __future__ import annotations

import importlib.util
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before PyTorch looks; workers that share the cores wait for one another's threads otherwise
    os.environ["OMP_NUM_THREADS"] = "1"

import numba
import torch

from tests.selection import pytest_addoption as pytest_addoption
from tests.selection import pytest_collection_modifyitems as pytest_collection_modifyitems
from tests.selection import pytest_configure as pytest_configure

# dcor compiles itself with Numba when it is imported, for half a minute, into a cache on disk, and workers that started together
# have aborted while they imported it. As an oracle dcor serves as plain Python. Numba's switch for that leaves out guvectorize,
# which makes the functions for many pairs of rows at once; no test calls them.
numba.config.DISABLE_JIT = True  # type: ignore[attr-defined]
numba.guvectorize = lambda *_, **__: lambda function: function

if importlib.util.find_spec("torchvision") and not hasattr(torch.ops.torchvision, "nms"):
    # torchvision's wheel is compiled for PyTorch's CUDA build. Beside another build its operators do not load, and its
    # import then fails while it registers their shapes; declared first, the import works. No test runs them.
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
