"""`kdx explain` with several students: each run is that of the student alone, and teacher and base run once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kdx
from kdx.cli.commands import app
from kdx.commands import explain, explain_students
from kdx.models.models_file import read_models
from kdx.report.comparison import compare_runs
from kdx.report.comparison_tables import difference_tables
from tests.runs.small_run import OPTIONS, interrupt, results, same
from tests.runs.test_shared_features import counted
from tests.runs.test_shared_features import models as models

FEW = replace(OPTIONS, gallery=2, permutations=0)


@pytest.mark.slow
def test_each_run_is_that_of_its_student_alone_also_after_an_interruption(
    folder: Path, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = str(folder / "pictures")
    images = counted(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr("kdx.commands.explain_students.write_comparison", interrupt)
        with pytest.raises(KeyboardInterrupt):
            explain_students.run(data, models, tmp_path / "out", options=FEW, announce=lambda line: None)
    page = explain_students.run(data, models, tmp_path / "out", options=FEW, announce=lambda line: None)
    assert images == {"teacher": 29, "base": 29, "student": 58}
    assert page == tmp_path / "out" / "report.html"
    assert "2 students side by side" in page.read_text()
    for name, file in models.items():
        explain.run(data, file, tmp_path / name, options=FEW, announce=lambda line: None)
        assert same(results(tmp_path / "out" / name), results(tmp_path / name))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["at", "kd", "report.html"]


@pytest.mark.slow
def test_the_page_has_an_interval_for_every_difference_if_the_runs_have_the_same_parts(
    folder: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    options = replace(FEW, geometry="whole")
    page = explain_students.run(str(folder / "pictures"), models, tmp_path / "out", options=options, announce=lambda line: None)
    assert "Differences between students" in page.read_text()
    comparison = compare_runs({name: tmp_path / "out" / name for name in models})
    first, other = comparison.names
    assert comparison.paired == (other,)
    for table, layer in zip(difference_tables(comparison), comparison.layers, strict=True):
        assert table.columns == ("Score", f"{other} − {first}") and len(table.rows) == len(comparison.numbers)
        for number in comparison.numbers:
            entries = [comparison.entry(student, layer, number) for student in (other, first)]
            difference = comparison.difference(other, layer, number)
            assert difference is not None and entries[0] is not None and entries[1] is not None
            assert difference.value == pytest.approx(entries[0].value - entries[1].value, abs=1e-12)
            low, high = difference.interval
            assert low <= difference.value <= high
            if number == "RS(B)":  # the base is the same
                assert high - low < 1e-6
    parts = comparison.runs[other].folder / "influences.npz"
    content = parts.read_bytes()
    for damaged in (b"damaged", content[:200]):
        parts.write_bytes(damaged)
        again = compare_runs({name: run.folder for name, run in comparison.runs.items()})
        assert again.paired == () and difference_tables(again) == []
    parts.write_bytes(content)


@pytest.mark.slow
def test_the_command_takes_references_files_and_layers_per_student(folder: Path, models: dict[str, Path], tmp_path: Path) -> None:
    reference = f"kdx:resnet,width=4,depth=1,classes=3@{folder / 'other.safetensors'}"
    wide = f"kdx:resnet,width=8,depth=1,classes=3@{folder / 'teacher.safetensors'}"
    command = ["explain", str(folder / "pictures"), "--student", f"kd={folder / 'models.toml'}", "--student", f"at={reference}"]
    command += ["--teacher", wide, "--base", "none", "--layer", "kd:layer2", "--layer", "at:layer3=layer2", "--permutations", "0"]
    command += ["--gallery", "2", "--runtime", "eager", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    comparison = compare_runs({name: tmp_path / "out" / name for name in ("kd", "at")})
    assert comparison.layers == {"layer2": ("layer2", "layer3")}  # the teacher's layer
    assert {run.roles for run in comparison.runs.values()} == {("teacher", "student")}
    assert comparison.same_teacher
    assert json.loads((tmp_path / "out" / "kd" / "manifest.json").read_text())["command"][0] == "kdx"


def test_models_files_keep_their_networks_except_those_that_are_given(folder: Path, tmp_path: Path) -> None:
    files = explain_students.student_files({"kd": str(folder / "models.toml"), "at": "timm:resnet18@a.pt"}, None, None, tmp_path)
    assert files["kd"] == folder / "models.toml"
    assert read_models(files["at"]).student == f"timm:resnet18@{Path('a.pt').resolve()}"
    files = explain_students.student_files({"kd": str(folder / "models.toml")}, "timm:resnet34", None, tmp_path)
    written, original = read_models(files["kd"]), read_models(folder / "models.toml")
    assert (written.path, written.teacher) == (tmp_path / "kd.toml", "timm:resnet34")
    assert written.student == original.student.replace("@", f"@{folder.resolve()}/")
    assert (written.layers, written.classes, written.preprocessing) == (original.layers, original.classes, original.preprocessing)
    assert explain_students.student_files({"kd": str(folder / "models.toml")}, None, "none", tmp_path)["kd"].read_text().count("base") == 0


def test_scores_during_training_belong_to_the_teacher_and_base_of_the_models_file(folder: Path, tmp_path: Path) -> None:
    path = folder / "probed.toml"
    path.write_text((folder / "models.toml").read_text() + '\n[training]\nprobe = "student.csv"\nepochs = 3\n')
    files = explain_students.student_files({"kd": str(path)}, None, "none", tmp_path)
    assert read_models(files["kd"]).training == {"epochs": 3}


def test_layers_of_one_student() -> None:
    layers = ["layer4", "at:features.3=layer3", "kd:layer3", "blocks.9:tokens(prefix=1)"]
    assert explain_students.layers_of("kd", ["kd", "at"], layers) == ("layer4", "layer3", "blocks.9:tokens(prefix=1)")
    assert explain_students.layers_of("at", ["kd", "at"], layers) == ("layer4", "features.3=layer3", "blocks.9:tokens(prefix=1)")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["kd=a.pt2"], "Only one student"),
        (["kd=a.pt2", "timm:resnet18,num_classes=10"], "does not name a student"),
        (["kd=a.pt2", "at="], "does not name a student"),
        (["kd=a.pt2", "a/t=b.pt2"], "cannot be named 'a/t'"),
        (["kd=a.pt2", "networks=b.pt2"], "cannot be named 'networks'"),
        (["kd=a.pt2", "KD=b.pt2"], "Two students are named kd"),
    ],
)
def test_names_that_cannot_be_folders_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(kdx.KdxError, match=message):
        explain_students.parse_students(texts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "No network is named"),
        (["--models", "m.toml", "--teacher", "timm:resnet18"], "--teacher has an effect only"),
        (["--models", "m.toml", "--student", "kd=a.pt2"], "both name students"),
        (["--student", "kd=a.pt2", "--data", "digits"], "--data explains"),
    ],
)
def test_options_that_exclude_each_other(options: list[str], message: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["explain", "digits", "--out", str(tmp_path), *options])
    assert isinstance(result.exception, kdx.KdxError)
    assert message in result.exception.problem
