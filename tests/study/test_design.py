"""The design of a study: files, flags and presets, and errors that name the entry."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from kdx.cli.commands import app
from kdx.distill import DEMO, TrainingSettings
from kdx.errors import KdxError
from kdx.runs.run import RunOptions
from kdx.study.design import design_of, split_name
from kdx.study.flags import Flags, design_from
from kdx.study.options import EXPLAIN_KEYS, TRAINING_KEYS
from kdx.study.presets import PRESETS
from tests.study.small_study import CONTENT


def changed(**entries: Any) -> dict[str, Any]:
    return {**copy.deepcopy(CONTENT), **entries}


def test_a_design_is_read_back_from_its_table() -> None:
    for content in (CONTENT, PRESETS["digits"], changed(images=20, layers=["layer1"], assistants={"medium": "kdx:resnet,width=3"})):
        design = design_of(content)
        assert design_of(design.as_table()) == design


def test_every_setting_of_training_and_explaining_is_an_entry() -> None:
    assert {field.name for field in dataclasses.fields(TrainingSettings)} - set(TRAINING_KEYS) == {"method", "seed", "resizing"}
    assert {field.name for field in dataclasses.fields(RunOptions)} - set(EXPLAIN_KEYS) == {"base"}  # follows from training.base


def test_entries_become_settings_of_their_types() -> None:
    training = {
        "learning_rate": 1,
        "image_size": [8, 12],
        "milestones": [1],
        "schedule": "step",
        "resize": "squash",
        "base": "none",
        "probe": 8,
    }
    design = design_of(changed(training=training, explain={"geometry": "batch", "preset": "published", "keep": 0.25}))
    settings, extras = design.training_of("digits", "at", 3)
    assert settings == dataclasses.replace(
        TrainingSettings(method="at", seed=3, learning_rate=1.0, image_size=(8, 12), milestones=(1,), schedule="step"),
        resizing=settings.resizing,
    )
    assert (settings.resizing.mode, extras.probe, extras.has_base) == ("squash", 8, False)
    options = design.run_options_of("digits")
    assert (options.base, options.geometry, options.ratios, options.keep) == ("none", "batch", "mean", 0.25)


def test_a_data_set_has_its_own_entries_and_a_preset_supplies_the_rest() -> None:
    own = {"reference": "digits", "training": {"preset": "cifar10", "batch": 8}, "explain": {"permutations": 0}}
    design = design_of(changed(data={"digits": "digits", "other": own}, training={"momentum": 0.5}))
    settings, _ = design.training_of("other", None, 0)
    assert (settings.epochs, settings.batch, settings.momentum) == (20, 8, 0.5)
    assert design.training_of("digits", None, 0)[0].epochs == TrainingSettings().epochs
    assert (design.run_options_of("other").permutations, design.run_options_of("digits").permutations) == (0, 9)


@pytest.mark.parametrize(
    ("entries", "problem", "hint"),
    [
        ({"methds": ["kd"]}, "no option 'methds'", "methods"),
        ({"training": {"epoch": 3}}, "no option 'training.epoch'", "epochs"),
        ({"training": {"epochs": "3"}}, "training.epochs cannot be '3'", "a whole number"),
        ({"training": {"nesterov": 1}}, "training.nesterov cannot be 1", "true or false"),
        ({"training": {"seed": 3}}, "is an axis of the study", "seeds at the top"),
        ({"training": {"schedule": "cosin"}}, "training.schedule cannot be 'cosin'", "cosine"),
        ({"training": {"alpha": 3}}, "alpha cannot be 3.0", "from 0"),
        ({"training": {"probe": 2}}, "probe cannot be 2", "4 images"),
        ({"training": 3}, "training cannot be 3", r"\[training\]"),
        ({"explain": {"geometry": "hole"}}, "explain.geometry cannot be 'hole'", "whole"),
        ({"explain": {"confidence": 7}}, "explain.confidence cannot be 7.0", "range"),
        ({"data": {"a": "digits", "b": {"reference": "digits", "explain": {"confidence": 0.9}}}}, "values of explain.confidence", "one"),
        ({"explain": {"base": "none"}}, "no option 'explain.base'", "Did you mean|Known"),
        ({"data": {"digits": {"reference": "digits", "traning": {}}}}, "no option 'data.digits.traning'", "training"),
        ({"data": {"digits": {}}}, "has no reference", "--data digits=FOLDER"),
        ({"data": {"a/b": "digits"}}, "'a/b' in data cannot be a name", "letters"),
        ({"methods": ["kd", "kd"]}, "'kd' occurs twice in methods", "a name of its own"),
        ({"methods": ["at+kk"]}, "no distillation method 'kk'", "Choose"),
        ({"methods": []}, "no methods", "--method kd"),
        ({"seeds": [1, 1]}, r"seeds cannot be \[1, 1\]", "different"),
        ({"seeds": 0}, "no seeds", "--seeds 3"),
        ({"images": 0}, "images cannot be 0", "number of images"),
        ({"assistants": {"tiny": "kdx:resnet,width=3"}}, "'tiny' stands for 2 networks", "a name of its own"),
    ],
)
def test_what_is_not_valid_is_an_error_that_names_it(entries: dict[str, Any], problem: str, hint: str) -> None:
    with pytest.raises(KdxError, match=problem) as caught:
        design_of(changed(**entries))
    assert re.search(hint, caught.value.hint)


VALUES = ['"digits"', "5", "-1.5", "true", "1979-05-27", "[1]", '[["digits"]]', "{a = 1}", "{a = [1]}", "{a = {b = 1}}"]
"""Values of every type of TOML, none of which is right for an axis of the grid or a table of options."""


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("key", ["data", "teachers", "assistants", "students", "methods", "layers", "training", "explain"])
@pytest.mark.parametrize("flags", [Flags(), Flags(epochs=1, settings=["training.epochs=3"])], ids=["file", "flags"])
def test_a_value_of_another_type_is_an_error_that_names_the_entry(key: str, value: str, flags: Flags, tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    entries = {"data": '["digits"]', "methods": '["kd"]', "teachers": '["kdx:resnet"]', "students": '["kdx:resnet,width=2"]', key: value}
    file.write_text("\n".join(f"{name} = {text}" for name, text in entries.items()))
    with pytest.raises(KdxError, match=key):
        design_from(file, None, flags)


@pytest.mark.parametrize(("command", "table"), [("explain", "explain"), ("distill", "training")])
def test_a_study_file_has_the_ranges_of_the_command_line(command: str, table: str) -> None:
    flags = {"reference": "reference_images", "lr": "learning_rate"}
    known = EXPLAIN_KEYS if table == "explain" else TRAINING_KEYS
    refused = set()
    for parameter in get_command(app).commands[command].params:  # type: ignore[attr-defined]
        name = flags.get(parameter.name, parameter.name)
        for limit, step in ((getattr(parameter, "min", None), -1), (getattr(parameter, "max", None), 1)):
            if limit is not None and name in known:
                with pytest.raises(KdxError, match=name):
                    design_of(changed(**{table: {name: limit + step}}))
                refused.add(name)
    assert len(refused) > 5


def test_a_reference_with_arguments_is_not_a_name() -> None:
    assert split_name("kdx:resnet,width=8") == (None, "kdx:resnet,width=8")
    assert split_name("small=kdx:resnet,width=8") == ("small", "kdx:resnet,width=8")
    assert split_name("dkd,nontarget=4") == (None, "dkd,nontarget=4")


def test_flags_take_precedence_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "study.toml"
    file.write_text(
        'data = ["digits"]\nmethods = ["kd"]\nseeds = 2\n[teachers]\nlarge = "kdx:resnet"\n[students]\ntiny = "kdx:resnet,width=2"\n'
        "[training]\nepochs = 9\nteacher_epochs = 4\nbatch = 16\n"
    )
    plain = design_from(file, None, Flags())
    assert (plain.seeds, list(plain.methods), plain.training["epochs"]) == ((0, 1), ["kd"], 9)
    flags = Flags(
        data=["x=sample:50:digits"], methods=["at", "both=kd+at"], seeds="4,6", students=["kdx:resnet,width=3"], epochs=2, images=40,
        settings=["explain.geometry=batch", "training.learning-rate=0.5"],
    )  # fmt: skip
    design = design_from(file, None, flags)
    assert design.reference_of("x") == "sample:40:sample:50:digits"
    assert design.methods == {"at": "at", "both": "kd+at"} and design.students == {"resnet-width3": "kdx:resnet,width=3"}
    assert (design.seeds, design.teachers) == ((4, 6), plain.teachers)
    assert design.training == {"epochs": 2, "batch": 16, "learning_rate": 0.5} and design.explain == {"geometry": "batch"}


def test_digits_alone_have_the_settings_of_the_demonstration() -> None:
    design = design_from(None, None, Flags(data=["digits"]))
    assert len(design.teachers) == 2 and len(design.methods) == 2 and len(design.seeds) == 3
    settings, _ = design.training_of("digits", "kd", 0)
    assert settings == dataclasses.replace(DEMO["kd"], epochs=settings.epochs, teacher_epochs=settings.teacher_epochs)
    assert settings.epochs < DEMO["kd"].epochs
    assert len(design_from(None, None, Flags(data=["digits"], seeds="1", methods=["kd"])).seeds) == 1


def test_the_design_of_the_paper_takes_the_data_sets_that_are_named(tmp_path: Path) -> None:
    design = design_from(None, "paper", Flags(data=["asirra=pets", f"cifar10:{tmp_path}"], epochs=1, images=100))
    assert list(design.data) == ["asirra", "cifar10"]
    settings = [design.training_of(data, "kd", 0)[0] for data in design.data]
    assert [(one.epochs, one.batch, one.image_size) for one in settings] == [(1, 32, (224, 224)), (1, 16, None)]
    assert design.reference_of("asirra") == "sample:100:pets"
    with pytest.raises(KdxError, match="does not contain its data sets"):
        design_from(None, "paper", Flags())


def test_a_study_needs_a_file_or_data(tmp_path: Path) -> None:
    for flags in (Flags(), Flags(seeds="2")):
        with pytest.raises(KdxError, match="no file and no data"):
            design_from(None, None, flags)
    with pytest.raises(KdxError, match="seeds cannot be 'x'"):
        design_from(None, None, Flags(data=["digits"], seeds="x"))
    (tmp_path / "bad.toml").write_text("data = [")
    for name in ("bad.toml", "none.toml"):
        with pytest.raises(KdxError, match="cannot be read"):
            design_from(tmp_path / name, None, Flags())
    with pytest.raises(KdxError, match="is not a setting"):
        design_from(None, None, Flags(data=["digits"], settings=["training.epochs"]))


@pytest.mark.parametrize("seeds", [10**30, 10_001, [2**32], [-1], [1, 1]])
def test_seeds_that_would_take_all_memory_or_are_none(seeds: Any) -> None:
    with pytest.raises(KdxError, match="seeds"):
        design_of({"data": ["digits"], "teachers": ["kdx:resnet"], "students": ["kdx:resnet,width=8"], "methods": ["kd"], "seeds": seeds})
