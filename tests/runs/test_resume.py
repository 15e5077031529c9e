"""Stopped, killed, damaged and concurrent runs: the result is that of an uninterrupted run."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import kdx
from kdx.commands import explain
from kdx.report.page import write_page
from kdx.runs import store
from tests.runs.small_run import OPTIONS, SALIENT, interrupt, results, run, same, stopping


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param("before the maps", marks=pytest.mark.slow),
        pytest.param("between maps and record", marks=pytest.mark.slow),
        pytest.param("after a batch", marks=pytest.mark.slow),
        "while finishing",
    ],
)
def test_a_stopped_run_resumes_to_the_same_result(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "write_batch", stopping(store.Store.write_batch, stop))
        if stop == "while finishing":
            patch.setattr(store.Store, "write_scores", interrupt)
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


@pytest.mark.slow
@pytest.mark.parametrize("left", [".manifest.json.123", "networks/.student.onnx.partial"])
def test_a_run_that_was_killed_at_its_start_can_start_again(folder: Path, finished: Path, tmp_path: Path, left: str) -> None:
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


@pytest.mark.slow
def test_a_run_is_not_resumed_with_other_source_code_of_a_network(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, module = tmp_path / "copy", tmp_path / "own_student.py"
    shutil.copytree(folder, copy)
    text = (copy / "models.toml").read_text()
    (copy / "models.toml").write_text(text.replace("kdx:resnet,width=4,depth=1,classes=3@student", "own_student:network@student"))
    monkeypatch.syspath_prepend(str(tmp_path))
    code = "from kdx.models.resnet import resnet\n\n\ndef network():\n    return resnet(width=4, depth=1, classes=3)\n"
    module.write_text(code)
    run(copy, tmp_path / "run")
    run(copy, tmp_path / "run")
    module.write_text(f"{code}\n\nSCALE = 2\n")
    with pytest.raises(kdx.KdxError, match=r"another run .*source_code"):
        run(copy, tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert list(manifest["configuration"].pop("source_code")) == ["student"]
    (tmp_path / "run" / "manifest.json").write_text(json.dumps(manifest))  # as older versions wrote it
    run(copy, tmp_path / "run")


@pytest.mark.slow
def test_a_killed_process_resumes_to_the_same_result(folder: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [str(Path(sys.executable).parent / "kdx"), "explain", str(folder / "pictures"), "--models", str(folder / "models.toml")]
    command += ["--out", str(out), "--batch", "9", "--permutations", "19", "--runtime", "eager", "--seed", "3", "--geometry", "batch"]
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


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 3])
def test_a_stopped_run_leaves_no_thread_and_resumes_with_any_number_of_threads(
    folder: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "write_batch", stopping(store.Store.write_batch, "after a batch"))
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "run", replace(OPTIONS, workers=3 - workers))
    assert not [thread for thread in threading.enumerate() if "kdx" in thread.name]
    run(folder, tmp_path / "run", replace(OPTIONS, workers=workers))
    assert same(results(tmp_path / "run"), results(finished))


@pytest.mark.slow
def test_a_stopped_run_of_salient_features_resumes_to_the_same_result(
    folder: Path, salient: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "write_batch", stopping(store.Store.write_batch, "after a batch"))
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "run", SALIENT)
    run(folder, tmp_path / "run", SALIENT)
    assert same(results(tmp_path / "run"), results(salient))


@pytest.mark.slow
def test_a_stopped_run_without_a_teacher_resumes(folder: Path, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: Any = (str(folder / "pictures"), pair, tmp_path / "run", (), replace(OPTIONS, geometry="reference", reference_images=10))
    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "write_batch", stopping(store.Store.write_batch, "after a batch"))
        with pytest.raises(KeyboardInterrupt):
            explain.run(*arguments, announce=lambda line: None)
    explain.run(*arguments, announce=lambda line: None)
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "complete"


@pytest.mark.slow
def test_the_references_are_recorded_even_if_the_run_stopped(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(OPTIONS, geometry="reference", reference_images=10)
    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "write_scores", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "run", options)
    run(folder, tmp_path / "run", options)
    run(folder, tmp_path / "whole", options)
    reference_ids = [json.loads((tmp_path / name / "manifest.json").read_text())["reference_ids"] for name in ("run", "whole")]
    assert reference_ids[0] == reference_ids[1] and len(set(reference_ids[0])) == 10


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("scores.json", "gone"),
        ("scores.json", "torn"),
        ("samples.parquet", "torn"),
        ("maps.zarr", "torn"),
        ("maps.zarr/layer3/missed", "gone"),
        ("maps.zarr/layer3/missed", "damaged"),
    ],
)
@pytest.mark.slow
def test_a_lost_or_damaged_file_of_a_finished_run_is_computed_again(
    folder: Path, finished: Path, tmp_path: Path, lines: list[str], name: str, how: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    if how == "damaged":
        chunks = [path for path in (out / name / "c").rglob("*") if path.is_file()]
        assert chunks
        for path in chunks:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + bytes(8))
    elif (out / name).is_dir():
        shutil.rmtree(out / name)
    else:
        (out / name).unlink()
    if how == "torn":
        (out / name).write_bytes(b"{")
    with pytest.raises(kdx.KdxError) as caught:
        write_page(out)
    assert "Run the same kdx explain command again" in caught.value.hint
    explain.run(str(folder / "pictures"), folder / "models.toml", out, (), OPTIONS, announce=lines.append)
    assert any("computed again" in line for line in lines)
    assert same(results(out), results(finished))


def test_a_run_has_one_writer_and_a_dead_process_does_not_count(folder: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    code = f"""if True:
        import pathlib, time, kdx.disk
        lock = kdx.disk.lock_folder(pathlib.Path({str(out)!r}))
        print("locked", flush=True)
        time.sleep(600)"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "locked\n"
    with pytest.raises(kdx.KdxError, match="Another process is writing the run"):
        run(folder, out)
    other.send_signal(signal.SIGKILL)
    other.wait()
    other.stdout.close()
    for _ in range(2):  # the first one lets go of it
        run(folder, out)


def test_a_finished_run_is_not_computed_again(folder: Path, finished: Path, lines: list[str]) -> None:
    before = (finished / "scores.json").stat().st_mtime_ns
    explain.run(str(folder / "pictures"), folder / "models.toml", finished, (), OPTIONS, announce=lines.append)
    assert any("complete" in line for line in lines)
    assert (finished / "scores.json").stat().st_mtime_ns == before
