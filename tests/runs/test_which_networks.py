"""Runs of a student and a teacher without a base, and of a student alone: the results, the record and the page."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import kdx
from kdx.choices import GeometryName
from kdx.commands import explain
from kdx.data.dataset import open_data
from kdx.data.images import load_images
from kdx.models import read_models
from kdx.report.terminal import scores_table
from kdx.roles import ROLES, maps_among, score_maps_among, scores_among
from kdx.runs.record import RunRecord, read_run
from kdx.runs.run import RunOptions
from tests.runs.small_run import OPTIONS, SIZE, WHOLE, run


def run_of(folder: Path, out: Path, roles: tuple[str, ...], options: RunOptions = OPTIONS, layers: tuple[str, ...] = ()) -> RunRecord:
    """The record of a run with only these roles of the folder's models file."""
    absent = tuple(role for role in ("teacher", "base") if role not in roles)
    lines = (folder / "models.toml").read_text().splitlines(keepends=True)
    models = folder / f"{'-'.join(roles)}.toml"
    models.write_text("".join(line for line in lines if not line.startswith(absent)))
    explain.run(str(folder / "pictures"), models, out, layers, options, announce=lambda line: None)
    return read_run(out)


def test_base_none_is_a_models_file_without_a_base(folder: Path, tmp_path: Path) -> None:
    """In a run and in Python: the same results, and a page that does not mention a base of its own."""
    without = run_of(folder, tmp_path / "without", ("teacher", "student"))
    options = replace(OPTIONS, base="none")
    run(folder, tmp_path / "none", options)
    for file in ("scores.json", "scores.csv", "samples.parquet"):
        assert (tmp_path / "none" / file).read_bytes() == (tmp_path / "without" / file).read_bytes()
    record = read_run(tmp_path / "none")
    assert "base" not in record.networks and record.networks.keys() == without.networks.keys()
    pages = [re.sub(r"\d{4}-\d\d-\d\d.{1,30}?UTC", "", (tmp_path / name / "report.html").read_text()) for name in ("none", "without")]
    headings = [re.findall(r"<h[12][^>]*>.*?</h[12]>", page) for page in pages]
    assert headings[0] == headings[1] and "distilled" not in "".join(headings[0])
    with kdx.Explainer(folder / "models.toml", base="none", runtime="eager") as explainer:
        assert set(explainer.roles) == {"teacher", "student"}
    with pytest.raises(kdx.KdxError, match=r"cannot be 'other\.pth' here"):
        run(folder, tmp_path / "other", replace(OPTIONS, base="other.pth"))


@pytest.mark.parametrize(
    ("roles", "title", "words"),
    [
        (("student", "teacher"), "How the student differs from its teacher", ("Student right, teacher wrong", "RS(S) − RS(T)")),
        (("student",), "Where the student’s features are relevant", ("Student right", "RS(S)")),
    ],
)
def test_a_run_has_the_results_of_its_roles_and_a_page(
    folder: Path, finished: Path, tmp_path: Path, roles: tuple[str, ...], title: str, words: tuple[str, ...]
) -> None:
    record, three = run_of(folder, tmp_path / "run", roles, replace(OPTIONS, random_baseline=False)), read_run(finished)
    assert set(record.roles) == set(roles)
    assert record.score_names == tuple(scores_among(roles)) and set(record.map_kinds) == {*maps_among(roles), *score_maps_among(roles)}
    rows = [int(row) for row in record.samples.rows]
    for layer in record.layers:
        for name in record.score_names:
            assert record.scores[layer][name].value == pytest.approx(three.scores[layer][name].value, abs=1e-9)
        for kind in set(record.map_kinds) & set(three.map_kinds):
            np.testing.assert_allclose(record.maps(layer, kind, rows), three.maps(layer, kind, rows), rtol=1e-4, atol=1e-7)
    page = (tmp_path / "run" / "report.html").read_text()
    assert title in page and all(word in page for word in words)
    absent = {"base", "teacher"} - set(roles)
    text = re.sub(r"<[^>]*>", "", page.split('<main id="main">')[1].split('<section id="run"')[0])
    assert not [role for role in absent if re.search(rf"\bthe {role}\b|\b{role}:", text)]
    assert len(scores_table(tmp_path / "run").rows) == len(record.score_names) + len(record.contrast_names)


@pytest.mark.slow
def test_the_geometry_whole_of_a_student_and_a_teacher_with_their_own_layers(folder: Path, tmp_path: Path) -> None:
    layers = ("student=layer2,teacher=layer3", "layer3=layer3.0")
    record = run_of(folder, tmp_path / "run", ("student", "teacher"), WHOLE, layers)
    assert record.layers == {"layer2": "layer3", "layer3": "layer3.0"} and record.geometry == "whole"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<td><code>layer2</code></td><td><code>layer3</code></td>" in page
    assert all(record.map_summaries[layer]["missed"].null_strength is not None for layer in record.layers)


def test_other_layers_of_the_base_are_recorded(folder: Path, tmp_path: Path) -> None:
    record = run_of(folder, tmp_path / "run", ("student", "base"), replace(OPTIONS, permutations=0), ("student=layer2,base=layer3",))
    assert record.manifest["configuration"]["base_layers"] == {"layer2": "layer3"}
    assert "<td><code>layer2</code></td><td><code>layer3</code></td>" in (tmp_path / "run" / "report.html").read_text()
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["configuration"]["layers"] == {"layer2": "layer2"}


@pytest.mark.parametrize("geometry", [pytest.param("whole", marks=pytest.mark.slow), "batch"])
def test_a_run_of_spatial_means_has_no_score_maps_and_states_it(folder: Path, tmp_path: Path, geometry: GeometryName) -> None:
    options = replace(OPTIONS, pooled=True, geometry=geometry, permutations=9)
    record = run_of(folder, tmp_path / "run", ("student", "base", "teacher"), options)
    assert record.pooled and record.map_kinds == ("distilled", "residual", "missed", "new")
    assert "Distances are between spatial means" in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "manifest.json").read_text().count('"pooled": true') == 1


@pytest.mark.slow
@pytest.mark.parametrize("geometry", ["whole", "batch"])
def test_without_a_base_fss_has_the_baseline_of_random_weights(folder: Path, tmp_path: Path, geometry: GeometryName) -> None:
    options = replace(OPTIONS, geometry=geometry, batch=32, permutations=19)
    record = run_of(folder, tmp_path / "run", ("student", "teacher"), options)
    assert record.roles == ("teacher", "student")  # the baseline is no network of the run
    assert {"FSS(S,T)", "FSS(R,T)"} <= set(record.score_names) and "FSS(S,T) - FSS(R,T)" in record.contrast_names
    assert not [name for name in pq.read_schema(tmp_path / "run" / "samples.parquet").names if "random" in name]
    file = read_models(folder / "student-teacher.toml")
    networks: dict[str, Any] = {"student": file.load("student"), "teacher": file.load("teacher"), "random": file.untrained(options.seed)}
    data = open_data(str(folder / "pictures"), file.classes)
    pixels = load_images(data, np.arange(len(data.labels)), SIZE).pixels
    with kdx.Explainer(**networks, layers=file.layers, permutations=0, runtime="eager") as explainer:
        features = explainer.features(pixels)[1]
    for layer, entry in record.scores.items():
        expected = kdx.fss(features[layer]["random"], features[layer]["teacher"], permutations=0)
        assert entry["FSS(R,T)"].value == pytest.approx(expected.value, abs=1e-6)
        difference = record.contrasts[layer]["FSS(S,T) - FSS(R,T)"]
        assert difference.value == pytest.approx(entry["FSS(S,T)"].value - entry["FSS(R,T)"].value, abs=1e-9)
        assert difference.interval[0] < difference.value < difference.interval[1]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "random weights and teacher" in page and "FSS has no baseline here" not in page


@pytest.mark.slow
def test_with_a_base_the_baseline_is_on_request_and_changes_nothing_else(folder: Path, finished: Path, tmp_path: Path) -> None:
    record, before = run_of(folder, tmp_path / "run", ROLES, replace(OPTIONS, random_baseline=True)), read_run(finished)
    assert set(record.score_names) - set(before.score_names) == {"FSS(R,T)"} and record.map_kinds == before.map_kinds
    for layer in record.layers:
        assert all(
            record.scores[layer][name].value == pytest.approx(before.scores[layer][name].value, abs=1e-9) for name in before.score_names
        )
        rows = [int(row) for row in record.samples.rows]
        for kind in ("distilled", "fss_teacher"):
            np.testing.assert_allclose(record.maps(layer, kind, rows), before.maps(layer, kind, rows), rtol=1e-4, atol=1e-7)
    assert [card.name for card in (tmp_path / "run" / "overlays").glob("?????.png")] == [
        card.name for card in (finished / "overlays").glob("?????.png")
    ]
    assert "FSS has no baseline here" in (finished / "report.html").read_text()


def test_a_baseline_without_a_teacher_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(kdx.KdxError, match="compared with the teacher, and there is none"):
        run_of(folder, tmp_path / "run", ("student", "base"), replace(OPTIONS, random_baseline=True))
    assert not (tmp_path / "run").exists()


def test_an_explainer_file_gets_no_baseline(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(kdx.KdxError, match="runs only the networks that it contains"):
        explain.run(str(folder), tmp_path / "explainer.onnx", tmp_path / "run", options=replace(OPTIONS, random_baseline=True))
    assert not (tmp_path / "run").exists()
