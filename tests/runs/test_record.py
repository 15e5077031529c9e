"""Reading a run back: what a record contains, and what is reported about a folder that cannot be read."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zarr

from kdx.errors import KdxError
from kdx.report.page import write_page
from kdx.report.terminal import scores_table
from kdx.runs import schema
from kdx.runs.measured import Entry
from kdx.runs.record import LostResult, read_run
from tests.made_runs import edit, entry, make_run


def _without(name: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return remove


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (shutil.rmtree, "no run folder"),
        (_without("manifest.json"), "no manifest.json"),
        (_without("scores.json"), "no scores.json"),
        (_without("samples.parquet"), "no samples.parquet"),
        (_without("maps.zarr"), "no maps.zarr"),
        (_without("maps.zarr/layer3"), "layer3/rs_student_minus_base"),
        (lambda f: (f / "manifest.json").write_text("{"), "not readable as JSON"),
        (lambda f: (f / "manifest.json").write_text("[]"), "is not a JSON object"),
        (lambda f: (f / "samples.parquet").write_bytes(b"PAR1"), "samples.parquet"),
        (lambda f: (f / "overlays" / "00002.png").write_bytes(b"no"), "00002.png"),
        (lambda f: edit(f / "manifest.json", status="running", images__explained=3), "not finished: 3 of 8 images"),
        (lambda f: edit(f / "manifest.json", format=2), "format 2"),
        (lambda f: edit(f / "manifest.json", format="first"), "not the manifest of a run"),
        (lambda f: edit(f / "scores.json", layers={}), "layer1"),
    ],
)
def test_a_folder_that_cannot_be_read_is_an_error_with_a_hint(tmp_path: Path, spoil: Callable[[Path], Any], problem: str) -> None:
    folder = make_run(tmp_path / "run", images=8, gallery=4)
    spoil(folder)
    for function in (write_page,) if "layer3/" in problem or ".png" in problem else (write_page, scores_table):
        with pytest.raises(KdxError) as caught:
            function(folder)
        assert problem in caught.value.problem
        assert caught.value.hint.endswith((".", "kdx"))
    assert not (folder / "report.html").exists()


def test_a_record_contains_what_the_files_contain(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", images=8, gallery=4)
    run = read_run(folder)
    manifest, stored = (json.loads((folder / name).read_text()) for name in (schema.MANIFEST, schema.SCORES_FILE))
    samples = pq.read_table(folder / schema.SAMPLES_FILE).to_pydict()
    assert run.manifest == manifest
    assert run.roles == ("teacher", "base", "student")
    assert run.layers == manifest["configuration"]["layers"]
    for role, network in run.networks.items():
        assert network.reference == manifest["configuration"]["models"][role]["reference"]
        assert (network.accuracy.value, network.correct, network.n) == tuple(
            stored["accuracy"][role][key] for key in ("value", "correct", "n")
        )
        assert run.samples.predictions[role].tolist() == samples[f"{role}_prediction"]
        assert run.samples.confidences[role].tolist() == samples[f"{role}_confidence"]
        assert run.samples.correct(role).sum() == network.correct
    for layer in run.layers:
        for entries, kind in ((run.scores, "scores"), (run.contrasts, "contrasts")):
            assert list(entries[layer]) == list(stored["layers"][layer][kind])
            assert {name: entry.value for name, entry in entries[layer].items()} == {
                name: entry["value"] for name, entry in stored["layers"][layer][kind].items()
            }
    rows = [3, 1]
    array = np.asarray(zarr.open_array(folder / schema.MAPS_FILE / "layer3" / "missed", mode="r"))
    assert np.array_equal(run.maps("layer3", "missed", rows), array[rows])
    assert run.maps("layer3", "missed", []).shape == (0, *array.shape[1:])
    assert run.picture(2).size == (32, 32)
    assert run.class_name(1) == "1" and run.class_name(7) == "class 7"


def test_reading_changes_nothing_in_the_folder(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", images=8, gallery=4)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run = read_run(folder)
    run.maps("layer1", "new", [0])
    run.picture(0)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("value", "half", "p", "sign", "settled"),
    [
        (0.3, 0.1, 0.001, 1, True),
        (-0.3, 0.1, None, -1, True),
        (0.3, 0.1, 0.2, 1, False),
        (0.1, 0.1, 0.001, 0, False),
        (math.nan, 0.1, 0.001, 0, False),
    ],
)
def test_an_entry_is_settled_by_interval_and_permutation_test(value: float, half: float, p: float | None, sign: int, settled: bool) -> None:
    number = Entry.of(entry(value, half, p))
    assert number.sign == sign and number.settled(0.95) is settled and number.known == math.isfinite(value)


def test_an_entry_is_settled_by_the_adjusted_p_value_if_it_has_one() -> None:
    stored = entry(0.3, 0.1, 0.03)
    assert Entry.of(stored).p_adjusted == 0.03 and Entry.of(stored).settled(0.95)  # an older run
    layers = Entry.of({**stored, "p_adjusted": 0.12})
    assert (layers.p_value, layers.p_adjusted) == (0.03, 0.12) and not layers.settled(0.95) and layers.settled(0.85)


def test_null_becomes_nan() -> None:
    number = Entry.of({"value": None, "interval": [None, 0.5]})
    assert math.isnan(number.value) and math.isnan(number.interval[0]) and not number.known


@pytest.mark.parametrize("damage", ["a text", "no p_value", "three bounds", "accuracy", "a list", "of maps", "no student", "no layer"])
def test_a_damaged_score_is_found_when_the_run_is_opened(finished: Path, tmp_path: Path, damage: str) -> None:
    """The damage is found at once, not later when a table is made."""
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run" / "scores.json"
    stored = json.loads(path.read_text())
    entry = stored["layers"]["layer2"]
    score = entry["scores"]["RS(S)"]
    if damage == "a text":
        score["n"] = "<script>"
    elif damage == "no p_value":
        del score["p_value"]
    elif damage == "three bounds":
        score["interval"] = [0, 1, 2]
    elif damage == "of maps":
        next(iter(entry["maps"].values()))["strength"] = {}
    elif damage == "accuracy":
        stored["accuracy"]["student"] = {"value": 1}
    elif damage == "a list":
        entry["maps"] = ["a list"]
    path.write_text(json.dumps(stored))
    if damage in ("no student", "no layer"):
        manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
        manifest["configuration"]["models" if damage == "no student" else "layers"] = {}
        (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(LostResult):
        read_run(tmp_path / "run")
