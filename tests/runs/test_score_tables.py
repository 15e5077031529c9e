"""Tables of scores: the golden files in tests/runs/tables, and the stored numbers.

After a deliberate change, write the files with ``python -m tests.runs.test_score_tables``, and read the difference.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
import tempfile
from pathlib import Path

import pytest
from rich.table import Table

import kdx
from kdx import progress
from kdx.choices import TableFormat
from tests.command_line import in_folder
from tests.made_runs import make_hostile_run, make_run

GOLDEN = Path(__file__).with_name("tables")
FILES: dict[TableFormat, str] = {"csv": "scores.csv", "latex": "scores.tex", "markdown": "scores.md"}


def golden_run(folder: Path) -> Path:
    """A run with a number that could not be computed, a negative one that rounds to zero, and a layer with an underscore."""
    make_run(folder, layers={"layer_1": "layer1", "layer3": "layer3"}, images=5, gallery=1)
    lost = {"value": None, "interval": [None, None], "p_value": None, "n": 5, "batches": 1}
    content = json.loads((folder / "scores.json").read_text())
    content["layers"]["layer_1"]["scores"]["RS(T|S)"] = lost
    content["layers"]["layer_1"]["scores"]["RS(S|B)"] |= {"value": -0.0004, "interval": [-0.31, 0.25]}
    (folder / "scores.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return golden_run(tmp_path_factory.mktemp("golden") / "run")


@pytest.mark.parametrize("format_", FILES)
def test_tables_are_the_golden_files(golden: Path, format_: TableFormat) -> None:
    assert kdx.open_run(golden).table(format_) == (GOLDEN / FILES[format_]).read_text("utf-8")


@pytest.mark.parametrize("format_", ["latex", "markdown"])
def test_every_number_is_the_stored_one(golden: Path, format_: TableFormat) -> None:
    text = kdx.open_run(golden).table(format_, digits=5).replace("\N{MINUS SIGN}", "-").replace("$", "").replace("\\|", "|")
    layers = json.loads((golden / "scores.json").read_text())["layers"]
    separator = "&" if format_ == "latex" else "|"
    for name in layers["layer3"]["scores"] | layers["layer3"]["contrasts"]:
        label = re.sub(r"\b(FSS|RS)\(", r"\\mathrm{\1}(", name).replace("|", " \\mid ") if format_ == "latex" else name
        start = label if format_ == "latex" else f"| {name}"
        (line,) = [line for line in text.splitlines() if line.startswith(f"{start} {separator}")]
        cells = line[len(start) :].split(separator)[1:3]
        for layer, cell in zip(layers, cells, strict=True):
            stored = (layers[layer]["scores"] | layers[layer]["contrasts"])[name]
            printed = [float(number) for number in re.findall(r"[+-]?\d+\.\d+", cell)]
            if stored["value"] is None:
                assert printed == []
            else:
                assert printed == pytest.approx([stored["value"], *stored["interval"]], abs=0.51e-5)


def test_the_csv_of_images_has_every_number(golden: Path) -> None:
    run = kdx.open_run(golden).sorted("wrong")
    rows = list(csv.DictReader(io.StringIO(run.table("images"))))
    assert [row["id"] for row in rows] == run.images
    for name in run.numbers:
        values = run.number(name)
        assert [float(row[name] or "nan") for row in rows] == pytest.approx(values.tolist(), nan_ok=True)


def test_names_cannot_break_a_table(tmp_path: Path) -> None:
    run = kdx.open_run(make_hostile_run(tmp_path / "run"))
    markdown, latex = run.table("markdown"), run.table("latex")
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {4}
    assert "<" not in re.sub(r"\\<", "", markdown)
    body = latex.split("\\midrule")[0].splitlines()[1:]
    assert not re.search(r"(?<!\\)[#%_$^~]", "".join(body).replace("\\textasciicircum{}", ""))
    assert {len(re.findall(r"(?<!\\)&", line)) for line in latex.splitlines() if line.endswith("\\\\") and "multicolumn" not in line} == {2}
    with pytest.raises(kdx.KdxError, match="no table format 'html'"):
        run.table("html")  # type: ignore[arg-type]


def test_the_command_prints_a_table_and_nothing_else(
    golden: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, error = in_folder(golden.parent, monkeypatch, capsys)("report", golden.name, "--table", "latex")
    assert (status, out, error) == (0, (GOLDEN / "scores.tex").read_text("utf-8"), "") and not (golden / "report.html").exists()


def test_tables_in_a_pipe_are_not_cut(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(progress, "console", progress.console.__wrapped__)
    table = Table(*(f"column {number} of a wide table" for number in range(30)))
    table.add_row(*(f"value-{number}-" + "x" * 30 for number in range(30)))
    progress.console().print(table)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(f"value-{number}-{'x' * 30}" in lines[3] for number in range(30))
    monkeypatch.setenv("COLUMNS", "60")
    progress.console().print(table)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60


def test_numbers_have_no_negative_zero() -> None:
    from kdx.runs.number_text import number

    assert [number(x) for x in (-0.001, 0.0, math.nan, -1.5)] == ["0.00", "0.00", "–", "−1.50"]
    assert number(0.25, 1, sign=True) == "+0.2" and number(-0.0, sign=True) == "+0.00"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        run = kdx.open_run(golden_run(Path(folder) / "run"))
        for format_, name in FILES.items():
            (GOLDEN / name).write_text(run.table(format_), "utf-8")
