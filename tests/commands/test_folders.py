"""No command writes into a folder that contains the results of another command, or anything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.command_line import Run, left_in

TINY = "kdx:resnet,width=2,depth=1,stages=1"

COMMANDS = {
    "a run": "explain digits --models {models}",
    "a comparison of students": "explain digits --student a={models} --student b={models}",
    "a comparison": f"similarity {TINY} {TINY} digits",
    "a study": "study --data digits",
}

FOLDERS = {
    "a run": ("manifest.json", "scores.json", "report.html"),
    "a comparison of students": ("kd/manifest.json", "at/manifest.json", "report.html"),
    "a comparison": ("similarity.json", "heatmap.png", "report.html"),
    "a study": ("study.json", "cells/manifest.json", "trainings/done.json", "report.html"),
    "images": ("cat/1.png", "dog/2.png"),
}


@pytest.mark.parametrize(("command", "folder"), [(command, folder) for command in COMMANDS for folder in FOLDERS if folder != command])
def test_a_folder_of_something_else_is_refused_and_stays_as_it_is(command: str, folder: str, run: Run, tmp_path: Path) -> None:
    models = tmp_path / "models.toml"
    models.write_text(f'student = "{TINY}"\nclasses = {list("0123456789")}\nlayers = ["layer1"]\n')
    for name in FOLDERS[folder]:
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    status, _, err = run(*COMMANDS[command].format(models=models).split(), "--out", "out")
    assert (status, err) == (2, f"Error: out is neither empty nor {command}.\nChoose a new folder for --out.\n")
    assert left_in(tmp_path / "out") == sorted(FOLDERS[folder])


def test_every_models_file_is_read_before_the_first_student_is_explained(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(f'student = "{TINY}"\nlayers = ["layer1"]\n')
    status, out, err = run("explain", "digits", "--student", "a=a.toml", "--student", "b=missing.toml", "--out", "out")
    assert (status, out, left_in(tmp_path)) == (2, "", ["a.toml"])
    assert "missing.toml cannot be read" in err


def test_the_page_of_several_runs_is_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    status, _, err = run("report", "a", "b", "--out", "pages")
    assert (status, err) == (2, "Error: pages is a folder, and --out names a file.\nName the page, such as --out pages/comparison.html.\n")


@pytest.mark.parametrize("folder", ["a study", "images"])
def test_a_folder_without_a_run_is_not_taken_for_one(folder: str, run: Run, tmp_path: Path) -> None:
    for name in FOLDERS[folder]:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text("{}")
    for command in ("evaluate", "report"):
        status, _, err = run(command, "out")
        assert status == 2 and "out contains no run" in err and "Give the folder that kdx explain wrote" in err
