"""The set-up of all tests: torchvision on PyTorch builds that lack its operators, dcor as plain Python, and one thread per worker."""

from __future__ import annotations

import importlib.util
import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before PyTorch reads it; otherwise the workers' threads wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"

import numba
import torch

from tests.selection import pytest_addoption as pytest_addoption
from tests.selection import pytest_collection_modifyitems as pytest_collection_modifyitems
from tests.selection import pytest_configure as pytest_configure

# At its import dcor compiles itself with Numba for half a minute, into a cache on disk, and workers that imported it at the same time
# have aborted. As an oracle dcor is used as plain Python. Numba's switch for that does not affect guvectorize, which makes the functions
# for many pairs of rows at once; no test calls them.
numba.config.DISABLE_JIT = True  # type: ignore[attr-defined]
numba.guvectorize = lambda *_, **__: lambda function: function

if importlib.util.find_spec("torchvision") and not hasattr(torch.ops.torchvision, "nms"):
    # torchvision's wheel is compiled for PyTorch's CUDA build. With another build its operators do not load, and its import fails
    # while it registers their shapes. If the operators are declared first, the import works. No test runs them.
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
