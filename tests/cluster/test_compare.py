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
from kdx.kernels import ambient
from kdx.scores import distributed
from kdx.scores.inner_products import Sampling
from kdx.scores.layer_scores import Measure
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
    with ambient.torch_threads(1):
        expected = kdx.compare(features, labels, permutations=19)
    actual = kdx.compare(features, labels, permutations=19, cluster=ClusterOptions(workers=2, cpus_per_worker=1))
    assert actual == expected and list(actual) == list(expected)
    with pytest.raises(KdxError) as error:
        kdx.compare({"a": {"student": np.full((40, 2), np.nan)}}, labels, cluster=ClusterOptions(workers=1, cpus_per_worker=1))
    with pytest.raises(KdxError) as local:
        kdx.compare({"a": {"student": np.full((40, 2), np.nan)}}, labels)
    assert error.value.problem == local.value.problem


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_tiles_in_workers_have_the_digits_of_one_process() -> None:
    random = np.random.default_rng(1)
    labels = random.normal(size=(700, 2))
    features: dict[str, dict[str, Any]] = {
        "a": {role: random.normal(size=(700, 5)).cumsum(1) + labels[:, :1] for role in ("student", "base", "teacher")},
        "b": {"student": torch.from_numpy(random.normal(size=(700, 300)))},
    }
    options = ClusterOptions(workers=3, cpus_per_worker=1)
    with ambient.torch_threads(1):
        expected = kdx.compare(features, labels, permutations=19)
    assert kdx.compare(features, labels, permutations=19, cluster=options) == expected
    constant = {"a": {**features["a"], "base": np.ones((700, 5))}}
    with pytest.raises(KdxError) as error:
        kdx.compare(constant, labels, cluster=options)
    with pytest.raises(KdxError) as local:
        kdx.compare(constant, labels)
    assert error.value.problem == local.value.problem


def test_blocks_are_added_in_order_whichever_comes_first() -> None:
    blocks = [(torch.tensor([value], dtype=torch.float64),) for value in (1e16, 1.0, -1e16, 3.0)]
    expected = ((blocks[0][0] + blocks[1][0]) + blocks[2][0]) + blocks[3][0]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]):
        total = distributed._Total()
        for block in order:
            total.add(block, blocks[block])
        assert total.sums[0].equal(expected)


def test_a_sweep_computes_in_blocks_what_it_computes_at_once() -> None:
    """The number of blocks is known before the sweep, and their sums give its results, down to the last bit."""
    random = np.random.default_rng(2)
    features = {role: random.normal(size=(300, 4)) for role in ("student", "base")}
    for target in (np.arange(300) % 7, random.normal(size=(300, 90))):
        measure = Measure(target, Sampling(permutations=9))
        sweep = measure.sweep("a", features)
        assert sweep.blocks > 1 and sweep.blocks == measure.blocks("a", features)
        sums = [measure.sweep("a", features).sums(block) for block in reversed(range(sweep.blocks))]
        assert measure.scores("a", features, reversed(sums)) == measure.scores("a", features)


@pytest.mark.parametrize("sampling", [Sampling(batch=100), Sampling(batch=299)])
def test_batches_have_no_blocks(sampling: Sampling) -> None:
    features = {"student": np.random.default_rng(3).normal(size=(300, 4))}
    assert Measure(np.arange(300) % 3, sampling).blocks("a", features) is None
    assert Measure(np.arange(300)[:40] % 3, Sampling()).blocks("a", {"student": features["student"][:40]}) is None
