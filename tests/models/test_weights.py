"""Weights files: formats, and files that do not fit the network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdx import models
from kdx.errors import KdxError

SMALL = "kdx:resnet,width=4,depth=1,classes=3"


@pytest.mark.parametrize("kind", ["safetensors", "pt", "pth", "state_dict", "model", "parallel", "half"])
def test_weights_load_from_every_format(tmp_path: Path, kind: str) -> None:
    state = models.load(SMALL).module.state_dict()
    path = tmp_path / f"w.{kind if kind in ('safetensors', 'pth') else 'pt'}"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "half":
        state = {name: tensor.half().to(tensor.dtype) for name, tensor in state.items()}
        torch.save({name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}, path)
    elif kind == "parallel":
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    else:
        torch.save({kind: state} if kind in ("state_dict", "model") else state, path)
    loaded = models.load(f"{SMALL}@{path.name}", folder=tmp_path).module.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file(models.load(SMALL).module.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(KdxError, match=r"shapes differ: conv1.weight is \[4, 3, 3, 3\] in the file and \[6, 3, 3, 3\] in the network"):
        models.load(f"kdx:resnet,width=6,depth=1,classes=3@{tmp_path}/w.safetensors")
    with pytest.raises(KdxError, match=r"fc is for 3 in the file and for 4 in the network.*\n.*new_head=true"):
        models.load(f"kdx:resnet,width=4,depth=1,classes=4@{tmp_path}/w.safetensors")
    with pytest.raises(KdxError, match=r"it lacks layer1.1.conv1.weight, .* and \d+ more"):
        models.load(f"kdx:resnet,width=4,depth=2,classes=3@{tmp_path}/w.safetensors")
    with pytest.raises(KdxError, match="it also has layer3"):
        models.load(f"kdx:resnet,width=4,depth=1,classes=3,stages=2@{tmp_path}/w.safetensors")


def test_files_that_are_not_weights_are_refused(tmp_path: Path) -> None:
    state = models.load(SMALL).module.state_dict()
    save_file(state, tmp_path / "cut.safetensors")
    torch.save(state, tmp_path / "cut.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "pickled.pt")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "w.h5").touch()
    for name in ("cut.safetensors", "cut.pt"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:2000])
    for name in ("cut.safetensors", "cut.pt", "pickled.pt", "other.pt", "empty.pth", "w.h5", "missing.pt"):
        with pytest.raises(KdxError, match=name):
            models.load(f"{SMALL}@{tmp_path / name}")


def test_the_hash_depends_on_parameters_and_buffers() -> None:
    network = models.load("timm:mobilenetv3_small_050", classes=3)
    before = network.weights_hash
    other = models.load("timm:mobilenetv3_small_050", classes=3)
    assert other.weights_hash != before
    other.module.load_state_dict(network.module.state_dict())
    assert other.weights_hash == before
    with torch.no_grad():
        next(reversed(list(other.module.buffers()))).add_(1)
    assert other.weights_hash != before
