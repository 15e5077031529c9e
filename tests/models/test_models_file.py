"""The models file: writing, reading, loading its networks, and files that are malformed."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kdx import models
from kdx.choices import Resizing
from kdx.errors import KdxError
from kdx.export.graphs import Preprocessing
from kdx.models import models_file
from kdx.models.layer_pairs import parse_layers

SMALL = "kdx:resnet,width=4,depth=1,classes=3"


def test_reading_a_models_file_is_the_inverse_of_writing_it(tmp_path: Path) -> None:
    written = models_file.write_models(
        tmp_path / "models.toml",
        teacher="timm:resnet18@t.pt",
        base=SMALL,
        student=SMALL,
        layers=["layer3", "layer1=stem.0"],
        classes=["cat", 'a "quoted"\n\\name\x7f', "猫"],
        targets="embeddings.npy",
        preprocessing=Preprocessing((24, 32), (0.5, 0.25, 1e-7), (0.1,)),
        resizing=Resizing("letterbox", "bilinear"),
        data="digits",
        fingerprint="ab12",
        split_seed=3,
        used="u.npy",
        training={"method": "kd", "accuracy": 0.97, "whole": 1.0, "augment": True, "nested": {"odd key": [1, 2]}, "nothing": None},
    )
    assert models_file.read_models(tmp_path / "models.toml") == written
    assert written.preprocessing == Preprocessing((24, 32), (0.5, 0.25, 1e-7), (0.1,))
    assert written.resizing == Resizing("letterbox", "bilinear")
    assert written.classes == ("cat", 'a "quoted"\n\\name\x7f', "猫")
    assert written.training == {"method": "kd", "accuracy": 0.97, "whole": 1.0, "augment": True, "nested": {"odd key": [1, 2]}}
    assert (written.layers, written.data) == (("layer3", "layer1=stem.0"), "digits")
    assert written.targets == "embeddings.npy"
    assert (written.fingerprint, written.split_seed, written.used) == ("ab12", 3, "u.npy")
    assert os.listdir(tmp_path) == ["models.toml"]  # noqa: PTH208 - names are compared


def test_a_models_file_loads_weights_beside_it(tmp_path: Path) -> None:
    state = models.load(SMALL).module.state_dict()
    save_file(state, tmp_path / "s.safetensors")
    file = models_file.write_models(
        tmp_path / "m.toml",
        teacher="kdx:resnet,width=4",
        base=SMALL,
        student=f"{SMALL}@s.safetensors",
        classes=["a", "b"],
        preprocessing=Preprocessing((9, 9)),
    )
    student = file.load("student")
    assert torch.equal(student.module.state_dict()["fc.weight"], state["fc.weight"])
    assert student.preprocessing == Preprocessing((9, 9))
    assert file.load("teacher").module.get_submodule("fc").out_features == 2
    assert replace(file, preprocessing=None).load("base").preprocessing.size == (32, 32)
    with pytest.raises(ValueError, match="role"):
        file.load("pupil")
    network, classes = models_file.load_any(f"{tmp_path}/m.toml:student")
    assert (network.weights_hash, classes) == (student.weights_hash, ("a", "b"))
    with pytest.raises(KdxError, match=r"'pupil' .* is not a role"):
        models_file.load_any(f"{tmp_path}/m.toml:pupil")
    assert models_file.load_any(SMALL)[1] == ()


def test_the_teacher_of_a_models_file_is_optional(tmp_path: Path) -> None:
    written = models_file.write_models(tmp_path / "m.toml", base=SMALL, student=SMALL, layers=["layer3"])
    assert "teacher" not in (tmp_path / "m.toml").read_text()
    assert models_file.read_models(tmp_path / "m.toml") == written
    assert written.teacher is None and written.references == {"base": SMALL, "student": SMALL}
    for load in (lambda: written.load("teacher"), lambda: models_file.load_any(f"{tmp_path}/m.toml:teacher")):
        with pytest.raises(KdxError, match="names no teacher"):
            load()


def test_a_models_file_may_name_a_layer_per_role_and_no_base(tmp_path: Path) -> None:
    text = """student = 'kdx:resnet,classes=3'
teacher = 'kdx:resnet,classes=3'
layers = ['layer1', {student = 'layer2', teacher = 'layer3'}, 'student=layer3,teacher=layer3.0']
"""
    (tmp_path / "m.toml").write_text(text)
    file = models_file.read_models(tmp_path / "m.toml")
    assert list(file.references) == ["teacher", "student"] and file.base is None
    assert {names.student: names.teacher for names in parse_layers(file.layers).values()} == {
        "layer1": "layer1",
        "layer2": "layer3",
        "layer3": "layer3.0",
    }
    assert (
        models_file.write_models(tmp_path / "w.toml", student=file.student, teacher=file.teacher, layers=file.layers).layers == file.layers
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("teacher = ", "cannot be read"),
        ("teacher = 'a:b'", "names no student"),
        ("{roles}\nlayer = ['a']", "unknown key 'layer'\\.\nDid you mean 'layers'"),
        ("{roles}\nlayers = 'a'", "'layers' .* is not a list"),
        ("{roles}\nlayers = [{teacher = 'a'}]", "is not a layer for each role"),
        ("{roles}\nlayers = [{student = 'a', tutor = 'b'}]", "is not a layer for each role"),
        ("{roles}\nlayers = [{student = 1}]", "'layers' .* is not text"),
        ("{roles}\nclasses = [1]", "'classes' .* is not text"),
        ("{roles}\n[data]\nseed = true", "'data.seed' .* is not a whole number"),
        ("{roles}\n[data]\nsed = 1", "unknown key data.'sed'"),
        ("{roles}\n[preprocessing]\nsize = [3]", "not valid"),
        ("{roles}\n[preprocessing]\nresize = 'crop'", "unknown resize 'crop'"),
        ("{roles}\n[preprocessing]\nstd = [0.0]", "not valid"),
        ("{roles}\n[preprocessing]\nmean = ['x']", "not valid"),
        ("teacher = 1\nbase = 'a:b'\nstudent = 'a:b'", "'teacher' .* is not text"),
    ],
)
def test_errors_in_a_models_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "m.toml"
    path.write_text(text.replace("{roles}", "teacher = 'a:b'\nbase = 'a:b'\nstudent = 'a:b'"))
    with pytest.raises(KdxError, match=message):
        models_file.read_models(path)


def test_a_missing_models_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KdxError, match="No such file"):
        models_file.read_models(tmp_path / "m.toml")


def test_a_table_with_only_a_resize_keeps_each_networks_own_preprocessing(tmp_path: Path) -> None:
    path = tmp_path / "models.toml"
    path.write_text('base = "kdx:resnet"\nstudent = "kdx:resnet"\n[preprocessing]\nresize = "squash"\n')
    file = models_file.read_models(path)
    assert file.preprocessing is None and file.resizing == Resizing("squash") and file.load("base").preprocessing.size == (32, 32)
