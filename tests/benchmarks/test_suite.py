"""The benchmark suite: its cases can be run, its checks can fail, and its figures are correct."""

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

from benchmarks import decomposition, eager, explain, geometry, growth, imputation, limits, run, scores, stored
from benchmarks.cases import CASES, Case
from benchmarks.comparison import Comparison, Work, free_bytes, gram_work, require_memory
from benchmarks.goals import Goal
from benchmarks.workers import Worker, paired, serve
from kdx.errors import KdxError

NETWORK = "kdx:resnet,width=8,depth=1-1-1-1,classes=10"


def compared(comparison: Comparison) -> dict[str, Any]:
    """Each variant that runs here, once and in this process: the figures of the check, and the reasons of the other variants."""
    results, missing = {}, {}
    with ExitStack() as resources:
        for name in comparison.variants:
            variant, reason = comparison.open(name, resources)
            if variant is None:
                missing[name] = reason
            else:
                results[name] = variant()
    return {"ran": set(results), "figures": comparison.check(results), "missing": missing}


def test_every_case_has_a_kind_that_takes_its_arguments() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        for function in (run.KINDS[case.kind].compare, run.KINDS[case.kind].prepare):
            if function is not None:
                inspect.signature(function).bind(Path(), **case.arguments)


@pytest.mark.slow
def test_all_variants_explain_a_batch_alike(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"network": NETWORK, "layer": "layer3", "batch": 8, "side": 32}
    explain.prepare(tmp_path, **arguments)
    result = compared(explain.comparison(tmp_path, **arguments, without=("compiled",)))
    assert {"published", "fair", "fair, channels-last", "bare passes", "kdx", "kdx, OpenVINO"} <= result["ran"]
    assert {"residual map of fair", "fss of kdx", "distilled map of kdx, OpenVINO"} <= set(result["figures"])
    assert all(reason for reason in result["missing"].values())
    if not torch.cuda.is_available():
        for runtime in ("ONNX Runtime CUDA", "TensorRT"):
            assert "GPU" in result["missing"][f"kdx, {runtime}"]


def test_geometry_and_scores_are_compared() -> None:
    for comparison in (
        geometry.comparison(Path(), n=8, channels=6, height=3, width=4),
        decomposition.comparison(Path(), n=8, channels=9, height=3, width=4),
        scores.beside_dcor(Path(), n=40, d=5),
        scores.estimators(Path(), n=40, d=5),
    ):
        assert compared(comparison)["figures"]


@pytest.mark.parametrize("wrong", [0.1, math.nan])
@pytest.mark.parametrize("name", ["distilled", "residual", "fss", "rs_distilled", "rs_residual"])
def test_a_wrong_explanation_is_never_timed(name: str, wrong: float) -> None:
    maps = torch.rand(2, 4, 8, 8)
    explanation = eager.EagerResult(maps[0], maps[1], 0.5, 0.4, 0.3)
    other = replace(explanation, **{name: getattr(explanation, name) + wrong})
    assert explain._check({"first": explanation, "same": explanation})
    with pytest.raises(SystemExit, match=f"do not agree.*{name}.* of other by"):
        explain._check({"first": explanation, "same": explanation, "other": other})


@pytest.mark.parametrize("wrong", [0.1, math.nan])
@pytest.mark.parametrize("place", [0, 1])
def test_wrong_figures_are_never_timed(place: int, wrong: float) -> None:
    both = [(torch.rand(4, 3), 0.5)] * 2
    for other in ((both[0][0] + wrong, 0.5), (both[0][0], 0.5 + wrong)):
        result = [other if place == index else expected for index, expected in enumerate(both)]
        with pytest.raises(SystemExit, match="of other by"):
            geometry._check({"kdx": both, "other": result})
    shares = {"products": torch.eye(3), "student": torch.zeros(2, 4, 3, 3), "base": torch.zeros(2, 4, 3, 3)}
    shares["student"][0, 0, 0, 0], shares["base"][1, 2, 0, 0] = 0.5, 0.25
    shares["products"][0, 2], shares["products"][1, 2] = 0.5, 0.25
    assert decomposition._check({"geometry": {"products": shares["products"]}, "both": shares})
    with pytest.raises(SystemExit, match="of both by"):
        decomposition._check({"geometry": shares, "both": shares | {(name := list(shares)[2 * place]): shares[name] + wrong}})
    pair = {"first": 0.5, "second": 0.5}
    with pytest.raises(SystemExit, match="off by"):
        scores._check({"dcor": pair, "kdx": pair | {list(pair)[place]: 0.5 + wrong}})
    pixels = [np.zeros((3, 2)), np.zeros((3, 2))]
    changed = [image + wrong * (place == index) for index, image in enumerate(pixels)]
    with pytest.raises(SystemExit, match="a pixel of kdx by"):
        imputation._check({"spsolve": pixels, "another": pixels, "kdx": changed})


def test_a_variant_that_cannot_run_gives_the_reason() -> None:
    def refused(_: object) -> Any:
        raise KdxError("There is no such device.", "Buy one.")

    def full(_: object) -> Any:
        require_memory(2 * free_bytes(), "a matrix")

    answers: list[Any] = []
    comparison = Comparison({"refused": refused, "full": full})
    for name in comparison.variants:
        serve(partial(comparison.open, name), answers.append)
    assert answers[0] == {"missing": "There is no such device."} and answers[1]["missing"].startswith("a matrix: ")
    assert answers[1]["missing"].endswith("GiB are free")


def test_rounds_alternate_after_each_variant_is_warm() -> None:
    called: list[str] = []
    times = {"steady": iter([1.0] * 9), "falling": iter([9.0, 5.0, 2.0, 2.0, 2.0])}

    def run(name: str) -> float:
        called.append(name)
        return next(times[name])

    samples = paired({name: partial(run, name) for name in times}, 3)
    assert called[:4] == ["steady", "steady", "falling", "falling"]
    assert called[4:] == ["steady", "falling", "falling", "steady", "steady", "falling"]
    assert samples == {"steady": [1, 1, 1], "falling": [2, 2, 2]}
    called.clear()
    times = {"steady": iter([1.0]), "falling": iter([9.0])}
    assert paired({name: partial(run, name) for name in times}, 1) == {"steady": [1], "falling": [9]} and len(called) == 2


@pytest.mark.slow
def test_a_case_runs_each_variant_in_its_own_process() -> None:
    arguments = {"n": 8, "channels": 6, "height": 3, "width": 4}
    case = Case("a small batch", "geometry", arguments, goals=(Goal("published", "least", 1e9), Goal("absent", "least", 1)))
    record = run.run_case(case, 2, {"operations": 1e9, "operations, bf16": 1e9, "bytes": 1e12})
    assert {name: len(seconds) for name, seconds in record["samples"].items()} == {"published": 2, "fair": 2, "kdx": 2}
    assert record["ratios"].keys() == {"published", "fair"} and not record["missing"]
    assert 0 <= record["figures"]["residual score of fair"] < geometry.TOLERANCE
    assert all(5e7 < peak < 5e9 for peak in record["peak_bytes"].values())
    assert record["work"]["operations"] == 2 * 8 * 8 * 72
    assert record["over_floor"]["kdx"] == pytest.approx(np.median(record["samples"]["kdx"]) / (2 * 8 * 8 * 72 / 1e9))
    assert [goal["holds"] for goal in record["goals"]] == [False, None]


@pytest.mark.slow
def test_a_process_that_fails_fails_its_case() -> None:
    wrong = ("--kind", "geometry", "--arguments", "{}", "--folder", ".", "--variant", "kdx")
    with Worker("benchmarks.run", "--child", "variant", *wrong) as worker, pytest.raises(subprocess.CalledProcessError):
        worker.opened()
    with pytest.raises(subprocess.CalledProcessError):
        run.run_case(Case("wrong", "geometry", {"n": "many"}), 1, {})


def test_the_lower_bound_is_the_slower_of_operations_and_bytes() -> None:
    machine = {"operations": 1e9, "operations, bf16": 4e9, "bytes": 1e8}
    assert limits.lower_bound(Work(2e9, 1e8), machine) == 2 and limits.lower_bound(Work(1e9, 5e8), machine) == 5
    assert limits.lower_bound(Work(8e9, 1e8), machine, bfloat16=True) == 2


def _record(baseline: str, ratios: dict[str, list[float]], kdx: tuple[str, ...] = ("kdx",), missing: str = "") -> dict[str, Any]:
    samples = {name: [1.0] for name in (*ratios, baseline) if name != missing}
    present = {} if missing == baseline else {name: values for name, values in ratios.items() if name != missing}
    return {"case": "a case", "over": baseline, "ours": kdx, "samples": samples, "ratios": present, "missing": {missing: "It broke."}}


def test_a_worse_ratio_is_reported() -> None:
    before = _record("kdx", {"published": [19, 20, 21], "kdx, another runtime": [0.9, 1, 1.1], "gone": [1, 1, 1]})
    same: dict[str, list[float]] = {"published": [18, 19.5, 20], "kdx, another runtime": [0.9, 1, 1.1], "new": [1, 1, 1]}
    assert not list(stored.worse(_record("kdx", same), before))
    better = same | {"published": [30, 31, 32], "kdx, another runtime": [0.4, 0.5, 0.6]}
    assert not list(stored.worse(_record("kdx", better), before))
    (line,) = stored.worse(_record("kdx", same | {"published": [9, 10, 11]}), before)
    assert "published over kdx was 20 and is 10" in line
    (line,) = stored.worse(_record("kdx", same | {"kdx, another runtime": [1.4, 1.5, 1.6]}), before)
    assert "another runtime over kdx was 1 and is 1.5" in line
    for missing in ("kdx", "kdx, another runtime"):
        (line,) = stored.worse(_record("kdx", same, missing=missing), before)
        assert f"{missing} does not run: It broke." in line
    before = _record("bare products", {"kdx": [1.4, 1.5, 1.6], "dcor": [5, 5, 5]})
    assert not list(stored.worse(_record("bare products", {"kdx": [1, 1.1, 1.2], "dcor": [50, 50, 50]}), before))
    assert len(list(stored.worse(_record("bare products", {"kdx": [1.9, 2, 2.1], "dcor": [1, 1, 1]}), before))) == 1


def test_a_failing_case_is_reported_and_the_others_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(limits, "limits", lambda: dict.fromkeys(("operations", "operations, one thread", "operations, bf16", "bytes"), 1e9))
    record = _record("kdx", {"published": [19, 20, 21]}) | {"peak_bytes": {"kdx": 1e9, "published": 1e9}, "figures": {}, "goals": []}

    def run_case(case: Case, *_: object) -> dict[str, Any]:
        if case.name == "broken":
            raise subprocess.CalledProcessError(1, "python")
        return record

    monkeypatch.setattr(run, "run_case", run_case)
    cases = [Case(name, "geometry", {}) for name in ("broken", "a case")]
    assert run.run_all(cases, 2, {}, store=False) == 1
    output = capsys.readouterr().out
    assert "broken: failed" in output and "published" in output
    assert run.run_all(cases[1:], 2, {}, store=False) == 0
    assert run.run_all(cases[1:], 2, {"a case": _record("kdx", {"published": [29, 30, 31]})}, store=False) == 1


def test_a_record_replaces_the_stored_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "SUITE", tmp_path / "suite.jsonl")
    second, first = CASES[1].name, CASES[0].name
    for case, value in ((second, 1), (first, 2), (second, 3)):
        stored.store({"case": case, "value": value})
    lines = [json.loads(line) for line in (tmp_path / "suite.jsonl").read_text().splitlines()]
    assert [(line["case"], line["value"]) for line in lines] == [(first, 2), (second, 3)]


def test_exponents_are_those_of_the_times() -> None:
    shape = {"channels": 2048, "height": 7, "width": 7}
    records = {
        str(n): {"kind": "geometry", "given": {"n": n, **shape}, "samples": {"kdx": [1e-5 * n**2] * 3, "published": [1e-4 * n] * 3}}
        for n in (32, 64, 128)
    }
    lines = growth.curves(records)["images n per batch, d = 100,352"]
    assert {line.label: round(line.exponent, 6) for line in lines} == {"kdx": 2, "published": 1}
    assert [line.sizes for line in lines] == [[32, 64, 128]] * 2


def test_gram_work_counts_half_of_each_product_and_each_matrix_once() -> None:
    assert gram_work(10, 3) == Work(2 * 10 * 10 * 3, 2 * 4 * 10 * 3)
    assert gram_work(10, 3, matrices=3, batch=5, itemsize=8) == Work(3 * 2 * 5 * 5 * 3, 3 * 8 * 10 * 3)


@pytest.mark.parametrize(("quantity", "value", "label"), [("ratio", 3, "a over b"), ("seconds", 6, "a"), ("extra seconds", 4, "a minus b")])
def test_goals_are_judged_by_the_median_of_their_quantity(quantity: Any, value: float, label: str) -> None:
    samples = {"a": [4.0, 6.0, 90.0], "b": [1.0, 2.0, 30.0]}  # ratios 4, 3, 3; differences 3, 4, 60
    bounds: list[tuple[Any, float, bool]] = [
        ("most", value, True),
        ("most", value - 0.1, False),
        ("least", value, True),
        ("least", value + 0.1, False),
    ]
    for bound, limit, holds in bounds:
        entry = Goal("a", bound, limit, quantity).judged("b", samples)
        assert (entry["ratio"], entry["found"], entry["holds"]) == (label, value, holds)
    assert Goal("c", "most", 1, quantity).judged("b", samples)["holds"] is None
    assert Goal("a", "most", 9, quantity).judged("c", samples)["holds"] is (True if quantity == "seconds" else None)
