"""The folder of a run as it is written: names on disk, what survives a kill, and what is refused."""

from __future__ import annotations

import csv
import json
import math
import resource
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import zarr

from kdx.errors import KdxError
from kdx.kernels.moments import Moments
from kdx.runs import schema
from kdx.runs.progress_records import BatchRecord, LayerProducts
from kdx.runs.schema import Configuration, Context, StoredScores
from kdx.runs.store import Store
from tests.made_runs import entry

CONFIGURATION = cast(Configuration, {"data": "digits", "fingerprint": "ab12", "layers": {"a/b": "c"}, "image_size": (8, 8)})
CONTEXT: Context = {"kdx": "0", "created": "", "command": [], "environment": {}, "classes": [], "method": None, "batches": 2}
LAYER = "block/layer3"


def record(batch: int = 0, moments: bool = True) -> BatchRecord:
    generator = torch.Generator().manual_seed(batch)
    products = LayerProducts(
        torch.rand(4, 4, generator=generator, dtype=torch.float64),
        {"teacher": torch.rand(5, 4, generator=generator), "target": torch.rand(5, 4, generator=generator)},
        Moments(3, *(torch.rand(*shape, generator=generator) for shape in ((9, 9), (9, 9), (9, 9, 9)))) if moments else None,
    )
    columns = {schema.INDEX: np.arange(3) + batch, "student_prediction": np.array([0, 1, 1])}
    return BatchRecord(columns, {LAYER: products}, (("dog/torn.png", "truncated"),))


@pytest.mark.parametrize("moments", [True, False])
def test_a_batch_is_read_back_as_it_was_written(tmp_path: Path, moments: bool) -> None:
    maps = np.random.default_rng(0).random((3, 2, 5)).astype(np.float32)
    expected = record(1, moments)
    with Store.begin(tmp_path / "run", CONFIGURATION, CONTEXT) as store:
        assert not store.has(1)
        store.write_batch(1, 4, 8, {LAYER: {"distilled": maps}}, expected)
        assert store.has(1) and not store.has(0)
        actual = store.read_batch(1)
    assert actual.unreadable == expected.unreadable
    assert actual.columns.keys() == expected.columns.keys()
    assert all(np.array_equal(actual.columns[name], values) for name, values in expected.columns.items())
    products, permuted, known = actual.layers[LAYER]
    assert torch.equal(products, expected.layers[LAYER].products)
    assert permuted.keys() == expected.layers[LAYER].permuted.keys()
    assert all(torch.equal(permuted[name], rows) for name, rows in expected.layers[LAYER].permuted.items())
    if not moments:
        assert known is None
    else:
        written = expected.layers[LAYER].moments
        assert known is not None and written is not None and known.parts == written.parts == 3
        assert all(torch.equal(getattr(known, name), getattr(written, name)) for name in ("variance", "interaction", "slope"))
    stored = np.asarray(zarr.open_array(tmp_path / "run" / "maps.zarr" / LAYER / "distilled", mode="r"))
    assert stored.shape == (8, 2, 5) and np.array_equal(stored[4:7], maps) and not stored[:4].any() and not stored[7:].any()


def test_the_names_of_a_batchs_arrays_are_those_of_older_runs() -> None:
    """Runs of kdx 0.1.0 that were stopped resume from these names."""
    assert list(record().arrays()) == [
        "index",
        "student_prediction",
        f"products/{LAYER}",
        f"moved_teacher/{LAYER}",
        f"moved_target/{LAYER}",
        f"parts/{LAYER}",
        f"variance/{LAYER}",
        f"interaction/{LAYER}",
        f"slope/{LAYER}",
        "unreadable",
    ]


def test_a_complete_run_has_no_progress_and_a_restarted_one_no_maps(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Store.begin(folder, CONFIGURATION, CONTEXT) as store:
        store.write_batch(0, 3, 3, {LAYER: {"distilled": np.ones((3, 2, 2), np.float32)}}, record())
        assert not store.complete
        store.finish("now", {"planned": 3, "explained": 3, "unreadable": []})
        assert store.complete and not (folder / "progress").exists()
    with Store.begin(folder, CONFIGURATION, CONTEXT) as store:
        assert store.complete and store.manifest["finished"] == "now"
        store.restart()
        assert not (folder / "maps.zarr").exists()
    assert json.loads((folder / "manifest.json").read_text())["status"] == "running"


def test_a_folder_has_one_run_and_one_writer(tmp_path: Path) -> None:
    other = cast(Configuration, {**CONFIGURATION, "data": "cifar10", "fingerprint": "cd34", "seed": 1})
    with Store.begin(tmp_path / "run", CONFIGURATION, CONTEXT), pytest.raises(KdxError, match="Another process is writing"):
        Store.begin(tmp_path / "run", CONFIGURATION, CONTEXT)
    with Store.begin(tmp_path / "run", CONFIGURATION, CONTEXT) as store:
        store.write_batch(0, 3, 3, {LAYER: {"distilled": np.ones((3, 2, 2), np.float32)}}, record())
    with pytest.raises(KdxError, match=r"another run \(it differs in data, fingerprint, seed\)"):
        Store.begin(tmp_path / "run", other, CONTEXT)
    Store.begin(tmp_path / "run", CONFIGURATION, CONTEXT).close()  # a refusal unlocks the folder


def test_a_run_without_results_gives_way_to_a_corrected_command(tmp_path: Path) -> None:
    """Before anything is stored, and after an error; a run that was stopped is kept."""
    folder, other = tmp_path / "run", cast(Configuration, {**CONFIGURATION, "seed": 1})
    maps = {LAYER: {"distilled": np.ones((3, 2, 2), np.float32)}}
    with Store.begin(folder, CONFIGURATION, CONTEXT) as store:
        assert store.replaces == ""
    with Store.begin(folder, other, CONTEXT) as store:
        assert "is replaced (it differs in seed)" in store.replaces
        store.write_batch(0, 3, 3, maps, record())
    with pytest.raises(KdxError, match="another run"):
        Store.begin(folder, CONFIGURATION, CONTEXT)
    with Store.begin(folder, other, CONTEXT) as store:
        assert store.replaces == "" and store.has(0)
        store.fail("The features are constant.")
    with Store.begin(folder, other, CONTEXT) as store:
        assert store.has(0)  # the same command still resumes it
    optional = [folder / name for name in ("influences.npz", "training.json", "scores_by_class.csv", "scores_by_group.csv")]
    for path in optional:  # the error may come after these are written, and the other run may have none of its own
        path.touch()
    with Store.begin(folder, CONFIGURATION, CONTEXT) as store:
        assert store.replaces and not store.has(0) and not (folder / "maps.zarr").exists()
        assert not any(path.exists() for path in optional)
        assert "failure" not in store.manifest and "seed" not in store.manifest["configuration"]
        store.write_batch(0, 3, 3, maps, record())
        store.finish("now", {"planned": 3, "explained": 3, "unreadable": []})
    with pytest.raises(KdxError, match="another run"):
        Store.begin(folder, other, CONTEXT)


@pytest.mark.parametrize(
    ("name", "accepted"), [(".DS_Store", True), (".lock", True), ("networks", True), (".manifest.json.7", True), ("notes.txt", False)]
)
def test_a_run_begins_in_an_empty_folder_or_where_a_start_was_killed(tmp_path: Path, name: str, accepted: bool) -> None:
    (tmp_path / name).touch()
    if accepted:
        Store.begin(tmp_path, CONFIGURATION, CONTEXT).close()
    else:
        with pytest.raises(KdxError, match="neither empty nor a run"):
            Store.begin(tmp_path, CONFIGURATION, CONTEXT)
        assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_table_has_the_numbers_of_the_json_file(tmp_path: Path) -> None:
    layers: dict[str, Any] = {
        layer: {"scores": {"RS(S)": entry(value, 0.1)}, "contrasts": {"RS(S|B) - RS(B|S)": entry(-value, 0.2, None)}}
        for layer, value in (("a,b", 0.3), ("c", 0.7))
    }
    scores = cast(StoredScores, {"features": {"kind": "raw"}, "accuracy": {}, "layers": layers})
    with Store.begin(tmp_path / "run", CONFIGURATION, CONTEXT) as store:
        store.write_scores(scores)
        assert json.loads((tmp_path / "run" / "scores.json").read_text()) == scores
        with (tmp_path / "run" / "scores.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [(row["layer"], row["score"]) for row in rows] == [
            (layer, name) for layer in layers for name in ("RS(S)", "RS(S|B) - RS(B|S)")
        ]
        for row in rows:
            number = (layers[row["layer"]]["scores"] | layers[row["layer"]]["contrasts"])[row["score"]]
            assert [float(row[key]) for key in ("value", "low", "high")] == [number["value"], *number["interval"]]
            assert row["p_value"] == ("" if number["p_value"] is None else str(number["p_value"]))
        layers["c"]["scores"]["RS(S)"]["value"] = math.nan
        with pytest.raises(ValueError, match="JSON compliant"):
            store.write_scores(scores)
        assert "NaN" not in (tmp_path / "run" / "scores.json").read_text()  # the file before is still there


def test_maps_that_cannot_be_written_are_an_error_for_the_user(tmp_path: Path) -> None:
    maps = np.random.default_rng(0).random((30, 20, 20)).astype(np.float32)
    with Store.begin(tmp_path / "run", CONFIGURATION, CONTEXT) as store:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        try:
            with pytest.raises(KdxError, match=r"maps\.zarr cannot be written: File too large"):
                store.write_maps(0, 30, 30, {LAYER: {"distilled": maps}})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_finished_run_contains_no_file_that_a_killed_process_left(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Store.begin(folder, CONFIGURATION, CONTEXT) as store:
        store.write_maps(0, 3, 3, {LAYER: {"distilled": np.zeros((3, 2, 2), np.float32)}})
        store.write_picture(0, np.zeros((4, 4, 3), np.uint8))
        expected = {path.relative_to(folder) for path in folder.rglob("*")}
        for left in ("maps.zarr/block/layer3/zarr.12ab.partial", ".scores.json.4711", "overlays/.00000.png.4711"):
            (folder / left).write_bytes(b"part")
        store.finish("", {"planned": 3, "explained": 3, "unreadable": []})
    assert {path.relative_to(folder) for path in folder.rglob("*")} == expected
