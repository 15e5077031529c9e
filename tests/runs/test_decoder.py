"""A run that decodes on the GPU, with a stand-in for nvJPEG: its results, its record and its errors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from kdx.commands import explain
from kdx.data.gpu_decoder import GpuDecoder
from kdx.errors import KdxError
from kdx.runs import plan
from tests.data.test_gpu_decoder import Nvjpeg
from tests.runs.small_run import OPTIONS, SIZE, WHOLE, results, run, same

ON_GPU = replace(OPTIONS, decoder="torchvision-cuda")


@pytest.fixture
def jpegs(folder: Path, tmp_path: Path) -> Path:
    """The pictures as JPEG files of the networks' size, so that nothing is resized. One file is damaged."""
    pictures = tmp_path / "pictures"
    for file in (folder / "pictures").rglob("*.png"):
        (pictures / file.parent.name).mkdir(parents=True, exist_ok=True)
        Image.open(file).resize(SIZE).save(pictures / file.parent.name / f"{file.stem}.jpg", quality=95)
    (pictures / "dog" / "1.jpg").write_bytes(b"no picture")
    return pictures


@pytest.mark.parametrize("options", [OPTIONS, pytest.param(WHOLE, marks=pytest.mark.slow)], ids=["batch", "whole"])
def test_the_results_are_those_of_pillow(
    options: plan.RunOptions, folder: Path, jpegs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvjpeg = Nvjpeg()
    monkeypatch.setattr(plan, "open_gpu_decoder", lambda device: GpuDecoder(torch.device("cpu"), nvjpeg))
    run(folder, tmp_path / "pillow", options, data=str(jpegs))
    assert not nvjpeg.calls
    run(folder, tmp_path / "gpu", replace(options, decoder="torchvision-cuda"), data=str(jpegs))
    assert sum(nvjpeg.calls) == 28
    assert same(results(tmp_path / "gpu"), results(tmp_path / "pillow"))
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("pillow", "gpu")]
    assert [manifest["configuration"].get("decoder") for manifest in manifests] == [None, "torchvision-cuda"]
    assert [manifest["environment"]["tf32"] for manifest in manifests] == [False, False]
    # The decoder changes results, so a run with the other decoder is not the same run.
    with pytest.raises(KdxError, match="decoder"):
        run(folder, tmp_path / "gpu", options, data=str(jpegs))


def test_it_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    for device in ("cpu", *([] if torch.cuda.is_available() else ["auto"])):
        with pytest.raises(KdxError, match="The decoder torchvision-cuda needs an NVIDIA GPU, and the device is cpu"):
            run(folder, tmp_path / "run", replace(ON_GPU, device=device))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="no decoder 'nvjpeg'"):
        replace(OPTIONS, decoder="nvjpeg")  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_network_on_the_cpu_takes_images_from_the_gpu(folder: Path, jpegs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The references of the geometry reference are decoded in the same way as the images."""
    nvjpeg = Nvjpeg()
    monkeypatch.setattr(plan, "open_gpu_decoder", lambda device: GpuDecoder(torch.device("cpu"), nvjpeg))
    shutil.copy(jpegs / "dog" / "4.jpg", jpegs / "dog" / "1.jpg")
    explain.run(
        str(jpegs), folder / "models.toml", tmp_path / "run", (), replace(ON_GPU, geometry="reference", reference_images=10),
        announce=lambda line: None,
    )  # fmt: skip
    assert sum(nvjpeg.calls) == 29 + 10
