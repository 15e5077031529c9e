"""Runs with a cluster whose data and results are on S3: the files of a local run in one process, also after ``kill -9``."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from kdx.remote import as_path
from tests.cluster.test_ray import bytes_of, command, one_thread, started
from tests.cluster.test_ray import limited as limited
from tests.cluster.test_ray import pictures as pictures
from tests.remote.server import BUCKET, Server, upload
from tests.runs.conftest import folder as folder

pytestmark = pytest.mark.slow

FEW = ("--batch", "18", "--gallery", "1", "--layer", "layer3")
"""Five batches of one layer, because each batch writes an object per kind of map and layer."""

WORKERS = ("--cluster", "--cpus-per-worker", "1")


def explained(arguments: list[str]) -> str:
    """The output of a run."""
    return subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=200, env=one_thread()).stdout


@pytest.fixture(scope="module")
def local(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run in one process, in a folder."""
    out = tmp_path_factory.mktemp("local") / "run"
    explained(command(pictures, out, *FEW))
    return files(out)


def files(out: Path) -> dict[str, bytes]:
    """The files of a run without its lock, and the manifest without the path of the models file, which is relative in a local run."""
    kept = {name: content for name, content in bytes_of(out).items() if name != ".lock"}
    manifest = json.loads(kept["manifest"])
    del manifest["models_file"]
    return {**kept, "manifest": json.dumps(manifest).encode()}


def test_data_and_results_on_s3(server: Server, pictures: Path, local: dict[str, bytes]) -> None:
    """The workers have the driver's environment, and with it the address of the service and the credentials."""
    data, out = f"s3://{BUCKET}/cluster-data", as_path(f"s3://{BUCKET}/cluster-run")
    upload(pictures / "pictures", data)
    arguments = command(pictures, out, *FEW, *WORKERS)
    explained([data if argument == str(pictures / "pictures") else argument for argument in arguments])
    stored = files(out)
    known, expected = json.loads(stored.pop("manifest")), json.loads(local["manifest"])
    assert stored == {name: content for name, content in local.items() if name != "manifest"}
    assert known["configuration"].pop("data") == data
    del expected["configuration"]["data"]
    for content in (known, expected):
        del content["configuration"]["fingerprint"]  # that of a URL contains the versions of the objects
    assert known == expected
    assert not (out / ".lock").exists()


@pytest.mark.exhaustive
def test_a_killed_run_on_s3_resumes(server: Server, pictures: Path, local: dict[str, bytes]) -> None:
    out = as_path(f"s3://{BUCKET}/cluster-killed")
    process = started(pictures, out, *FEW)
    process.kill()
    process.communicate()
    stored = len(list((out / "progress").glob("*.npz")))
    assert json.loads((out / "manifest.json").read_text())["status"] == "running" and (out / ".lock").exists()
    assert f"Resuming: {stored} of 5 batches are done." in explained(command(pictures, out, *FEW, *WORKERS))
    assert files(out) == local
