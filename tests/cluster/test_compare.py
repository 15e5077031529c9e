"""`kdx.compare` in workers of a real Ray: the scores equal those of one process, digit by digit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kdx
from kdx.cluster.options import ClusterOptions
from kdx.errors import KdxError
from kdx.scores import distributed
from tests.cluster.test_ray import limited as limited
from tests.cluster.test_ray import ray as ray


def test_what_is_written_to_a_copy_of_a_mapped_file_reaches_the_workers(tmp_path: Path) -> None:
    np.save(tmp_path / "features.npy", np.zeros((4, 2)))
    copy = np.load(tmp_path / "features.npy", mmap_mode="c")
    copy[:] = 7
    assert pickle.loads(pickle.dumps(distributed._sent(copy))).tolist() == copy.tolist()


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_layers_in_workers_have_the_digits_of_one_process(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    labels = np.arange(40) % 4
    mapped = np.memmap(tmp_path / "base", np.float64, "w+", 8, (40, 3, 2, 2))
    mapped[:] = random.normal(size=mapped.shape)
    mapped.flush()
    features: dict[str, dict[str, Any]] = {
        "a": {"student": random.normal(size=(40, 6)), "base": mapped, "teacher": torch.from_numpy(random.normal(size=(40, 9)))},
        "b": {"student": mapped[:40], "base": random.normal(size=(40, 5))},
        "c": {"student": random.normal(size=(40, 2))},
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        expected = kdx.compare(features, labels, permutations=19)
    finally:
        torch.set_num_threads(threads)
    actual = kdx.compare(features, labels, permutations=19, cluster=ClusterOptions(workers=2, cpus_per_worker=1))
    assert actual == expected and list(actual) == list(expected)
    with pytest.raises(KdxError) as error:
        kdx.compare({"a": {"student": np.full((40, 2), np.nan)}}, labels, cluster=ClusterOptions(workers=1, cpus_per_worker=1))
    with pytest.raises(KdxError) as local:
        kdx.compare({"a": {"student": np.full((40, 2), np.nan)}}, labels)
    assert error.value.problem == local.value.problem
