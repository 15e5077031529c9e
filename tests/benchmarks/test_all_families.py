"""The checks of every family find the faults that they look for, and their results survive a process that stops."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdx
from benchmarks import all_families, family_checks
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


def test_a_wrong_grad_cam_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    correct = kdx.grad_cam

    def wrong(*arguments: Any) -> Any:
        maps = correct(*arguments)
        return type(maps)(maps.maps * 1.01, maps.weights, maps.classes, maps.logits)

    monkeypatch.setattr(kdx, "grad_cam", wrong)
    assert family_checks.grad_cam_error(network(resnet(4, 1, 5)), "layer2")["error"] == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    ("end", "reason"), [(lambda: os._exit(3), "the process ended"), (lambda: [None for _ in iter(int, 1)], "not finished after 1 s")]
)
def test_results_survive_a_process_that_stops(
    end: Callable[[], object], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(row: dict[str, Any], _stages: object, store: Callable[[dict[str, Any]], None]) -> None:
        store(row | {"layers": {"names": ["a"]}, "grad_cam": {"stopped": True}})
        end()

    monkeypatch.setattr(family_checks, "check", check)
    monkeypatch.setattr(all_families, "RESULT", tmp_path / "families.json")
    row = all_families._checked({"network": "a:network"}, ["layers", "grad_cam"], 1)
    assert row == {"network": "a:network", "layers": {"names": ["a"]}, "grad_cam": {"stopped": reason}}
    assert all_families.read()["networks"] == [row]


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
    ]
    text = all_families.table({"networks": rows})
    assert text.startswith("2 of 3 networks export in all three kinds, and 1 pass every check. 1 more networks have run in part.")
    assert "| timm:two | `b` | 1e-07 | 5 cells away | 1e-06 | 1e-06 | 1e-06 |" in text
    assert "- timm:three, gradients: refused: Too many steps." in text
