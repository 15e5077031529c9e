"""Checkpoints: recipes that differ are refused, and files are replaced atomically."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kdx import models
from kdx.distill import TrainingSettings, distill
from kdx.distill.checkpoints import Recipe, is_finished, on_processor, resume, save_state, save_weights
from kdx.errors import KdxError
from kdx.models import ModelsFile, read_models
from kdx.models.checkpoint_files import read_recipe
from kdx.runs.split import with_recorded_data
from tests.distill.small import QUICK, STUDENT, TEACHER, Interruption, stop_at


@pytest.mark.parametrize(
    ("student", "settings", "message"),
    [
        (STUDENT, replace(QUICK, learning_rate=0.01), "teacher.safetensors .*: learning_rate differs"),
        (STUDENT, replace(QUICK, epochs=4), "base.safetensors .*: epochs differs"),
        (STUDENT, replace(QUICK, alpha=0.5), "student.safetensors .*: alpha differs"),
        (TEACHER, QUICK, "base.safetensors .*: architecture differs"),
    ],
)
def test_a_folder_of_another_configuration_is_refused(finished: Path, student: str, settings: TrainingSettings, message: str) -> None:
    with pytest.raises(KdxError, match=message):
        distill("digits", teacher=TEACHER, student=student, out=finished, settings=settings, report=lambda result: None)


def test_a_state_of_another_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        distill("digits", teacher=TEACHER, student=STUDENT, out=tmp_path, settings=QUICK, report=stop_at("teacher", 1))
    with pytest.raises(KdxError, match=r"teacher.state.pt .*: batch differs"):
        distill("digits", teacher=TEACHER, student=STUDENT, out=tmp_path, settings=replace(QUICK, batch=64))


def test_an_unreadable_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "student.state.pt"
    path.write_bytes(b"not a checkpoint")
    network = torch.nn.Linear(1, 1)
    with pytest.raises(KdxError, match="cannot be read"):
        resume(path, Recipe({}), network, torch.optim.SGD(network.parameters(), 0.1))
    with pytest.raises(KdxError, match="cannot be read as safetensors"):
        is_finished(path, Recipe({}))


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{"])
def test_a_damaged_recipe_is_an_error(tmp_path: Path, text: str) -> None:
    save_file({"weight": torch.zeros(1)}, tmp_path / "teacher.safetensors", {"recipe": text})
    with pytest.raises(KdxError, match=r"recipe in .* is damaged"):
        is_finished(tmp_path / "teacher.safetensors", Recipe({"seed": 1}))


def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    weights, state = tmp_path / "student.safetensors", tmp_path / "student.state.pt"
    save_weights(weights, {"weight": torch.ones(2)}, Recipe({"seed": 0}))
    save_state(state, {"epoch": 1})
    before = weights.read_bytes(), state.read_bytes()
    with pytest.raises(Exception, match="pickle"):
        save_state(state, {"epoch": lambda: 2})
    with pytest.raises(TypeError, match="JSON serializable"):
        save_weights(weights, {"weight": torch.zeros(2)}, Recipe({"seed": object()}))
    assert (weights.read_bytes(), state.read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [weights.name, state.name]
    assert is_finished(weights, Recipe({"seed": 0}))


def test_a_checkpoint_in_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(KdxError, match="cannot be written"):
        save_state(tmp_path / "out" / "student.state.pt", {"epoch": 1})


def test_a_network_that_is_named_by_its_own_reference_has_the_size_of_its_training(finished: Path) -> None:
    """kdx:resnet takes 32 x 32 by itself, and these were distilled at 8 x 8."""
    for role, architecture in (("student", STUDENT), ("teacher", TEACHER)):
        network = models.load(f"{architecture}@{finished / role}.safetensors", classes=10)
        assert network.preprocessing == read_models(finished / "models.toml").load(role).preprocessing
        assert network.preprocessing.size == (8, 8)
    assert models.load(STUDENT).preprocessing.size == (32, 32)


def test_a_models_file_without_data_takes_it_from_the_checkpoints(finished: Path, tmp_path: Path) -> None:
    written = read_models(finished / "models.toml")
    by_hand = ModelsFile(finished / "own.toml", written.base, written.student)
    assert (by_hand.fingerprint, by_hand.split_seed) == (None, None)
    record = with_recorded_data(by_hand)
    assert (record.fingerprint, record.split_seed) == (written.fingerprint, written.split_seed)
    shutil.copy(finished / "base.safetensors", tmp_path / "base.safetensors")
    recipe = read_recipe(finished / "base.safetensors") | {"split_seed": 7}
    save_file(load_file(finished / "base.safetensors"), tmp_path / "base.safetensors", metadata={"recipe": json.dumps(recipe)})
    assert written.base is not None
    other = replace(by_hand, base=written.base.replace("@base", f"@{tmp_path}/base"))
    assert with_recorded_data(other) == other  # the checkpoints contradict each other
    stated = replace(by_hand, data="digits", split_seed=3)
    assert with_recorded_data(stated) == stated


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])
def test_a_state_on_the_processor_keeps_its_values(device: str) -> None:
    """This includes nested dictionaries and lists, and tensors have no gradient. A copy does not change with the weights."""
    weight = torch.arange(3.0, device=device, requires_grad=True)
    state = {"step": 2, "model": {"weight": weight}, "numpy": ["MT", weight.detach() + 1]}
    result = on_processor(state, copy=True)
    with torch.no_grad():
        weight += 5
    assert result["step"] == 2
    assert result["model"]["weight"].tolist() == [0, 1, 2]
    assert result["numpy"][0] == "MT"
    assert result["numpy"][1].tolist() == [1, 2, 3]
    assert not result["model"]["weight"].requires_grad
    assert {result["model"]["weight"].device.type, result["numpy"][1].device.type} == {"cpu"}
