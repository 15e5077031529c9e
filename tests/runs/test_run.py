"""A run over a data set: what it stores, that it resumes, and what it refuses."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from PIL import Image
from safetensors.torch import save_file

import kdx
from kdx.commands import explain
from kdx.data.batches import random_batches
from kdx.data.dataset import open_data
from kdx.data.images import load_images
from kdx.export.graphs import Preprocessing
from kdx.maps.salient_images import Salience
from kdx.models import models_file
from kdx.models.layer_pairs import parse_layers
from kdx.models.resnet import resnet
from kdx.report.page import write_page
from kdx.roles import MAPS, ROLES
from kdx.runs import schema, store
from kdx.runs.run import RunOptions, _choose_split
from kdx.scores import uncertainty

CLASSES = ("cat", "dog", "owl")
SIZE = (12, 12)
OPTIONS = RunOptions(batch=9, permutations=19, runtime="eager", seed=3, gallery=6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small random networks with a models file, and 29 pictures of three classes."""
    root = tmp_path_factory.mktemp("explain")
    for seed, (role, width) in enumerate((("teacher", 8), ("student", 4), ("base", 4))):
        torch.manual_seed(seed)
        save_file(resnet(width=width, depth=1, classes=3).state_dict(), root / f"{role}.safetensors")
    models_file.write_models(
        root / "models.toml",
        teacher="kdx:resnet,width=8,depth=1,classes=3@teacher.safetensors",
        base="kdx:resnet,width=4,depth=1,classes=3@base.safetensors",
        student="kdx:resnet,width=4,depth=1,classes=3@student.safetensors",
        layers=("layer2", "layer3"),
        classes=CLASSES,
        preprocessing=Preprocessing(SIZE, (0.5,), (0.5,)),
    )
    rng = np.random.default_rng(0)
    for number in range(29):
        place = root / "pictures" / CLASSES[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (14, 17, 3), dtype=np.uint8)).save(place / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(folder, out)
    return out


def run(folder: Path, out: Path, options: RunOptions = OPTIONS, data: str | None = None, layers: tuple[str, ...] = ()) -> Path:
    return explain.run(data or str(folder / "pictures"), folder / "models.toml", out, layers, options, announce=lambda line: None)


def results(out: Path) -> dict[str, Any]:
    """All that a run computed: everything but times and the machine."""
    group = zarr.open_group(out / "maps.zarr", mode="r")
    arrays = {f"{layer}/{name}": np.asarray(group[f"{layer}/{name}"]) for layer in ("layer2", "layer3") for name in MAPS}
    return {
        "scores": (out / "scores.json").read_bytes(),
        "table": (out / "scores.csv").read_bytes(),
        "samples": pq.read_table(out / "samples.parquet").to_pydict(),
        "images": json.loads((out / "manifest.json").read_text())["images"],
        "overlays": sorted((path.name, path.read_bytes()) for path in (out / "overlays").iterdir()),
        **arrays,
    }


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(
        np.array_equal(found[key], value) if isinstance(value, np.ndarray) else found[key] == value for key, value in expected.items()
    )


def test_a_run_stores_what_the_explainer_finds(folder: Path, finished: Path) -> None:
    dataset = open_data(str(folder / "pictures"), CLASSES)
    batches = random_batches(dataset.labels, 9, 3)
    samples = pq.read_table(finished / "samples.parquet").to_pylist()
    assert sorted(row["id"] for row in samples) == sorted(dataset.ids)
    group = zarr.open_group(finished / "maps.zarr", mode="r")
    trio = models_file.read_models(folder / "models.toml")
    teacher, student, base = (trio.load(role) for role in ROLES)
    with kdx.Explainer(
        teacher=teacher, student=student, base=base, layers=["layer2", "layer3"], runtime="eager", permutations=0
    ) as explainer:
        for number, batch in enumerate(batches):
            expected = explainer(load_images(dataset, batch, SIZE).pixels, torch.from_numpy(dataset.labels[batch]))
            rows = [row for row in samples if row["batch"] == number]
            assert [row["id"] for row in rows] == [dataset.ids[i] for i in batch]
            assert [row["label"] for row in rows] == dataset.labels[batch].tolist()
            for role in ROLES:
                assert [row[f"{role}_prediction"] for row in rows] == expected.logits[role].argmax(1).tolist()
            for layer, found in expected.layers.items():
                for name in MAPS:
                    stored = np.asarray(group[f"{layer}/{name}"])[[row["row"] for row in rows]]
                    assert np.allclose(stored, getattr(found, name).maps, rtol=1e-4, atol=1e-6)


def test_files_agree_with_each_other(finished: Path) -> None:
    content = json.loads((finished / "scores.json").read_text())
    manifest = json.loads((finished / "manifest.json").read_text())
    assert manifest["status"] == "complete" and manifest["images"] == {"planned": 29, "explained": 29, "unreadable": []}
    assert not (finished / "progress").exists()
    with (finished / "scores.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 2 * (9 + 2)
    for row in table:
        entry = content["layers"][row["layer"]]
        score = (entry["scores"] | entry["contrasts"])[row["score"]]
        assert float(row["value"]) == score["value"] and [float(row["low"]), float(row["high"])] == list(score["interval"])
    samples = pq.read_table(finished / "samples.parquet").to_pylist()
    for role in ROLES:
        right = sum(row[f"{role}_prediction"] == row["label"] for row in samples)
        accuracy = content["accuracy"][role]
        assert (accuracy["correct"], accuracy["n"]) == (right, 29)
        assert accuracy["interval"][0] < accuracy["value"] < accuracy["interval"][1]
    assert (finished / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("stop", ["before the maps", "between maps and record", "after a batch", "while finishing"])
def test_a_stopped_run_resumes_to_the_same_result(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "write_batch", _stopping(store.Store.write_batch, stop))
        if stop == "while finishing":
            patch.setattr(store.Store, "write_scores", _raise)
        with pytest.raises(KeyboardInterrupt):
            run(folder, out)
    done = len(list((out / "progress").iterdir()))
    assert done == {"before the maps": 1, "between maps and record": 1, "after a batch": 2, "while finishing": 4}[stop]
    computed: list[int] = []
    original = store.Store.write_batch

    def counted(self: store.Store, batch: int, *rest: Any) -> None:
        computed.append(batch)
        original(self, batch, *rest)

    monkeypatch.setattr(store.Store, "write_batch", counted)
    run(folder, out)
    assert len(computed) == 4 - done
    assert same(results(out), results(finished))


@pytest.mark.parametrize("left", [".manifest.json.123", "networks/.student.onnx.partial"])
def test_a_run_killed_as_it_began_can_begin_again(folder: Path, finished: Path, tmp_path: Path, left: str) -> None:
    (tmp_path / "run" / left).parent.mkdir(parents=True)
    (tmp_path / "run" / left).write_bytes(b"{")
    run(folder, tmp_path / "run")
    assert same(results(tmp_path / "run"), results(finished))


def test_a_run_is_not_resumed_with_other_preprocessing(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    run(tmp_path / "copy", tmp_path / "run")
    text = (tmp_path / "copy" / "models.toml").read_text()
    (tmp_path / "copy" / "models.toml").write_text(text.replace("mean = [0.5]", "mean = [0.1]"))
    with pytest.raises(kdx.KdxError, match=r"another run .*models"):
        run(tmp_path / "copy", tmp_path / "run")


def test_batches_are_permuted_each_in_its_own_way(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[torch.Tensor] = []

    def recorded(*arguments: Any) -> torch.Tensor:
        tables.append(uncertainty.permutation_table(*arguments))
        return tables[-1]

    monkeypatch.setattr("kdx.explain.explainer.permutation_table", recorded)
    run(folder, tmp_path / "run")
    assert len(tables) == 4 and not torch.equal(tables[1], tables[2]) and tables[1].shape == tables[2].shape


def test_a_file_name_that_is_no_text_is_written_out(folder: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    shutil.copytree(folder / "pictures", pictures)
    torn = Path(os.fsdecode(os.fsencode(pictures / "dog") + b"/\xff.png"))
    try:
        (pictures / "dog" / "1.png").rename(torn)
    except OSError:
        pytest.skip("this file system takes text only")
    run(folder, tmp_path / "run", data=str(pictures))
    assert "dog/\\xff.png" in pq.read_table(tmp_path / "run" / "samples.parquet").to_pydict()["id"]


def _raise(*_: Any) -> None:
    raise KeyboardInterrupt


def _stopping(write: Any, stop: str) -> Any:
    """`write`, interrupted at the second batch in the way that ``stop`` says."""

    def interrupted(self: store.Store, batch: int, *rest: Any) -> None:
        if batch == 1 and stop == "before the maps":
            raise KeyboardInterrupt
        write(self, batch, *rest)
        if batch == 1 and stop == "between maps and record":
            schema.batch_path(self.folder, batch).unlink()
            raise KeyboardInterrupt
        if batch == 1 and stop == "after a batch":
            raise KeyboardInterrupt

    return interrupted


def test_a_killed_process_resumes_to_the_same_result(folder: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [str(Path(sys.executable).parent / "kdx"), "explain", str(folder / "pictures"), "--models", str(folder / "models.toml")]
    command += ["--out", str(out), "--batch", "9", "--permutations", "19", "--runtime", "eager", "--seed", "3"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(6000):
        if list((out / "progress").glob("*.npz")) or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 1 <= len(list((out / "progress").glob("*.npz"))) <= 4
    assert json.loads((out / "manifest.json").read_text())["status"] == "running"
    again = replace(OPTIONS, gallery=60)
    run(folder, out, again)
    expected = tmp_path / "expected"
    run(folder, expected, again)
    assert same(results(out), results(expected))


def test_how_many_images_go_through_a_network_at_once_changes_nothing(folder: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(folder, out, replace(OPTIONS, chunk=4))
    whole, parts = results(finished), results(out)
    assert parts["samples"]["student_prediction"] == whole["samples"]["student_prediction"]
    for key in (key for key in whole if key.startswith("layer")):
        assert np.allclose(parts[key], whole[key], rtol=1e-3, atol=1e-5 * np.abs(whole[key]).max())


def test_how_many_threads_decode_changes_nothing(folder: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    shutil.copytree(folder / "pictures", pictures)
    (pictures / "dog" / "1.png").write_bytes(b"no picture")
    found = {}
    for workers in (0, 2, None):
        out = tmp_path / f"run-{workers}"
        run(folder, out, replace(OPTIONS, workers=workers), data=str(pictures))
        found[workers] = results(out)
    assert [image["id"] for image in found[0]["images"]["unreadable"]] == ["dog/1.png"]
    assert same(found[2], found[0]) and same(found[None], found[0])


@pytest.mark.parametrize("workers", [0, 3])
def test_a_stopped_run_leaves_no_thread_and_resumes_with_any_number(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "write_batch", _stopping(store.Store.write_batch, "after a batch"))
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "run", replace(OPTIONS, workers=3 - workers))
    assert not [thread for thread in threading.enumerate() if "kdx" in thread.name]
    run(folder, tmp_path / "run", replace(OPTIONS, workers=workers))
    assert same(results(tmp_path / "run"), results(finished))


def test_in_reference_mode_a_map_does_not_depend_on_its_batch(folder: Path, tmp_path: Path) -> None:
    maps = {}
    for batch in (9, 16):
        run(folder, tmp_path / str(batch), replace(OPTIONS, batch=batch, reference_images=10))
        samples = pq.read_table(tmp_path / str(batch) / "samples.parquet").to_pylist()
        stored = np.asarray(zarr.open_group(tmp_path / str(batch) / "maps.zarr", mode="r")["layer3/distilled"])
        maps[batch] = np.stack([stored[row["row"]] for row in sorted(samples, key=lambda row: str(row["id"]))])
    assert np.abs(maps[9] - maps[16]).max() < 1e-3 * maps[9].max()


# ---- salient features ----

SALIENT = replace(OPTIONS, features="salient", keep=0.4, noise=0.05)


@pytest.fixture(scope="module")
def salient(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "salient"
    run(folder, out, SALIENT)
    return out


def test_scores_are_of_salient_features_and_the_rest_of_whole_images(finished: Path, salient: Path) -> None:
    raw, found = results(finished), results(salient)
    changed = {key for key in raw if not same({key: found[key]}, {key: raw[key]})}
    assert changed == {"scores", "table"}
    scores, others = (json.loads((out / "scores.json").read_text()) for out in (salient, finished))
    assert scores["features"] == {"kind": "salient", "keep": 0.4, "noise": 0.05} and others["features"] == {"kind": "raw"}
    assert scores["accuracy"] == others["accuracy"]
    for layer in ("layer2", "layer3"):
        for name, score in scores["layers"][layer]["scores"].items():
            assert score["value"] != others["layers"][layer]["scores"][name]["value"]


def test_a_runs_scores_are_the_explainers(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "run", replace(SALIENT, batch=64, noise=0.0))
    dataset = open_data(str(folder / "pictures"), CLASSES)
    (batch,) = random_batches(dataset.labels, 64, 3)
    trio = models_file.read_models(folder / "models.toml")
    networks: dict[str, Any] = {role: trio.load(role) for role in ROLES}
    with kdx.Explainer(**networks, layers=["layer2", "layer3"], runtime="eager", permutations=0, features="salient", keep=0.4) as explainer:
        expected = explainer(load_images(dataset, batch, SIZE).pixels, torch.from_numpy(dataset.labels[batch]))
    stored = json.loads((tmp_path / "run" / "scores.json").read_text())["layers"]
    for layer, result in expected.layers.items():
        assert {name: score["value"] for name, score in stored[layer]["scores"].items()} == pytest.approx(
            {name: score.value for name, score in result.scores.items()}, abs=1e-9
        )


def test_a_stopped_run_of_salient_features_resumes_to_the_same_result(
    folder: Path, salient: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "write_batch", _stopping(store.Store.write_batch, "after a batch"))
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "run", SALIENT)
    run(folder, tmp_path / "run", SALIENT)
    assert same(results(tmp_path / "run"), results(salient))


def test_noise_is_each_batchs_own(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def recorded(self: Salience, pixels: torch.Tensor, maps: torch.Tensor, seed: int = 0) -> torch.Tensor:
        seeds.append(seed)
        return pixels

    monkeypatch.setattr(Salience, "images", recorded)
    run(folder, tmp_path / "run", SALIENT)
    assert len(set(seeds)) == len(seeds) == 4 * 2 * 3  # batches, layers and networks


@pytest.mark.parametrize("other", [OPTIONS, replace(SALIENT, keep=0.5), replace(SALIENT, noise=0.0)])
def test_other_features_are_another_run(folder: Path, salient: Path, other: RunOptions) -> None:
    with pytest.raises(kdx.KdxError, match=r"another run \(it differs in features\)"):
        run(folder, salient, other)


def test_a_run_of_raw_features_is_what_it_was_before_there_were_others(finished: Path, salient: Path) -> None:
    raw, scored = (json.loads((out / "manifest.json").read_text())["configuration"] for out in (finished, salient))
    assert scored.pop("features") == {"kind": "salient", "keep": 0.4, "noise": 0.05}
    assert raw == scored and not {"features", "keep", "noise"} & raw.keys()


def test_the_page_says_whose_features_the_scores_are_of(finished: Path, salient: Path) -> None:
    said = "the top 40% of pixels by HiResCAM are kept and the rest are imputed with noise of standard deviation 0.05"
    page = (salient / "report.html").read_text()
    assert f"The scores describe salient features: {said}." in page and "The maps describe whole images" in page
    assert "salient" not in (finished / "report.html").read_text()


def test_exported_files_have_no_salient_features(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "models.toml").write_text('base = "base.onnx"\nstudent = "student.onnx"\nlayers = ["layer2"]\n')
    with pytest.raises(kdx.KdxError, match="contain no gradients"):
        explain.run(str(folder / "pictures"), tmp_path / "models.toml", tmp_path / "run", (), SALIENT)
    assert not (tmp_path / "run").exists()


def test_a_corrupt_image_is_skipped_and_named(folder: Path, tmp_path: Path) -> None:
    pictures = torn(folder, tmp_path, 1)
    with pytest.raises(kdx.KdxError, match=r"1 of 30 images cannot be read.*torn0\.png"):
        run(folder, tmp_path / "run", replace(OPTIONS, max_unreadable=0), data=str(pictures))
    # What the error advises takes up the very run that stopped.
    run(folder, tmp_path / "run", data=str(pictures))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["images"]["explained"] == 29
    assert [entry["id"] for entry in manifest["images"]["unreadable"]] == ["dog/torn0.png"]
    assert "torn0.png" in (tmp_path / "run" / "report.html").read_text()
    ids = pq.read_table(tmp_path / "run" / "samples.parquet").to_pydict()["id"]
    assert len(ids) == 29 and "dog/torn0.png" not in ids


@pytest.mark.parametrize(("count", "limit", "passes"), [(1, 0.01, True), (2, 0.01, False), (2, 0.05, False), (2, 0.07, True)])
def test_a_share_of_corrupt_images_passes_and_one_always(folder: Path, tmp_path: Path, count: int, limit: float, passes: bool) -> None:
    """Of 29 images and the corrupt ones, 7 % are two and 5 % are one."""
    pictures, options = torn(folder, tmp_path, count), replace(OPTIONS, max_unreadable=limit)
    if passes:
        run(folder, tmp_path / "run", options, data=str(pictures))
    else:
        with pytest.raises(kdx.KdxError, match=f"{count} of {29 + count} images cannot be read"):
            run(folder, tmp_path / "run", options, data=str(pictures))


def torn(folder: Path, tmp_path: Path, count: int) -> Path:
    """A copy of the pictures with corrupt ones beside them."""
    pictures = tmp_path / "pictures"
    shutil.copytree(folder / "pictures", pictures)
    for number in range(count):
        (pictures / "dog" / f"torn{number}.png").write_bytes((pictures / "dog" / "1.png").read_bytes()[:60])
    return pictures


def test_one_batch_alone_has_an_interval_from_its_images(folder: Path, tmp_path: Path) -> None:
    run(folder, tmp_path / "run", replace(OPTIONS, batch=64))
    content = json.loads((tmp_path / "run" / "scores.json").read_text())
    low, high = content["layers"]["layer3"]["scores"]["FSS(S,T)"]["interval"]
    assert -1 < low < high < 1


# ---- without a teacher ----


@pytest.fixture(scope="module")
def pair(folder: Path) -> Path:
    """The models file without its teacher."""
    lines = (folder / "models.toml").read_text().splitlines(keepends=True)
    (folder / "pair.toml").write_text("".join(line for line in lines if not line.startswith("teacher")))
    return folder / "pair.toml"


def test_without_a_teacher_the_rest_stays_as_it_is(folder: Path, pair: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    explain.run(str(folder / "pictures"), pair, out, (), OPTIONS, announce=lambda line: None)
    found, whole = (json.loads((path / "scores.json").read_text()) for path in (out, finished))
    assert found["accuracy"] == {role: whole["accuracy"][role] for role in ("student", "base")}
    for layer, entry in found["layers"].items():
        assert list(entry["scores"]) == ["RS(S)", "RS(B)", "RS(S|B)", "RS(B|S)"] and list(entry["contrasts"]) == ["RS(S|B) - RS(B|S)"]
        for kind in ("scores", "contrasts"):
            for name, score in entry[kind].items():
                expected = whole["layers"][layer][kind][name]
                assert score["value"] == pytest.approx(expected["value"], abs=1e-9)
                assert score["interval"] == pytest.approx(expected["interval"], abs=1e-7) and score["p_value"] == expected["p_value"]
    samples, known = (pq.read_table(path / "samples.parquet").to_pydict() for path in (out, finished))
    assert samples == {name: values for name, values in known.items() if "teacher" not in name}
    group, maps = (zarr.open_group(path / "maps.zarr", mode="r") for path in (out, finished))
    for layer in ("layer2", "layer3"):
        assert sorted(group[layer]) == ["distilled", "residual"]  # type: ignore[arg-type]
        for name in ("distilled", "residual"):
            assert np.allclose(np.asarray(group[f"{layer}/{name}"]), np.asarray(maps[f"{layer}/{name}"]), rtol=1e-4, atol=1e-7)
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["configuration"]["models"]) == {"student", "base"}
    with (out / "scores.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 2 * (4 + 1)
    assert {path.stem.split("_")[-1] for path in (out / "overlays").glob("*_*.png")} == {"distilled", "residual"}
    page = (out / "report.html").read_text()
    assert "How the student differs from the base" in page and "its teacher" not in page


def test_a_stopped_run_without_a_teacher_resumes(folder: Path, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: Any = (str(folder / "pictures"), pair, tmp_path / "run", (), replace(OPTIONS, reference_images=10))
    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "write_batch", _stopping(store.Store.write_batch, "after a batch"))
        with pytest.raises(KeyboardInterrupt):
            explain.run(*arguments, announce=lambda line: None)
    explain.run(*arguments, announce=lambda line: None)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "complete"


def test_a_teachers_layer_without_a_teacher_is_refused(folder: Path, pair: Path, tmp_path: Path) -> None:
    with pytest.raises(kdx.KdxError, match="layer2=layer3 pairs a layer with one of the teacher's"):
        explain.run(str(folder / "pictures"), pair, tmp_path / "run", ("layer2=layer3",), OPTIONS)
    assert not (tmp_path / "run").exists()


# ---- what is asked for ----


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("layer1=",), "'layer1=' is not a layer"),
        (("=layer1",), "'=layer1' is not a layer"),
        (("",), "'' is not a layer"),
        (("a=b", "c", "a=c"), "'a' is named twice"),
        (("a", "a"), "'a' is named twice"),
    ],
)
def test_layers_that_are_none_are_refused(names: tuple[str, ...], said: str) -> None:
    with pytest.raises(kdx.KdxError, match=said):
        parse_layers(names)


def test_layers_are_paired() -> None:
    assert parse_layers(("a", "b=c", "d=a=b")) == {"a": "a", "b": "c", "d": "a=b"}


def test_who_names_no_layer_is_told_which_there_are(folder: Path, tmp_path: Path) -> None:
    text = (folder / "models.toml").read_text()
    (folder / "bare.toml").write_text("".join(line for line in text.splitlines(keepends=True) if not line.startswith("layers")))
    with pytest.raises(kdx.KdxError, match=r"No layer was named") as caught:
        explain.run(str(folder / "pictures"), folder / "bare.toml", tmp_path / "run", (), OPTIONS)
    assert "layer2, layer3" in caught.value.hint and not (tmp_path / "run").exists()


@pytest.mark.parametrize("spelling", ["pictures", "./pictures", "pictures/", "other/../pictures", "{absolute}"])
def test_a_models_file_knows_its_data_however_it_is_spelt(folder: Path, monkeypatch: pytest.MonkeyPatch, spelling: str) -> None:
    monkeypatch.chdir(folder)
    (folder / "other").mkdir(exist_ok=True)
    data = spelling.format(absolute=folder / "pictures")
    for recorded in ("pictures/", str(folder / "pictures")):
        named = replace(models_file.read_models(folder / "models.toml"), data=recorded)
        assert _choose_split(open_data(data), named, OPTIONS)[0] == "test"
    assert _choose_split(open_data(data), replace(named, data="other"), OPTIONS)[0] == "all"


def test_random_weights_are_announced(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet: list[str]) -> None:
    load = models_file.ModelsFile.load

    def untrained(self: models_file.ModelsFile, role: str) -> Any:
        return replace(load(self, role), trained=role != "base")

    monkeypatch.setattr(models_file.ModelsFile, "load", untrained)
    explain.run(str(folder / "pictures"), folder / "models.toml", tmp_path / "run", (), OPTIONS, announce=quiet.append)
    assert [line.partition(",")[0] for line in quiet if "random" in line] == ["Some or all weights of the base are random: kdx:resnet"]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["random_weights"] == ["base"]


# ---- what is lost, and who else is there ----


def test_the_references_are_recorded_though_the_run_stopped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(OPTIONS, reference_images=10)
    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "write_scores", _raise)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "run", options)
    run(folder, tmp_path / "run", options)
    run(folder, tmp_path / "whole", options)
    known = [json.loads((tmp_path / name / "manifest.json").read_text())["reference_ids"] for name in ("run", "whole")]
    assert known[0] == known[1] and len(set(known[0])) == 10


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("scores.json", "gone"),
        ("scores.json", "torn"),
        ("samples.parquet", "torn"),
        ("maps.zarr", "torn"),
        ("maps.zarr/layer3/missed", "gone"),
    ],
)
def test_what_a_finished_run_lost_is_computed_again(
    folder: Path, finished: Path, tmp_path: Path, quiet: list[str], name: str, how: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    if (out / name).is_dir():
        shutil.rmtree(out / name)
    else:
        (out / name).unlink()
    if how == "torn":
        (out / name).write_bytes(b"{")
    with pytest.raises(kdx.KdxError) as caught:
        write_page(out)
    assert "Run the same kdx explain command again" in caught.value.hint
    explain.run(str(folder / "pictures"), folder / "models.toml", out, (), OPTIONS, announce=quiet.append)
    assert any("computed again" in line for line in quiet)
    assert same(results(out), results(finished))


def test_a_run_has_one_writer_and_a_dead_one_is_none(folder: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    code = f"""if True:
        import pathlib, time, kdx.disk
        held = kdx.disk.lock_folder(pathlib.Path({str(out)!r}))
        print("held", flush=True)
        time.sleep(600)"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(kdx.KdxError, match="Another process is writing the run"):
        run(folder, out)
    other.send_signal(signal.SIGKILL)
    other.wait()
    other.stdout.close()
    for _ in range(2):  # the first one lets go of it
        run(folder, out)


def test_a_refused_folder_is_left_as_it_was(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("")
    with pytest.raises(kdx.KdxError, match="not empty and not a run"):
        run(folder, tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["thesis.tex"]


@pytest.fixture
def quiet() -> Iterator[list[str]]:
    yield []


def test_a_finished_run_is_not_computed_again(folder: Path, finished: Path, quiet: list[str]) -> None:
    before = (finished / "scores.json").stat().st_mtime_ns
    explain.run(str(folder / "pictures"), folder / "models.toml", finished, (), OPTIONS, announce=quiet.append)
    assert any("complete" in line for line in quiet)
    assert (finished / "scores.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"options": replace(OPTIONS, batch=12)}, "another run .*batch"),
        ({"layers": ("layer1",)}, "another run .*layers"),
        ({"layers": ("layr3",), "out": "new"}, "layr3"),
        ({"options": replace(OPTIONS, split="tset"), "out": "new"}, "tset"),
        ({"data": "nowhere", "out": "new"}, "nowhere"),
        ({"options": replace(OPTIONS, reference_images=3), "out": "new"}, "reference set of 3"),
        ({"out": "occupied"}, "not empty"),
    ],
)
def test_what_is_refused(folder: Path, finished: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.tex").write_text("")
    out = tmp_path / change.pop("out") if "out" in change else finished
    with pytest.raises(kdx.KdxError, match=said):
        run(folder, out, **change)
    assert (tmp_path / "occupied" / "thesis.tex").exists()


def test_networks_of_other_classes_are_refused(folder: Path, tmp_path: Path) -> None:
    text = (folder / "models.toml").read_text()
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "models.toml").write_text(text.replace('"cat", "dog", "owl"', '"cat", "dog", "elk", "owl"'))
    with pytest.raises(kdx.KdxError, match="predicts 3 classes, and the data has 4"):
        run(tmp_path / "copy", tmp_path / "run")


def test_identical_student_and_base_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    shutil.copy(folder / "base.safetensors", tmp_path / "copy" / "student.safetensors")
    with pytest.raises(kdx.KdxError, match="Nothing is left of the explained features"):
        run(tmp_path / "copy", tmp_path / "run")
