"""What a run and a training say about files and weights that they leave out or choose."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from kdx.commands import explain
from kdx.distill import TrainingSettings, distill
from kdx.models import models_file
from tests.runs.small_run import OPTIONS


def test_a_run_states_what_it_leaves_out_and_which_weights_it_takes(folder: Path, finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "pictures" / "cat" / "notes.txt").touch()
    (copy / "pictures" / "fox").mkdir()
    weights = {role: load_file(copy / f"{role}.safetensors") for role in ("student", "base")}
    checkpoint = {
        "state_dict": {f"module.{name}": tensor for name, tensor in weights["base"].items()},
        "state_dict_ema": {f"module._orig_mod.{name}": tensor for name, tensor in weights["student"].items()},
        "args": argparse.Namespace(epochs=3),
    }
    torch.save(checkpoint, copy / "both.ckpt")
    text = (copy / "models.toml").read_text()
    text = text.replace("@student.safetensors", "@both.ckpt").replace("@base.safetensors", "@both.ckpt#state_dict")
    (copy / "models.toml").write_text(text)
    lines: list[str] = []
    explain.run(str(copy / "pictures"), copy / "models.toml", tmp_path / "run", (), OPTIONS, announce=lines.append)
    for line in (
        "Warning: Files left out: 1 .txt (not an image type). No classes, because they contain no images: 'fox'.",
        "Student: Weights of both.ckpt: the averaged weights (EMA) state_dict_ema instead of state_dict; "
        "names without '_orig_mod.' and 'module.'.",
        "Base: Weights of both.ckpt: names without 'module.'.",
    ):
        assert lines.count(line) == 1, lines
    assert json.loads((tmp_path / "run" / "scores.json").read_text()) == json.loads((finished / "scores.json").read_text())


@pytest.mark.slow
def test_a_training_starts_from_a_checkpoint_with_a_new_head(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for level, name in ((30, "dark"), (220, "light")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (12, 12), (level, level, index)).save(tmp_path / "data" / name / f"{index}.gif")
    weights = load_file(folder / "student.safetensors")
    torch.save({"net": {f"model.{name}": tensor for name, tensor in weights.items()}}, tmp_path / "w.ckpt")
    start = f"kdx:resnet,width=4,depth=1,new_head=true@{tmp_path}/w.ckpt"
    settings = TrainingSettings(epochs=1, batch=4, image_size=(12, 12), learning_rate=1e-9, weight_decay=0)
    path = distill(
        str(tmp_path / "data"), teacher=start, student=start, out=tmp_path / "out", settings=settings, report=lambda result: None
    )
    output = capsys.readouterr().out.splitlines()
    assert output[0].startswith("Only the first frame of an animation is used (20 files")
    assert output[1].startswith("Weights of w.ckpt: the entry net; names without 'model.'; a new head: fc.bias, fc.weight.")
    file = models_file.read_models(path)
    assert file.student == "kdx:resnet,width=4,depth=1,classes=2@student.safetensors"
    for role in ("teacher", "base", "student"):
        network = file.load(role)
        state = network.module.state_dict()
        assert network.trained and state["fc.weight"].shape[0] == 2
        torch.testing.assert_close(state["layer2.0.conv1.weight"], weights["layer2.0.conv1.weight"])
