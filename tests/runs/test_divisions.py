"""Scores per class and per group in a run: computed, resumed, stored, read and printed as tables."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import kdx
from kdx.runs import schema
from kdx.runs.plan import RunOptions
from kdx.runs.record import read_run
from kdx.runs.score_tables import main_scores
from kdx.scores.groups import GroupScores
from tests.command_line import status_of
from tests.runs.small_run import WHOLE, interrupt, results, run, same

_TABLE = "groups.csv"


@pytest.fixture(scope="module")
def options(folder: Path) -> RunOptions:
    """Groups by the number of a picture: ``late`` from 10 on, ``early`` before, and none for picture 28."""
    lines = ["id,time,even"]
    for path in sorted((folder / "pictures").rglob("*.png")):
        number = int(path.stem)
        time = "" if number == 28 else "late" if number >= 10 else "early"
        lines.append(f"{path.relative_to(folder / 'pictures').as_posix()},{time},{number % 2}")
    (folder / _TABLE).write_text("\n".join(lines))
    return replace(WHOLE, groups="time", groups_file=folder / _TABLE, keep_features=True)


@pytest.fixture(scope="module")
def grouped(folder: Path, options: RunOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "grouped"
    run(folder, out, options)
    return out


def _features(out: Path, layer: str) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.int64]]:
    """The stored features of every role at a layer, and the images' rows in samples.parquet."""
    record = read_run(out)
    order = np.random.default_rng(record.manifest["configuration"]["seed"]).permutation(record.explained)
    files = {role: out / "features" / f"{role}-{list(record.layers).index(layer)}.npy" for role in record.roles}
    return {role: np.load(file).reshape(record.explained, -1) for role, file in files.items()}, order


def _compare(stored: Any, direct: GroupScores) -> None:
    assert stored.n == direct.n and stored.missing == direct.missing
    assert stored.scores.keys() == direct.scores.keys() and stored.contrasts.keys() == direct.contrasts.keys()
    for name, score in (direct.scores | direct.contrasts).items():
        entry = stored.entries[name]
        assert entry.value == pytest.approx(score.value, abs=1e-6) and entry.interval == pytest.approx(score.interval, abs=1e-5)
    for name, contrast in direct.contrasts.items():
        assert stored.contrasts[name].p_adjusted == pytest.approx(contrast.p_adjusted, abs=1e-5)


def test_a_run_has_the_scores_of_its_features(grouped: Path) -> None:
    """With 29 images, a run and `kdx.class_scores` leave out single images, so the intervals agree as well."""
    record = read_run(grouped)
    features, orders = {}, {}
    for layer in record.layers:
        features[layer], orders[layer] = _features(grouped, layer)
    order = orders["layer2"]
    labels = record.samples.labels[order]
    names = np.array(
        ["" if int(Path(name).stem) == 28 else "late" if int(Path(name).stem) >= 10 else "early" for name in record.samples.ids]
    )
    classes, groups = kdx.class_scores(features, labels, seed=3), kdx.group_scores(features, labels, names[order], seed=3)
    for layer in record.layers:
        assert list(record.class_scores[layer]) == record.classes and list(record.group_scores[layer]) == ["early", "late"]
        for label, name in enumerate(record.classes):
            _compare(record.class_scores[layer][name], classes[layer][label])
        for name, scores in record.group_scores[layer].items():
            direct = groups[layer][name]
            for score, value in direct.scores.items():
                assert scores.scores[score].value == pytest.approx(value.value, abs=1e-6)
    assert record.group_column == "time" and not record.left_out


@pytest.mark.slow
def test_a_resumed_run_has_the_same_scores(
    folder: Path, grouped: Path, options: RunOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("kdx.runs.run.collect_whole", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "run", options)
    assert len(list((tmp_path / "run" / schema.PROGRESS).glob("layer-*.npz"))) == 2
    run(folder, tmp_path / "run", options)
    assert same(results(tmp_path / "run"), results(grouped))
    with pytest.raises(kdx.KdxError, match="groups"):
        run(folder, tmp_path / "run", replace(options, groups="even"))


@pytest.mark.slow
def test_a_layer_of_an_older_version_has_no_scores_per_class(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("kdx.runs.run.collect_whole", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(folder, tmp_path / "run", WHOLE)
    for path in (tmp_path / "run" / schema.PROGRESS).glob("layer-*.npz"):
        with np.load(path) as content:
            arrays = {name: content[name] for name in content.files if not name.startswith("grouped/")}
        np.savez(path, allow_pickle=False, **arrays)
    run(folder, tmp_path / "run", WHOLE)
    record = read_run(tmp_path / "run")
    assert not any(record.class_scores.values()) and record.scores["layer2"]


def test_tables_and_python_have_every_score_once(grouped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened, record = kdx.open_run(grouped), read_run(grouped)
    for kind, rows, layers in (("classes", opened.class_scores, record.class_scores), ("groups", opened.group_scores, record.group_scores)):
        column = "class" if kind == "classes" else "group"
        expected = {
            (layer, name, score)
            for layer, all_ in layers.items()
            for name in all_
            for score in (*record.score_names, *record.contrast_names)
        }
        assert [(row["layer"], row[column], row["score"]) for row in rows] and len(rows) == len(expected)
        assert {(row["layer"], row[column], row["score"]) for row in rows} == expected
        stored = (grouped / schema.GROUPED_TABLES[kind]).read_text()
        assert stored == rows.csv() == opened.table("csv", by=column)  # type: ignore[arg-type]
        table = list(csv.DictReader(stored.splitlines()))
        first = layers["layer2"][table[0][column]].entries[table[0]["score"]]
        assert float(table[0]["value"]) == first.value and (float(table[0]["low"]), float(table[0]["high"])) == first.interval
    markdown, latex = opened.table("markdown", by="class"), opened.table("latex", by="group", digits=2)
    value = record.class_scores["layer3"]["dog"].scores["RS(S)"].value
    assert f"{value:.3f}".replace("-", "−") in markdown and markdown.count("| dog |") == 2
    assert len(main_scores(record)) == 7 and latex.count(r"\toprule") == 2
    assert len(re.findall(r"^(early|late) & \d+ (& .*){7}\\\\$", latex, re.M)) == 4
    assert status_of("report", grouped, "--table", "markdown", "--by", "class") == 0
    assert capsys.readouterr().out == markdown
    assert status_of("report", grouped, "--by", "class") == 2
    with pytest.raises(kdx.KdxError, match="images"):
        opened.table("images", by="class")


def test_other_runs_state_why_they_have_no_scores_per_class(finished: Path, folder: Path, tmp_path: Path) -> None:
    record = read_run(finished)  # the geometry batch
    assert not any(record.class_scores.values()) and "geometry batch" in record.left_out["classes"]
    assert not (finished / "scores_by_class.csv").exists() and kdx.open_run(finished).class_scores == []
    with pytest.raises(kdx.KdxError, match="geometry batch"):
        kdx.open_run(finished).table("csv", by="class")
    with pytest.raises(kdx.KdxError, match="per group"):
        kdx.open_run(finished).table("csv", by="group")
    run(folder, tmp_path / "few", replace(WHOLE, max_classes=2), layers=("layer3",))
    assert "3 classes" in read_run(tmp_path / "few").left_out["classes"]
    assert json.loads((tmp_path / "few" / "manifest.json").read_text())["configuration"]["max_classes"] == 2


@pytest.mark.parametrize(
    ("content", "column", "problem"),
    [
        ("name,a\nx,1", "a", "no column 'id'"),
        ("id,a,b\ncat/0.png,1,2", None, "2 columns"),
        ("id,a\ncat/0.png,1", "b", "no column 'b'"),
        ("id,a\nelsewhere.png,1", "a", "No image"),
        ("id,a\ncat/0.png,1\ncat/0.png,2", "a", "two values"),
        ("id,a\n" + "\n".join(f"{name}/{number}.png,{number}" for number in range(29) for name in ("cat", "dog", "owl")), "a", None),
    ],
)
def test_a_table_of_groups_is_checked(folder: Path, tmp_path: Path, content: str, column: str | None, problem: str | None) -> None:
    from kdx.data.dataset import open_data
    from kdx.runs.grouping import grouping_of

    (tmp_path / "table.csv").write_text(content)
    data = open_data(str(folder / "pictures"))
    if problem is None:
        grouping = grouping_of(data, np.arange(29), column, tmp_path / "table.csv")
        assert grouping is not None and grouping.names == tuple(map(str, range(29)))  # natural order
        assert [members.tolist() for members in grouping.members(np.array([5, 7]))][int(Path(data.ids[7]).stem)] == [1]
        return
    with pytest.raises(kdx.KdxError, match=problem):
        grouping_of(data, np.arange(29), column, tmp_path / "table.csv")
    with pytest.raises(kdx.KdxError, match="no table"):
        grouping_of(data, np.arange(29), "a", None)


def test_the_column_of_a_data_table_needs_no_other_file(tmp_path: Path, folder: Path) -> None:
    from kdx.data.dataset import open_data
    from kdx.runs.grouping import grouping_of

    paths = sorted((folder / "pictures").rglob("*.png"))
    rows = [f"{path.relative_to(folder).as_posix()},{path.parent.name},{int(path.stem) % 2}" for path in paths]
    (folder / "labels.csv").write_text("\n".join(["path,label,parity", *rows]))
    data = open_data(str(folder / "labels.csv"))
    grouping = grouping_of(data, np.arange(29), "parity", None)
    assert grouping is not None and grouping.names == ("0", "1")
    assert [int(Path(name).stem) % 2 for name in data.ids] == grouping.codes.tolist()
