"""The demonstration: its claims about distillation hold, over seeds and with intervals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from kdx.commands import demo, explain
from kdx.distill import DEMO, distill
from kdx.runs.run import RunOptions

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return demo.run(tmp_path_factory.mktemp("demo"), announce=lambda line: None)


@pytest.fixture(scope="module")
def seeds(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """scores.json of the student distilled with kd, for three seeds: the first is the demonstration itself."""
    contents = [read(runs["kd"])]
    for seed in (1, 2):
        out = tmp_path_factory.mktemp(f"seed{seed}")
        settings = replace(DEMO["kd"], seed=seed)
        models = distill("digits", teacher=DEMO["teacher"], student=DEMO["student"], out=out / "models", settings=settings)
        explain.run("digits", models, out / "run", options=RunOptions(seed=seed, runtime="eager"), announce=lambda line: None)
        contents.append(read(out / "run"))
    return contents


def read(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "scores.json").read_text())
    return content


def last(content: dict[str, Any], kind: str, name: str) -> dict[str, Any]:
    *_, layer = content["layers"]
    entry: dict[str, Any] = content["layers"][layer][kind][name]
    return entry


@pytest.mark.exhaustive
def test_the_student_is_nearer_to_the_teacher_than_the_base_is_for_every_seed(seeds: list[dict[str, Any]]) -> None:
    for content in seeds:
        low, _ = last(content, "contrasts", "FSS(S,T) - FSS(B,T)")["interval"]
        assert low > 0


@pytest.mark.exhaustive
def test_what_only_the_student_has_is_more_relevant_than_what_only_the_base_has(seeds: list[dict[str, Any]]) -> None:
    """For every seed, and over seeds by Student's t."""
    differences = [last(content, "contrasts", "RS(S|B) - RS(B|S)")["value"] for content in seeds]
    assert min(differences) > 0
    reach = stats.t.ppf(0.95, len(differences) - 1) * np.std(differences, ddof=1) / np.sqrt(len(differences))
    assert np.mean(differences) - reach > 0
    for content in seeds:
        low, _ = last(content, "scores", "RS(S|B)")["interval"]
        assert low > 0 and last(content, "scores", "RS(S|B)")["p_value"] <= 0.05


@pytest.mark.exhaustive
def test_the_teacher_is_right_most_often_and_the_student_more_often_than_the_base(seeds: list[dict[str, Any]]) -> None:
    for content in seeds:
        teacher, student, base = (content["accuracy"][role]["value"] for role in ("teacher", "student", "base"))
        assert teacher > student > base > 0.8


def test_both_students_share_teacher_and_base_and_have_a_page(runs: dict[str, Path]) -> None:
    manifests = {method: json.loads((folder / "manifest.json").read_text())["configuration"]["models"] for method, folder in runs.items()}
    for role in ("teacher", "base"):
        assert manifests["kd"][role]["sha256"] == manifests["at"][role]["sha256"]
    assert manifests["kd"]["student"]["sha256"] != manifests["at"]["student"]["sha256"]
    for method, folder in runs.items():
        assert f"distilled with <bdi>{method}</bdi>" in (folder / "report.html").read_text()


def test_the_table_shows_the_runs_scores(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=120).print(demo.table(runs))
    shown = capsys.readouterr().out
    for folder in runs.values():
        assert f"{last(read(folder), 'scores', 'FSS(S,T)')['value']:.3f}" in shown
