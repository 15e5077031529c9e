"""The benchmark suite: its cases can be run, its checks can fail, and its figures are what they say."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import eager, explain, geometry, growth, imputation, limits, run, scores
from benchmarks.cases import CASES
from benchmarks.subject import Subject, Unavailable, Work, demand_memory, free_bytes, timed
from kdx.errors import KdxError

NETWORK = "kdx:resnet,width=8,depth=1-1-1-1,classes=10"


def test_every_case_is_of_a_kind_that_takes_its_arguments() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        for function in (run.KINDS[case.kind].subject, run.KINDS[case.kind].prepare):
            if function is not None:
                inspect.signature(function).bind(Path(), **case.given)


def test_a_batch_is_explained_alike_in_every_way(tmp_path: Path) -> None:
    given: dict[str, Any] = {"network": NETWORK, "layer": "layer3", "batch": 8, "side": 32}
    explain.prepare(tmp_path, **given)
    found = timed(explain.subject(tmp_path, **given, without=("compiled",)), 1)
    assert {"published", "fair", "bare passes", "kdx", "kdx, OpenVINO"} <= set(found["samples"])
    assert {"maps of fair", "scores of kdx", "maps of kdx, OpenVINO"} <= set(found["figures"])
    assert all(reason for reason in found["missing"].values())
    if not torch.cuda.is_available():
        assert "GPU" in found["missing"]["kdx, ONNX Runtime CUDA"]


def test_geometry_and_scores_are_compared() -> None:
    for subject in (
        geometry.subject(Path(), n=8, channels=6, height=3, width=4),
        scores.beside_dcor(Path(), n=40, d=5),
        scores.estimators(Path(), n=40, d=5),
    ):
        assert timed(subject, 1)["figures"]


@pytest.mark.parametrize("name", ["maps", "scores"])
def test_a_way_that_gives_something_else_is_never_timed(name: str) -> None:
    maps, moved = torch.rand(2, 4, 8, 8), (name == "maps", name == "scores")
    one = eager.Found(maps[0], maps[1], 0.5, 0.4, 0.3)
    other = eager.Found(maps[0] + 0.1 * moved[0], maps[1], 0.5 + 0.1 * moved[1], 0.4, 0.3)
    with pytest.raises(SystemExit, match=f"other is not what one gives.*{name}"):
        explain._alike({"one": one, "other": other})
    weights = [(torch.rand(4, 3), 0.5)] * 2
    with pytest.raises(SystemExit, match="other is not"):
        geometry._alike({"kdx": weights, "other": [(2 * weights[0][0], 0.5)] * 2})
    with pytest.raises(SystemExit, match="differ"):
        scores._agree({"dcor": 0.5, "kdx": 0.5 + 1e-6}, "dcor")
    with pytest.raises(SystemExit, match="direct solution"):
        imputation._alike({"kdx": [maps[0].numpy()], "spsolve": [maps[1].numpy()]})


def test_what_cannot_run_is_listed_with_its_reason() -> None:
    def refused(_: object) -> Any:
        raise KdxError("There is no such device.", "Buy one.")

    def full(_: object) -> Any:
        demand_memory(2 * free_bytes(), "a matrix")

    found = timed(Subject({"here": lambda _: lambda: 1, "refused": refused, "full": full}), 3)
    assert len(found["samples"]["here"]) == 3 and list(found["samples"]) == ["here"]
    assert found["missing"]["refused"] == "There is no such device." and found["missing"]["full"].startswith("a matrix: ")
    with pytest.raises(Unavailable, match="GiB are free"):
        full(None)


def test_a_floor_is_the_slower_of_operations_and_bytes() -> None:
    of = {"operations": 1e9, "bytes": 1e8}
    assert limits.floor(Work(2e9, 1e8), of) == 2 and limits.floor(Work(1e9, 5e8), of) == 5


def _record(over: str, ratios: dict[str, list[float]]) -> dict[str, Any]:
    return {"case": "a case", "over": over, "ratios": ratios}


def test_a_ratio_that_is_worse_is_told() -> None:
    was = _record("kdx", {"published": [19, 20, 21], "gone": [1, 1, 1]})
    assert not list(run.worse(_record("kdx", {"published": [18, 19.5, 20], "new": [1, 1, 1]}), was))
    assert not list(run.worse(_record("kdx", {"published": [30, 31, 32]}), was))
    (line,) = run.worse(_record("kdx", {"published": [9, 10, 11]}), was)
    assert "was 20 and is 10" in line
    was = _record("bare products", {"kdx": [1.4, 1.5, 1.6]})
    assert not list(run.worse(_record("bare products", {"kdx": [1, 1.1, 1.2]}), was))
    assert len(list(run.worse(_record("bare products", {"kdx": [1.9, 2, 2.1]}), was))) == 1


def test_a_record_replaces_the_case_s_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "SUITE", tmp_path / "suite.jsonl")
    second, first = CASES[1].name, CASES[0].name
    for case, value in ((second, 1), (first, 2), (second, 3)):
        run.keep({"case": case, "value": value})
    lines = [json.loads(line) for line in (tmp_path / "suite.jsonl").read_text().splitlines()]
    assert [(line["case"], line["value"]) for line in lines] == [(first, 2), (second, 3)]


def test_powers_are_those_of_the_times() -> None:
    given = {"channels": 2048, "height": 7, "width": 7}
    records = {
        str(n): {"kind": "geometry", "given": {"n": n, **given}, "samples": {"kdx": [1e-5 * n**2] * 3, "published": [1e-4 * n] * 3}}
        for n in (32, 64, 128)
    }
    lines = growth.curves(records)["images n of a batch, d = 100,352"]
    assert {line.label: round(line.exponent, 6) for line in lines} == {"kdx": 2, "published": 1}
    assert [line.sizes for line in lines] == [[32, 64, 128]] * 2
