"""Arrays in files whose space on disk is reserved."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import pytest

import kdx
from kdx.features.array_files import new_array


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve space")
def test_the_space_of_an_array_is_reserved_and_not_only_stated(tmp_path: Path) -> None:
    array = new_array(tmp_path / "x.npy", (1000, 300), "float32")
    state = (tmp_path / "x.npy").stat()
    assert state.st_blocks * 512 >= state.st_size >= array.nbytes
    assert array.shape == (1000, 300) and array.dtype == np.float32 and not array.any()


def test_too_little_space_is_an_error_for_the_user(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(kdx.KdxError, match=r"x\.npy cannot be written"):
            new_array(tmp_path / "x.npy", (1000, 300), "float32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
