"""The model of the cost of a batch: its sums by hand, its agreement with the measured GPU, and its counts with those of a computation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_model, gpu_tables
from benchmarks.cases import RESNET50
from benchmarks.gpu_model import Case, Cost, costs, seconds
from kdx import models
from kdx.explain.layer import begin
from kdx.features.target import Target
from kdx.runs.hardware import GPUS, Gpu
from kdx.scores import uncertainty
from tests.device_work import counted

ROUND = Gpu("round", memory=1e12, float32=1e12, float16=1e13, host=1e10)


def test_the_seconds_are_bytes_and_operations_over_the_rates_that_are_reached() -> None:
    assert Cost(memory=0.85e12).seconds(ROUND) == pytest.approx(1)
    assert Cost(float32=0.5e12, float16=1e13).seconds(ROUND) == pytest.approx(1 + 2)
    assert Cost(host=5e9).seconds(ROUND) == pytest.approx(0.5)
    assert Cost(memory=0.85e12, launches=100).seconds(ROUND) == pytest.approx(1)


def test_the_costs_follow_the_sizes() -> None:
    case, more = costs(Case()), costs(Case(images=512))
    for name in ("upload", "passes, PyTorch", "passes, fused", "results"):
        assert all(getattr(more[name], amount) == 2 * getattr(case[name], amount) for amount in ("memory", "float32", "float16", "host"))
    assert 2 < more["maps and scores"].float32 / case["maps and scores"].float32 <= 4
    assert case["upload"].host == 256 * 3 * 224 * 224
    stages = seconds(ROUND)
    assert stages["batch"] == max(stages["passes, fused"] + stages["maps and scores"], stages["upload"], stages["results"])
    slow = seconds(replace(ROUND, host=1e6))
    assert slow["batch"] == slow["upload"]  # the copy is the slowest stage
    assert gpu_model.cores(ROUND) == pytest.approx(gpu_model.DECODING * 256 / stages["batch"])


def test_a_pass_has_the_operations_of_the_network() -> None:
    network = models.load(RESNET50).module.eval()
    written: list[int] = []
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: written.append(output.numel()))
    with torch.device("meta"):
        images = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.to("meta")(images)
    assert counter.get_total_flops() == pytest.approx(gpu_model.RESNET50.operations, rel=0.02)
    assert sum(written) == pytest.approx(gpu_model.RESNET50.activations, rel=0.02)


class Traffic(TorchDispatchMode):
    """Adds up the bytes of the tensors that operators compute from and return, without views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func.overloadpacket.__name__.startswith(("empty", "new_empty")):
            tensors = [value for value in (*args, *(result if isinstance(result, tuple) else (result,))) if isinstance(value, Tensor)]
            self.bytes += sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())
        return result


def test_launches_and_bytes_are_those_of_a_computation() -> None:
    """Counts the bytes of operators alone, at sizes where features and pairs dominate; kernels add the rest."""
    case = Case(images=24, channels=96, positions=49, permutations=19)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 3
    features = {role: torch.randn(24, 96, 7, 7, generator=generator) for role in ("student", "base")}
    target, table = Target.of(labels).checked(), uncertainty.permutation_table(24, 19, 0)
    with counted():
        begin(features, target, permutations=table)
    with counted() as work, Traffic() as traffic:
        begin(features, target, permutations=table)
    cost = costs(case)["maps and scores"]
    assert work.launches.total() == cost.launches == gpu_model.LAUNCHES and not work.waits
    assert 0.2 < traffic.bytes / cost.memory < 1.5


def test_the_model_agrees_with_the_gpu_that_was_measured() -> None:
    record = gpu_tables.stored()
    assert record is not None
    times = {name: float(np.median(samples)) for name, samples in record["batch"].items() if isinstance(samples, list)}
    (measured,) = [gpu for gpu in GPUS if gpu.name in record["device"]["name"]]
    estimate = seconds(measured)
    assert estimate["passes, PyTorch"] == pytest.approx(times["passes, float16"], rel=0.3)
    assert estimate["maps and scores"] == pytest.approx(times["maps and scores, 999 permutations"], rel=0.5)
    assert record["bandwidth"] == pytest.approx(measured.memory, rel=0.15)


def test_the_tables_have_a_row_per_gpu_and_stage() -> None:
    assert gpu_model.estimates().count("\n") == 2 + len(GPUS) and gpu_model.counts().count("\n") == 2 + len(costs(Case()))
    assert "38.5 MB" in gpu_model.counts() and f"| {gpu_model.LAUNCHES} |" in gpu_model.counts()
