"""The benchmark suite: its cases can be run, its checks can fail, and its figures are what they say."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import eager, explain, geometry, growth, imputation, limits, run, scores
from benchmarks.cases import CASES, Case
from benchmarks.subject import Subject, Unavailable, Work, demand_memory, free_bytes
from benchmarks.workers import Worker, paired, serve
from kdx.errors import KdxError

NETWORK = "kdx:resnet,width=8,depth=1-1-1-1,classes=10"


def compared(subject: Subject) -> dict[str, Any]:
    """Every way that runs here, once and in this process: what the check says of their results, and why the others do not run."""
    results, missing = {}, {}
    with ExitStack() as held:
        for name in subject.ways:
            try:
                results[name] = subject.opened(name, held)()
            except Unavailable as error:
                missing[name] = str(error)
    return {"ran": set(results), "figures": subject.check(results), "missing": missing}


def test_every_case_is_of_a_kind_that_takes_its_arguments() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        for function in (run.KINDS[case.kind].subject, run.KINDS[case.kind].prepare):
            if function is not None:
                inspect.signature(function).bind(Path(), **case.given)


def test_a_batch_is_explained_alike_in_every_way(tmp_path: Path) -> None:
    given: dict[str, Any] = {"network": NETWORK, "layer": "layer3", "batch": 8, "side": 32}
    explain.prepare(tmp_path, **given)
    found = compared(explain.subject(tmp_path, **given, without=("compiled",)))
    assert {"published", "fair", "fair, channels-last", "bare passes", "kdx", "kdx, OpenVINO"} <= found["ran"]
    assert {"residual map of fair", "fss of kdx", "distilled map of kdx, OpenVINO"} <= set(found["figures"])
    assert all(reason for reason in found["missing"].values())
    if not torch.cuda.is_available():
        for runtime in ("ONNX Runtime CUDA", "ONNX Runtime TensorRT", "TensorRT"):
            assert "GPU" in found["missing"][f"kdx, {runtime}"]


def test_geometry_and_scores_are_compared() -> None:
    for subject in (
        geometry.subject(Path(), n=8, channels=6, height=3, width=4),
        scores.beside_dcor(Path(), n=40, d=5),
        scores.estimators(Path(), n=40, d=5),
    ):
        assert compared(subject)["figures"]


@pytest.mark.parametrize("wrong", [0.1, math.nan])
@pytest.mark.parametrize("name", ["distilled", "residual", "fss", "rs_distilled", "rs_residual"])
def test_an_explanation_that_is_another_one_is_never_timed(name: str, wrong: float) -> None:
    maps = torch.rand(2, 4, 8, 8)
    one = eager.Found(maps[0], maps[1], 0.5, 0.4, 0.3)
    other = replace(one, **{name: getattr(one, name) + wrong})
    assert explain._alike({"one": one, "same": one})
    with pytest.raises(SystemExit, match=f"do not agree.*{name}.* of other by"):
        explain._alike({"one": one, "same": one, "other": other})


@pytest.mark.parametrize("wrong", [0.1, math.nan])
@pytest.mark.parametrize("place", [0, 1])
def test_figures_that_are_other_ones_are_never_timed(place: int, wrong: float) -> None:
    both = [(torch.rand(4, 3), 0.5)] * 2
    for other in ((both[0][0] + wrong, 0.5), (both[0][0], 0.5 + wrong)):
        found = [other if place == index else each for index, each in enumerate(both)]
        with pytest.raises(SystemExit, match="of other by"):
            geometry._alike({"kdx": both, "other": found})
    pair = {"first": 0.5, "second": 0.5}
    with pytest.raises(SystemExit, match="off by"):
        scores._agree({"dcor": pair, "kdx": pair | {list(pair)[place]: 0.5 + wrong}})
    pixels = [np.zeros((3, 2)), np.zeros((3, 2))]
    permuted = [each + wrong * (place == index) for index, each in enumerate(pixels)]
    with pytest.raises(SystemExit, match="a pixel of kdx by"):
        imputation._alike({"spsolve": pixels, "another": pixels, "kdx": permuted})


def test_what_cannot_run_says_why() -> None:
    def refused(_: object) -> Any:
        raise KdxError("There is no such device.", "Buy one.")

    def full(_: object) -> Any:
        demand_memory(2 * free_bytes(), "a matrix")

    said: list[Any] = []
    subject = Subject({"refused": refused, "full": full})
    for name in subject.ways:
        serve(partial(subject.opened, name), said.append)
    assert said[0] == {"missing": "There is no such device."} and said[1]["missing"].startswith("a matrix: ")
    assert said[1]["missing"].endswith("GiB are free")


def test_rounds_alternate_after_each_way_is_warm() -> None:
    called: list[str] = []
    times = {"steady": iter([1.0] * 9), "falling": iter([9.0, 5.0, 2.0, 2.0, 2.0])}

    def run(name: str) -> float:
        called.append(name)
        return next(times[name])

    found = paired({name: partial(run, name) for name in times}, 3)
    assert called[:4] == ["steady", "steady", "falling", "falling"]
    assert called[4:] == ["steady", "falling", "falling", "steady", "steady", "falling"]
    assert found == {"steady": [1, 1, 1], "falling": [2, 2, 2]}
    called.clear()
    times = {"steady": iter([1.0]), "falling": iter([9.0])}
    assert paired({name: partial(run, name) for name in times}, 1) == {"steady": [1], "falling": [9]} and len(called) == 2


def test_a_case_runs_each_way_in_its_process() -> None:
    given = {"n": 8, "channels": 6, "height": 3, "width": 4}
    case = Case("a small batch", "geometry", given, goals=(("published", "least", 1e9), ("absent", "least", 1)))
    record = run.run_case(case, 2, {"operations": 1e9, "operations, bf16": 1e9, "bytes": 1e12})
    assert {way: len(seconds) for way, seconds in record["samples"].items()} == {"published": 2, "fair": 2, "kdx": 2}
    assert record["ratios"].keys() == {"published", "fair"} and not record["missing"]
    assert 0 <= record["figures"]["residual score of fair"] < geometry.WITHIN
    assert all(5e7 < peak < 5e9 for peak in record["peak_bytes"].values())
    assert record["work"]["operations"] == 2 * 8 * 8 * 72
    assert record["over_floor"]["kdx"] == pytest.approx(np.median(record["samples"]["kdx"]) / (2 * 8 * 8 * 72 / 1e9))
    assert [goal["holds"] for goal in record["goals"]] == [False, None]


def test_a_process_that_fails_fails_its_case() -> None:
    wrong = ("--kind", "geometry", "--given", "{}", "--folder", ".", "--way", "kdx")
    with Worker("benchmarks.run", "--child", "way", *wrong) as worker, pytest.raises(subprocess.CalledProcessError):
        worker.opened()
    with pytest.raises(subprocess.CalledProcessError):
        run.run_case(Case("wrong", "geometry", {"n": "many"}), 1, {})


def test_a_floor_is_the_slower_of_operations_and_bytes() -> None:
    of = {"operations": 1e9, "operations, bf16": 4e9, "bytes": 1e8}
    assert limits.floor(Work(2e9, 1e8), of) == 2 and limits.floor(Work(1e9, 5e8), of) == 5
    assert limits.floor(Work(8e9, 1e8), of, bfloat16=True) == 2


def _record(over: str, ratios: dict[str, list[float]], ours: tuple[str, ...] = ("kdx",), missing: str = "") -> dict[str, Any]:
    samples = {way: [1.0] for way in (*ratios, over) if way != missing}
    kept = {} if missing == over else {way: values for way, values in ratios.items() if way != missing}
    return {"case": "a case", "over": over, "ours": ours, "samples": samples, "ratios": kept, "missing": {missing: "It broke."}}


def test_a_ratio_that_is_worse_is_told() -> None:
    was = _record("kdx", {"published": [19, 20, 21], "kdx, another way": [0.9, 1, 1.1], "gone": [1, 1, 1]})
    same: dict[str, list[float]] = {"published": [18, 19.5, 20], "kdx, another way": [0.9, 1, 1.1], "new": [1, 1, 1]}
    assert not list(run.worse(_record("kdx", same), was))
    assert not list(run.worse(_record("kdx", same | {"published": [30, 31, 32], "kdx, another way": [0.4, 0.5, 0.6]}), was))
    (line,) = run.worse(_record("kdx", same | {"published": [9, 10, 11]}), was)
    assert "published over kdx was 20 and is 10" in line
    (line,) = run.worse(_record("kdx", same | {"kdx, another way": [1.4, 1.5, 1.6]}), was)
    assert "another way over kdx was 1 and is 1.5" in line
    for missing in ("kdx", "kdx, another way"):
        (line,) = run.worse(_record("kdx", same, missing=missing), was)
        assert f"{missing} does not run: It broke." in line
    was = _record("bare products", {"kdx": [1.4, 1.5, 1.6], "dcor": [5, 5, 5]})
    assert not list(run.worse(_record("bare products", {"kdx": [1, 1.1, 1.2], "dcor": [50, 50, 50]}), was))
    assert len(list(run.worse(_record("bare products", {"kdx": [1.9, 2, 2.1], "dcor": [1, 1, 1]}), was))) == 1


def test_a_case_that_fails_is_told_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(limits, "limits", lambda: dict.fromkeys(("operations", "operations, one thread", "operations, bf16", "bytes"), 1e9))
    whole = _record("kdx", {"published": [19, 20, 21]}) | {"peak_bytes": {"kdx": 1e9, "published": 1e9}, "figures": {}, "goals": []}

    def run_case(case: Case, *_: object) -> dict[str, Any]:
        if case.name == "broken":
            raise subprocess.CalledProcessError(1, "python")
        return whole

    monkeypatch.setattr(run, "run_case", run_case)
    cases = [Case(name, "geometry", {}) for name in ("broken", "a case")]
    assert run.run_all(cases, 2, {}, store=False) == 1
    said = capsys.readouterr().out
    assert "broken: failed" in said and "published" in said
    assert run.run_all(cases[1:], 2, {}, store=False) == 0
    assert run.run_all(cases[1:], 2, {"a case": _record("kdx", {"published": [29, 30, 31]})}, store=False) == 1


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
