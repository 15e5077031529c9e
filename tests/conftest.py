"""The set-up of all tests: torchvision on PyTorch builds that lack its operators, dcor as plain Python, and one thread per worker.

Tests also run on a machine with a GPU. Those that need it have the marker gpu; those that assume that `auto` means the CPU use the
fixture `no_gpu`, or request the CPU.
"""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before PyTorch reads it; otherwise the workers' threads wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Iterator

import numba
import pytest
import torch

from benchmarks import torchvision_operators as torchvision_operators
from tests import exporter
from tests.browser import browser as browser
from tests.browser import opened as opened
from tests.remote.server import server as server
from tests.selection import pytest_addoption as pytest_addoption
from tests.selection import pytest_collection_modifyitems as pytest_collection_modifyitems
from tests.selection import pytest_configure as pytest_configure

# At its import dcor compiles itself with Numba for half a minute, into a cache on disk, and workers that imported it at the same time
# have aborted. As an oracle dcor is used as plain Python. Numba's switch for that does not affect guvectorize, which makes the functions
# for many pairs of rows at once; no test calls them.
numba.config.DISABLE_JIT = True  # type: ignore[attr-defined]
numba.guvectorize = lambda *_, **__: lambda function: function

exporter.install()


@pytest.fixture(scope="module")
def no_gpu() -> Iterator[None]:
    """Hide the machine's GPUs from PyTorch's callers, for modules that use this fixture through ``pytest.mark.usefixtures``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield
