"""Runs at URLs: their files are those of a local run, whatever kills the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import kdx
from kdx.cli.commands import app
from kdx.commands import explain
from kdx.disk import lock_folder
from kdx.errors import KdxError
from kdx.remote import as_path
from tests.remote.server import BUCKET, Server, upload
from tests.runs.small_run import OPTIONS, run

UNEQUAL = ("manifest.json", "report.html", ".lock")
"""Files that contain times, paths or the machine."""


SMALL, LAYERS = replace(OPTIONS, gallery=1), ("layer3",)


@pytest.fixture(scope="module")
def local(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "local"
    run(folder, out, SMALL, layers=LAYERS)
    return out


def files(folder: Path) -> dict[str, bytes]:
    """The files of a run by name, except those that two equal runs do not share."""
    known = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in known.items() if name not in UNEQUAL}


def manifest(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "manifest.json").read_text())
    return {key: value for key, value in content.items() if key not in ("environment", "created", "finished", "models_file")}


def test_a_run_in_memory_has_the_files_of_a_local_run(folder: Path, finished: Path) -> None:
    out = as_path("memory://runs/first")
    page = run(folder, out)
    assert files(out) == files(finished)
    assert manifest(out) == manifest(finished)
    assert not (out / ".lock").exists()  # the lock is given back
    assert page.read_text().startswith("<!doctype html>")
    opened, local = kdx.open_run("memory://runs/first"), kdx.open_run(finished)
    assert opened.images == local.images and opened.scores == local.scores
    assert np.array_equal(opened.maps("layer2", opened.kinds[0]), local.maps("layer2", local.kinds[0]))
    pictured = [image for image in opened if image.pixels is not None]
    assert len(pictured) == OPTIONS.gallery
    out.remove_tree()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_run_on_s3_has_the_files_of_a_local_run(server: Server, folder: Path, local: Path) -> None:
    """The data are at a URL too. A batch's record is written after its maps, and the manifest's last state after every result."""
    url = f"s3://{BUCKET}/run"
    out = as_path(url)
    upload(folder / "pictures", f"s3://{BUCKET}/photos")
    server.reset()
    run(folder, out, SMALL, f"s3://someone:{'password'}@{BUCKET}/photos", LAYERS)
    names = [write.partition("/run/")[2] for write in server.writes]
    assert files(out) == files(local)
    known, expected = manifest(out), manifest(local)
    assert known["configuration"]["data"] == f"s3://{BUCKET}/photos"
    assert "password" not in (out / "manifest.json").read_text() + (out / "report.html").read_text()
    for content in (known, expected):
        for name in ("data", "fingerprint"):
            del content["configuration"][name]
    assert known == expected

    records = [place for place, name in enumerate(names) if name.startswith("progress/") and name.endswith(".npz")][:4]
    for batch, place in enumerate(records):
        maps = {name.split("/")[2] for name in names[:place] if name.endswith(f"/c/{batch}/0/0")}
        assert {"distilled", "residual", "new", "missed"} <= maps, f"the record of batch {batch} precedes its maps"
    finish = max(place for place, name in enumerate(names) if name == "manifest.json")
    assert max(names.index(name) for name in ("scores.json", "scores.csv", "samples.parquet", "gallery.json")) < finish
    assert not any(name.startswith(("maps.zarr", "scores", "samples")) for name in names[finish:])

    cli = CliRunner()
    table = cli.invoke(app, ["report", url, "--table", "csv"])
    assert table.exit_code == 0 and table.stdout == cli.invoke(app, ["report", str(local), "--table", "csv"]).stdout
    assert cli.invoke(app, ["report", url]).stdout.strip() == f"The page: {url}/report.html"
    evaluated = cli.invoke(app, ["evaluate", url, "--metric", "batches", "--images", "12"])
    assert evaluated.exit_code == 0, evaluated.output
    assert (out / "evaluation.json").exists() and not (out / ".lock").exists()


@pytest.mark.slow
def test_the_geometry_whole_keeps_its_features_on_this_machine(
    server: Server, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDX_CACHE", str(tmp_path / "cache"))
    options = replace(SMALL, geometry="whole")
    run(folder, tmp_path / "local", options, layers=LAYERS)
    out = as_path(f"s3://{BUCKET}/whole")
    server.reset()
    run(folder, out, options, layers=LAYERS)
    assert files(out) == files(tmp_path / "local")
    assert not any("features" in write for write in server.writes)
    assert not list((tmp_path / "cache" / "runs").iterdir())
    with pytest.raises(KdxError, match="only be kept in a local folder"):
        run(folder, out, replace(options, keep_features=True), layers=LAYERS)


@pytest.mark.slow
def test_the_same_command_continues_a_killed_run(server: Server, folder: Path, local: Path) -> None:
    """After `kill -9` while batches are written, the same command gives the same files."""
    url = f"s3://{BUCKET}/killed"
    out = as_path(url)
    command = [sys.executable, "-c", _SLOW_RUN, str(folder), url]
    with subprocess.Popen(command, env={**os.environ, **server.environment}) as process:
        deadline = time.monotonic() + 60
        while not list((out / "progress").glob("*.npz")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    stored = sorted(path.name for path in (out / "progress").glob("*.npz"))
    assert 0 < len(stored) < 4 and (out / ".lock").exists()
    with pytest.raises(KdxError, match="not finished"):
        kdx.open_run(url)
    lines: list[str] = []
    explain.run(str(folder / "pictures"), folder / "models.toml", out, LAYERS, SMALL, announce=lines.append)
    assert f"Resuming: {len(stored)} of 4 batches are done." in lines
    assert files(out) == files(local)


@pytest.mark.slow
def test_one_process_writes_a_run(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdx.remote_lock.RENEWED_EVERY", 0.5)
    out = as_path(f"s3://{BUCKET}/locked")
    with lock_folder(out), pytest.raises(KdxError, match="Another process is writing"):
        run(folder, out)


_SLOW_RUN = """
import sys, time
from dataclasses import replace
from pathlib import Path
from kdx.runs.store import Store
from kdx.remote import as_path
from tests.runs.small_run import OPTIONS, run

write = Store.write_batch
def slowly(self, *arguments):
    write(self, *arguments)
    time.sleep(1)
Store.write_batch = slowly
run(Path(sys.argv[1]), as_path(sys.argv[2]), replace(OPTIONS, gallery=1), layers=("layer3",))
"""
"""A run that takes a second longer per batch."""
