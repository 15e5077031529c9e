"""`kdx plan`: its formulas by hand, its counts of a real run, its errors, and its output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from torch import nn

from kdx.commands import explain
from kdx.commands import plan as command
from kdx.errors import KdxError
from kdx.explain.explainer import Explainer
from kdx.kernels.tiles import tile_side
from kdx.runs import schema, store
from kdx.runs.cost import CHUNK, EAGER_TOUCHES, Cost, Pass, SetCost, Work, batch_cost
from kdx.runs.hardware import ARITHMETIC, GPUS, MEMORY, Cluster, Gpu, cluster_seconds, find_gpu
from kdx.runs.plan import RunOptions
from kdx.runs.trial import Speed, counted_pass
from tests.command_line import Run

ROUND = Cluster(Gpu("round", memory=1e12, float32=1e12, float16=1e13, host=1e10, tf32=4e12), disk=1e9)
SHAPES = {"student": {"layer": (6, 3, 5)}, "base": {"layer": (4, 3, 5)}}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    path = tmp_path / "models.toml"
    tiny = "kdx:resnet,width=2,depth=1,stages=1"
    path.write_text(f'student = "{tiny}"\nbase = "{tiny}"\nclasses = {list("0123456789")}\nlayers = ["layer1"]\n')
    return path


# ---- formulas ----


def test_the_operations_are_those_of_the_products() -> None:
    """One product of a Gram matrix per network for half of the pairs, and one more per share: 2 C P operations each."""
    n = 10
    assert SetCost.of(n, SHAPES).operations == 2 * (6 + 4) * 15 * n**2 / 2 + 2 * 2 * (6 + 4) * 15 * n**2 / 2
    assert SetCost.of(n, SHAPES, pooled=True).operations == (6 + 4) * n**2
    work = Work(100, SHAPES, batch=20, permutations=7, one_pass=Pass(5.0, 3.0))
    assert work.stages("batch")["passes"] == Cost(500, 4 * 3 * 100 * EAGER_TOUCHES)
    assert [work.stages(geometry)["results"].chunks for geometry in ("batch", "whole")] == [5 * 7, 2 * 7]  # 2 maps of UniCAM, 5 of scores
    one = batch_cost(20, [(6, 15), (4, 15)], 7)
    assert one.operations == 2 * 20**2 * 15 * 10 + 2 * 7 * 20**2 * 3
    assert work.stages("batch")["maps and scores"].operations == 5 * one.operations


def test_stages_grow_with_the_images_as_the_model_states() -> None:
    few, many = (Work(n, SHAPES, batch=64, permutations=99, one_pass=Pass(5.0, 3.0)) for n in (100_000, 200_000))
    for geometry in ("batch", "whole"):
        for name, cost in few.stages(geometry).items():
            more, expected = many.stages(geometry)[name], 4 if name == "sweeps" else 2
            assert more.operations == pytest.approx(expected * cost.operations)
            assert more.memory == pytest.approx(expected * cost.memory)
            assert more.disk == pytest.approx(expected * cost.disk, rel=0.03)


def test_features_that_do_not_fit_in_memory_are_read_once_per_row_of_tiles() -> None:
    n = 100_000
    stays, streams = (Work(n, SHAPES, 64, 0, memory=memory).stages("whole")["sweeps"].disk for memory in (1e12, 1e3))
    size, side = 4 * n * 10 * 15, tile_side(n, [])
    assert streams - stays == pytest.approx(size * (n / side - 1))


def test_the_seconds_on_other_hardware_are_costs_over_rates() -> None:
    stages = {"passes": Cost(operations=ARITHMETIC * 4e12, memory=MEMORY * 1e12), "results": Cost(disk=3e9)}
    assert cluster_seconds(ROUND, stages, 1200, 0.01, "float32") == pytest.approx({"decoding": 1, "passes": 4 + 1, "results": 3})
    assert cluster_seconds(ROUND, stages, 1200, 0.01, "tf32")["passes"] == pytest.approx(1 + 1)
    assert cluster_seconds(ROUND, {"results": Cost(chunks=10)}, 0, 0.01, "float32")["results"] == pytest.approx(10 * CHUNK)
    more = Cluster(ROUND.gpu, machines=3, gpus=2, disk=1e9)
    assert cluster_seconds(more, stages, 1200, 0.01, "float32") == pytest.approx({"decoding": 1 / 6, "passes": 5 / 6, "results": 1})


def test_a_trial_is_scaled_to_the_images() -> None:
    work = Work(1000, SHAPES, 64, 0)
    speed = Speed(decoding=0.01, passes=0.02, maps=0.005, linear=0.001, quadratic=2e-6, disk=1e9, on_gpu=False)
    batch, whole = speed.seconds(work, "batch"), speed.seconds(work, "whole")
    assert (batch["decoding"], batch["passes"], batch["maps and scores"]) == pytest.approx((10, 20, 5))
    assert whole["sweeps"] == pytest.approx(1 + 2) and whole["features"] == pytest.approx(4 * 1000 * 150 / 1e9)


def test_gpus_are_found_by_short_names() -> None:
    assert [find_gpu(name).name for name in ("h100", "A100", "rtx-4090")] == ["H100", "A100 80 GB", "RTX 4090"]
    for name in ("", "H", "V100"):
        with pytest.raises(KdxError, match="does not know the rates"):
            find_gpu(name)
    assert find_gpu("T4").passes("tf32") == find_gpu("T4").float32  # it has no TensorFloat-32
    assert all(gpu.passes("tf32") >= gpu.passes("float32") for gpu in GPUS)


def test_the_operations_of_a_pass_are_counted() -> None:
    network = nn.Sequential()
    network.add_module("layer", nn.Conv2d(3, 4, 3, padding=1, bias=False))
    network.add_module("pool", nn.AdaptiveAvgPool2d(1))
    network.add_module("flat", nn.Flatten())
    network.add_module("head", nn.Linear(4, 5))
    with Explainer(student=network, layers=["layer"], runtime="eager", device="cpu") as explainer:
        explainer.open((8, 6))
        assert counted_pass(explainer, (8, 6)) == Pass(2 * (48 * 4 * 27 + 4 * 5), 48 * 4 + 5)


# ---- a run ----


@pytest.mark.parametrize("geometry", [pytest.param("whole", marks=pytest.mark.slow), pytest.param("batch", marks=pytest.mark.slow)])
def test_the_sizes_are_those_of_a_run(geometry: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = RunOptions(geometry=geometry, batch=16, permutations=19, runtime="eager", device="cpu", gallery=2, split="all")
    data = "sample:64:digits"
    estimate = command.run(data, models, (), options, announce=lambda line: None)
    sizes: dict[str, int] = {}
    finish = store.Store.finish

    def measured(self: store.Store, *arguments: Any, **more: Any) -> None:
        sizes["records"] = sum(path.stat().st_size for path in (self.folder / schema.PROGRESS).glob("*"))
        sizes["features"] = sum(path.stat().st_size for path in (self.folder / schema.FEATURES).glob("*-0.npy"))
        finish(self, *arguments, **more)

    monkeypatch.setattr(store.Store, "finish", measured)
    explain.run(data, models, tmp_path / "run", (), options, announce=lambda line: None)
    group: Any = zarr.open_group(tmp_path / "run" / "maps.zarr", mode="r")
    disk = estimate.work.disk(geometry)
    assert disk["maps"] == sum(np.asarray(array).nbytes for _, array in group["layer1"].arrays())
    assert disk["features"] == pytest.approx(sizes["features"], rel=0.01)
    if geometry == "batch":
        assert sizes["records"] == pytest.approx(disk["scratch"], rel=0.35)
    assert estimate.total > 0 and estimate.memory > 1e8 and set(estimate.seconds) - {"decoding"} == set(estimate.stages)


# ---- the command ----


def test_a_table_and_json(run: Run, models: Path) -> None:
    status, out, err = run(
        "plan", "digits", "--models", str(models), "--on", "h100", "--machines", "2", "--gpus", "8", "--images", "1281167"
    )
    assert (status, err) == (0, "")
    assert "Estimate for 1,281,167 images like the 1,797 of the data, on 2 machines with 8 x H100 and 96 cores each" in out
    assert "passes of the networks" in out and "Geometry" in out and "memory of the process" in out
    status, out, err = run("plan", "digits", "--models", str(models), "--on", "h100", "--images", "1000000000", "--json")
    figures = json.loads(out)
    assert status == 0 and figures["images"] == 10**9 and figures["geometry"] == "reference"
    assert figures["seconds"] >= figures["stages"]["passes"]["seconds"] > 0
    assert figures["stages"]["passes"]["operations"] == 10**9 * figures["operations_of_a_pass"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--on", "V100"), "does not know the rates of a GPU 'V100'"),
        (("--machines", "2"), "describe other hardware"),
        (("--on", "h100", "--features", "salient"), "salient features cannot be counted"),
        (("--geometry", "whole", "--images", "1000000000"), "features and distances of 1,000,000,000 images take"),
        (("--layer", "layer9"), "layer9"),
    ],
)
def test_bad_input_is_explained(arguments: tuple[str, ...], problem: str, run: Run, models: Path) -> None:
    status, out, err = run("plan", "digits", "--models", str(models), *arguments)
    assert status == 2 and problem in err and "Traceback" not in out + err


def test_the_disk_of_a_run_at_a_url_is_that_of_the_caches(run: Run, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the run stores its features, so there it looks for space when it chooses the geometry."""
    (tmp_path / "caches").mkdir()
    monkeypatch.setenv("KDX_CACHE", str(tmp_path / "caches"))
    too_many = ("--geometry", "whole", "--images", "1000000000")
    status, _, err = run("plan", "digits", "--models", str(models), *too_many, "--out", "s3://bucket/run")
    assert status == 2 and f"available in {tmp_path / 'caches'}." in err


def test_files_whose_operations_cannot_be_counted_are_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "explainer.onnx").write_bytes(b"")
    status, _, err = run("plan", "digits", "--models", "explainer.onnx")
    assert status == 2 and "does not accept explainer files" in err


def test_times_have_a_unit_that_fits() -> None:
    assert [command.time_text(seconds) for seconds in (0.25, 90, 600, 9000, 1e6)] == [
        "250 ms",
        "90.0 s",
        "10.0 minutes",
        "2.5 hours",
        "11.6 days",
    ]


def test_nothing_is_written(run: Run, models: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    status, _, err = run("plan", "sample:40:digits", "--models", str(models), "--batch", "16", "--geometry", "batch", "--runtime", "eager")
    assert (status, err) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert torch.is_grad_enabled()
