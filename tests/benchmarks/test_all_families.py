"""The checks of every family find the faults that they look for, and their results survive a process that stops."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdx
from benchmarks import all_families, family_checks, family_networks
from benchmarks.all_families import Limits
from kdx.errors import KdxError
from kdx.export.graphs import Preprocessing
from kdx.models.network import Network
from kdx.models.resnet import resnet


class Rearranged(nn.Module):
    """A network with a layer whose positions are not in the order of the image."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, 4)
        self.layer = nn.Conv2d(6, 6, 1)
        self.fc = nn.Linear(6, 4)
        self.change = change

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.layer(self.change(self.stem(images).tanh())).relu().mean((2, 3)))
        return logits


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def network(module: nn.Module) -> Network:
    return Network("a:network", module.eval(), Preprocessing((64, 64), (0.4,), (0.3,)))


def test_grad_cam_and_positions_of_a_plain_network() -> None:
    plain = network(resnet(4, 1, 5))
    result = family_checks.grad_cam_error(plain, "layer2")
    assert result["error"] < family_checks.TOLERANCE and result["grid"] == [32, 32]
    where = family_checks.patch_distance(plain, "layer2")
    assert where["distance"] <= family_checks.MARGIN and where["contrast"] > 2


@pytest.mark.parametrize(
    "change",
    [lambda x: x.transpose(2, 3), lambda x: x.flip(3), lambda x: x.flip(2), lambda x: x.roll((4, 4), (2, 3))],
    ids=["transposed", "mirrored", "upside down", "shifted"],
)
def test_positions_in_another_order_are_found(change: Callable[[Tensor], Tensor]) -> None:
    assert family_checks.patch_distance(network(Rearranged(change)), "layer")["distance"] > family_checks.MARGIN


def test_a_layer_that_spreads_a_patch_is_checked_by_an_earlier_layer_of_its_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    results = {
        "other grid": {"distance": 0, "grid": [16, 16]},
        "plain": {"distance": 0, "grid": [8, 8]},
        "spread": {"distance": 5, "grid": [8, 8]},
        "turned": {"distance": 6, "grid": [4, 4]},
    }
    monkeypatch.setattr(family_checks, "patch_distance", lambda _, layer: results[layer])
    plain, names = network(resnet(4, 1, 5)), list(results)
    assert family_checks.patch_in_grid(plain, "spread", names) == {"distance": 0, "grid": [8, 8], "layer": "plain"}
    assert family_checks.patch_in_grid(plain, "turned", names) == results["turned"]
    assert family_checks.patch_in_grid(plain, "plain", names) == results["plain"]


def test_a_wrong_grad_cam_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = kdx.grad_cam

    def wrong(*arguments: Any) -> Any:
        maps = correct(*arguments)
        return type(maps)(maps.maps * 1.01, maps.weights, maps.classes, maps.logits)

    monkeypatch.setattr(kdx, "grad_cam", wrong)
    assert family_checks.grad_cam_error(network(resnet(4, 1, 5)), "layer2")["error"] == pytest.approx(0.01, rel=1e-3)


def checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: Callable[[], object], limits: Limits) -> list[dict[str, Any]]:
    """The rows that are stored by a run over three networks, of which each finishes two stages and then runs ``end``."""

    def check(row: dict[str, Any], _stages: object, store: Callable[[dict[str, Any]], None]) -> None:
        store(row | {"layers": {"names": ["a"]}, "grad_cam": {"stopped": True}})
        end()

    monkeypatch.setattr(family_checks, "check", check)
    monkeypatch.setattr(all_families, "RESULT", tmp_path / "families.json")
    all_families.run(["timm:a", "timm:b", "timm:c"], ["layers", "grad_cam"], limits)
    return [{key: row.get(key) for key in ("network", "layers", "grad_cam")} for row in all_families.read()["networks"]]


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        (lambda: os._exit(3), "the process ended with 3"),
        pytest.param(lambda: [None for _ in iter(int, 1)], "not finished after 1 s", marks=pytest.mark.slow),
    ],
)
def test_results_survive_a_process_that_stops(
    end: Callable[[], object], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = checked(tmp_path, monkeypatch, end, Limits(3, 1))
    assert rows == [{"network": f"timm:{name}", "layers": {"names": ["a"]}, "grad_cam": {"stopped": reason}} for name in "abc"]


def test_a_run_ends_at_its_deadline_and_keeps_the_stages_that_are_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = time.monotonic()
    rows = checked(tmp_path, monkeypatch, lambda: time.sleep(60), Limits(2, deadline=start + 1))
    assert time.monotonic() - start < 10
    assert rows == [{"network": f"timm:{name}", "layers": {"names": ["a"]}, "grad_cam": None} for name in "ab"]


def test_a_process_that_needs_too_much_memory_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(row: dict[str, Any], _stages: object, store: Callable[[dict[str, Any]], None]) -> None:
        family_checks._run(row, "layers", store, lambda: {"names": [str(torch.ones(int(8e9), dtype=torch.uint8).sum())]})

    monkeypatch.setattr(family_checks, "check", check)
    monkeypatch.setattr(all_families, "RESULT", tmp_path / "families.json")
    all_families.run(["timm:a"], ["layers"], Limits(gigabytes=4))
    assert all_families.read()["networks"][0]["layers"]["stopped"] == "it needs more memory than the limit"


def test_rows_of_another_file_replace_those_with_fewer_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_families, "RESULT", tmp_path / "families.json")
    half: dict[str, Any] = {"layers": {"names": ["a"]}}
    whole = half | {"features": {"error": 1e-6}}
    all_families.write({"rows": [1], "networks": [{"network": "timm:a", **half}, {"network": "timm:b", **whole}]})
    other = tmp_path / "other.json"
    all_families.write(
        {"networks": [{"network": f"timm:{name}", **row} for name, row in zip("abc", (whole, half, half), strict=True)]}, other
    )
    all_families.merge([other])
    record = all_families.read()
    assert record["rows"] == [1]
    assert record["networks"] == [{"network": "timm:a", **whole}, {"network": "timm:b", **whole}, {"network": "timm:c", **half}]


def test_an_incomplete_row_of_other_versions_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(all_families, "RESULT", tmp_path / "families.json")
    old = {"network": "timm:a", "commit": "c", "environment": {"torch": "1.0"}, "patch": {"distance": 0}, "layers": {"names": ["b"]}}
    all_families.write({"networks": [old]})
    checked(tmp_path, monkeypatch, lambda: None, Limits())
    row = all_families.read()["networks"][0]
    assert row["layers"] == {"names": ["a"]} and "patch" not in row
    assert row["environment"]["torch"] == torch.__version__ and row["environment"]["timm"]


def test_a_stage_states_whether_kdx_refused_it_or_it_failed() -> None:
    def refused() -> dict[str, Any]:
        raise KdxError("It has no grid.", "Name another layer.")

    def failed() -> dict[str, Any]:
        raise ValueError("a shape")

    row: dict[str, Any] = {}
    for stage, work in {"layers": dict, "patch": refused, "features": failed}.items():
        family_checks._run(row, stage, lambda _: None, work)
    assert row["patch"]["refused"] == "It has no grid. Name another layer." and row["features"]["failed"] == "ValueError: a shape"
    assert [family_checks.is_successful(row[stage]) for stage in ("layers", "patch", "features")] == [True, False, False]


def test_the_table_counts_the_networks_that_export_in_every_kind() -> None:
    place = {"environment": {"processor": "P", "torch": "2"}, "commit": "c", "layer": "b"}
    good = {"layers": {"names": ["a", "b"]}, "grad_cam": {"error": 1e-7}, "patch": {"distance": 1}}
    exports = {kind: {"error": 1e-6} for kind in family_checks.EXPORTS}
    rows = [
        {"network": "timm:one", **place, **good, **exports},
        {"network": "timm:two", **place, **good, **exports, "patch": {"distance": 5}},
        {"network": "timm:three", **place, **good, **exports, "gradients": {"refused": "Too many steps."}},
        {"network": "timm:four", **place, "layers": {"names": ["a"]}},
        {"network": "timm:five", **place, "build": {"refused": "It takes no image."}},
    ]
    text = all_families.table({"networks": rows})
    assert text.startswith(
        "5 networks: 1 passed every check, 2 were refused with a reason, 1 failed a check, and 1 have run only in part. "
        "2 were exported in all three kinds."
    )
    assert "| timm:two | `b` | 1e-07 | 5 cells away | 1e-06 | 1e-06 | 1e-06 |" in text
    assert "- timm:three, gradients: refused: Too many steps." in text


class Attending(nn.Module):
    """Attention in which each position's query is compared with all keys, on features of a normalised convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.BatchNorm2d(16))
        self.queries, self.keys = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
        self.fc = nn.Linear(16, 4)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def attention(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        queries, keys = (convolution(features).flatten(2) for convolution in (self.queries, self.keys))
        return torch.softmax(queries.transpose(1, 2) @ keys, 2)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc((self.stem(images).flatten(2) @ self.attention(images).transpose(1, 2)).mean(2))
        return logits


def test_weights_of_normalised_convolutions_are_drawn_and_those_of_attention_stay() -> None:
    module, images = Attending().eval(), torch.rand(4, 3, 32, 32) * 2 - 1
    convolution: Any = module.stem[0]
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    family_networks._calibrate(module, Preprocessing((32, 32), (0.5,), (0.5,)), draw_weights=True)
    changed = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"stem.0.weight"}
    with torch.no_grad():
        scale, attention = convolution(images).std() / images.std(), module.attention(images)
    assert 0.5 < float(scale) < 2  # a kaiming draw keeps the scale, up to the factor sqrt(2) for a ReLU
    assert float(attention.max()) < 2 / 64  # of 64 positions; saturated attention would have values near 1


class Constants(nn.Module):
    """A network whose only map is the same for every image."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.fc = Constant(), nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.table(images).mean(1)) * images.mean((1, 2, 3))[:, None]
        return logits


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.values, self.scales = nn.Parameter(torch.randn(16, 4)), nn.Parameter(torch.randn(16, 4))

    def forward(self, images: Tensor) -> Tensor:
        return (self.values * self.scales).expand(len(images), -1, -1)


def test_a_network_without_a_layer_to_advise_is_refused_with_the_reason() -> None:
    assert "no axis along which the images differ" in family_checks._advised(network(Constants()))["refused"]
