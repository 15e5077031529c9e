"""The set-up of all tests: torchvision on PyTorch builds that lack its operators, dcor as plain Python, and one thread per worker."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before PyTorch reads it; otherwise the workers' threads wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"

import numba

from benchmarks import torchvision_operators as torchvision_operators
from tests.browser import browser as browser
from tests.browser import opened as opened
from tests.selection import pytest_addoption as pytest_addoption
from tests.selection import pytest_collection_modifyitems as pytest_collection_modifyitems
from tests.selection import pytest_configure as pytest_configure

# At its import dcor compiles itself with Numba for half a minute, into a cache on disk, and workers that imported it at the same time
# have aborted. As an oracle dcor is used as plain Python. Numba's switch for that does not affect guvectorize, which makes the functions
# for many pairs of rows at once; no test calls them.
numba.config.DISABLE_JIT = True  # type: ignore[attr-defined]
numba.guvectorize = lambda *_, **__: lambda function: function
