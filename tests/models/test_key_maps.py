"""Checkpoints of the programs in `kdx.models.key_maps`, in the structure in which each writes them, through model references and files."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kdx import models
from kdx.errors import KdxError
from kdx.models.key_maps import KEY_MAPS, table
from tests.models.own_networks import OfMdistiller, seeded

NETWORK = "tests.models.own_networks:OfMdistiller"
STUDENT, TEACHER, AVERAGED = (seeded(OfMdistiller, seed, depth=depth) for seed, depth in ((0, 1), (1, 2), (2, 1)))
STATE, DEEP, EMA = (network.state_dict() for network in (STUDENT, TEACHER, AVERAGED))
State = dict[str, Tensor]


def prefixed(**parts: State) -> State:
    """The state dict of a module that contains several: names with the part's name and a dot before them, where ``__`` is a dot."""
    return {f"{part.replace('__', '.')}.{name}": tensor for part, state in parts.items() for name, tensor in state.items()}


def optimizer() -> dict[str, Any]:
    """The state of an optimizer that has made a step: it contains tensors too."""
    network = nn.Linear(2, 2)
    made = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.ones(1, 2)).sum().backward()
    made.step()
    return made.state_dict()


def schedule() -> dict[str, Any]:
    return torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), [2, 3]).state_dict()


ARGUMENTS = argparse.Namespace(lr=0.05, model_s="resnet20", betas=(0.9, 0.99))
EVERYTHING = prefixed(module__student=STATE, module__teacher=DEEP, module__conv_reg={"weight": torch.ones(2, 2, 1, 1)})

FILES: dict[str, tuple[str, Callable[[], Any], str]] = {
    "torchdistill": (
        "resnet20.pt",
        lambda: {"model": STATE, "optimizer": optimizer(), "lr_scheduler": schedule(), "best_value": 71.2, "args": ARGUMENTS},
        "",
    ),
    "mdistiller, everything": (
        "latest",
        lambda: {"epoch": 240, "model": EVERYTHING, "optimizer": optimizer(), "best_acc": 71.2},
        "names without 'module.student.'; not used: teacher (",
    ),
    "mdistiller, the student": ("student_best", lambda: {"model": STATE}, ""),
    "mdistiller, a network trained by itself": (
        "best",
        lambda: {"epoch": 240, "model": prefixed(module__student=STATE), "optimizer": optimizer(), "best_acc": torch.tensor(71.2)},
        "names without 'module.student.'",
    ),
    "RepDistiller": ("resnet20_best.pth", lambda: {"epoch": 203, "model": STATE, "best_acc": torch.tensor(69.1)}, ""),
    "RepDistiller, every epoch": ("ckpt_epoch_40.pth", lambda: {"epoch": 40, "model": STATE, "accuracy": torch.tensor(51.3)}, ""),
    "RepDistiller, a teacher": (
        "ckpt_epoch_240.pth",
        lambda: {"epoch": 240, "model": STATE, "accuracy": 72.3, "optimizer": optimizer()},
        "",
    ),
    "RepDistiller, the last": ("resnet20_last.pth", lambda: {"opt": ARGUMENTS, "model": STATE}, ""),
    "timm": (
        "model_best.pth.tar",
        lambda: {"epoch": 9, "arch": "resnet", "state_dict": EMA, "optimizer": optimizer(), "version": 2, "args": ARGUMENTS, "metric": 0.7},
        "",
    ),
    "timm, averaged": (
        "checkpoint-9.pth.tar",
        lambda: {"arch": "resnet", "state_dict": EMA, "state_dict_ema": STATE, "args": ARGUMENTS, "amp_scaler": {"scale": 65536.0}},
        "the averaged weights (EMA) state_dict_ema instead of state_dict",
    ),
    "PyTorch Lightning": (
        "epoch=9-step=70.ckpt",
        lambda: lightning(prefixed(model=STATE)),
        "names without 'model.'",
    ),
    "PyTorch Lightning, a distillation": (
        "last.ckpt",
        lambda: lightning(prefixed(teacher=DEEP, student=STATE, criterion={"embed.weight": torch.ones(3, 3)})),
        "names without 'student.'; not used: teacher (",
    ),
    "PyTorch Lightning, compiled": ("net.ckpt", lambda: lightning(prefixed(net___orig_mod=STATE)), "names without '_orig_mod.' and 'net.'"),
    "torchvision's reference scripts, DeiT": (
        "checkpoint.pth",
        lambda: (
            {"model": EMA, "optimizer": optimizer(), "lr_scheduler": schedule(), "epoch": 3, "args": ARGUMENTS}
            | {"model_ema": prefixed(module=STATE) | {"n_averaged": torch.tensor(40)}}
        ),
        "the averaged weights (EMA) model_ema instead of model; names without 'module.'; not used: n_averaged",
    ),
    "Hugging Face Trainer": ("model.safetensors", lambda: STATE, ""),
    "plain loops": ("student.pth", lambda: prefixed(module=STATE), "names without 'module.'"),
}


def lightning(state: State) -> dict[str, Any]:
    return {
        "epoch": 9,
        "global_step": 70,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 10}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val_acc'}": {"best_model_score": torch.tensor(0.7), "dirpath": "checkpoints"}},
        "optimizer_states": [optimizer()],
        "lr_schedulers": [schedule()],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "betas": (0.9, 0.999), "options": ARGUMENTS},
    }


def write(name: str, folder: Path) -> Path:
    file, content, _ = FILES[name]
    path = folder / file
    if path.suffix == ".safetensors":
        save_file(content(), path)
    else:
        torch.save(content(), path)
    return path


def same(network: models.Network, state: State) -> bool:
    return all(torch.equal(tensor, state[name]) for name, tensor in network.module.state_dict().items())


@pytest.mark.parametrize("name", FILES)
def test_weights_of_every_program_load_with_a_line_about_them(name: str, tmp_path: Path) -> None:
    path = write(name, tmp_path)
    expected, note = (EMA, "") if name == "timm" else (STATE, FILES[name][2])
    network = models.load(f"{NETWORK}@{path}")
    assert same(network, expected)
    assert note in network.note if note else not network.note
    (tmp_path / "models.toml").write_text(f'student = "{NETWORK}@{path.name}"\n')
    of_file = models.read_models(tmp_path / "models.toml").load("student")
    assert same(of_file, expected) and of_file.note == network.note


def test_every_key_map_has_a_file_here_and_a_row_in_the_documentation() -> None:
    assert {layout.program for layout in KEY_MAPS} <= FILES.keys()
    page = Path(__file__).parents[2] / "docs" / "checkpoints.md"
    assert f"<!-- key maps -->\n{table()}\n<!-- /key maps -->" in page.read_text("utf-8")


@pytest.mark.parametrize("name", ["mdistiller, everything", "PyTorch Lightning, a distillation"])
def test_the_teacher_of_a_distillation_is_named_or_recognised_by_its_shapes(name: str, tmp_path: Path) -> None:
    path = write(name, tmp_path)
    for key in ("", "#teacher"):
        assert same(models.load(f"{NETWORK},depth=2@{path}{key}"), DEEP)
    assert same(models.load(f"{NETWORK}@{path}#student"), STATE)
    with pytest.raises(KdxError, match="does not contain this network's weights: it lacks"):
        models.load(f"{NETWORK},depth=2@{path}#student")


def test_two_networks_of_one_architecture_must_be_named(tmp_path: Path) -> None:
    torch.save({"epoch": 1, "model": prefixed(module__student=STATE, module__teacher=EMA)}, tmp_path / "latest")
    with pytest.raises(KdxError, match=r"several networks: module\.student, module\.teacher\.\n.*@latest#module\.student"):
        models.load(f"{NETWORK}@{tmp_path / 'latest'}")
    for key, state in (("module.student", STATE), ("student", STATE), ("teacher", EMA), ("model/teacher", EMA)):
        assert same(models.load(f"{NETWORK}@{tmp_path / 'latest'}#{key}"), state)


def test_a_network_that_contains_its_teacher_is_the_outer_one(tmp_path: Path) -> None:
    """Also if the teacher, whose names have a prefix, has the same architecture."""
    for teacher in (EMA, DEEP):
        torch.save(STATE | prefixed(teacher=teacher), tmp_path / "w.pth")
        network = models.load(f"{NETWORK}@{tmp_path / 'w.pth'}")
        assert same(network, STATE) and network.note.startswith("Weights of w.pth: not used: teacher (")
        torch.save({"state_dict": prefixed(model=STATE | prefixed(teacher=DEEP))}, tmp_path / "nested.ckpt")
        assert same(models.load(f"{NETWORK}@{tmp_path / 'nested.ckpt'}"), STATE)


def test_an_entry_of_an_average_may_contain_only_its_decay(tmp_path: Path) -> None:
    for average, expected in (({"decay": torch.tensor(0.9)}, STATE), ({"decay": torch.tensor(0.9), "module": EMA}, EMA)):
        torch.save({"model": STATE, "ema": average}, tmp_path / "w.pth")
        assert same(models.load(f"{NETWORK}@{tmp_path / 'w.pth'}"), expected)


def test_a_file_without_a_suffix_may_be_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("not weights")
    with pytest.raises(KdxError, match=r"is damaged, or was not written by torch\.save"):
        models.load(f"{NETWORK}@{tmp_path / 'notes'}")
    with pytest.raises(KdxError, match=r"There is no weights file .*student_best"):
        models.load(f"{NETWORK}@{tmp_path / 'student_best'}")
