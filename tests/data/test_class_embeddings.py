"""Class embeddings: every form of file gives the same rows, and errors name the problem."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from kdx import KdxError
from kdx.data.class_embeddings import read_class_embeddings

CLASSES = ("cat", "7", "owl, barn")
ROWS = np.array([[0.5, -1.0], [2.0, 0.25], [0.0, 1e-3]])


def as_npy(path: Path) -> Path:
    np.save(path.with_suffix(".npy"), ROWS)
    return path.with_suffix(".npy")


def as_npz(path: Path) -> Path:
    np.savez(path.with_suffix(".npz"), **dict(zip(CLASSES[::-1], ROWS[::-1], strict=True)), other=np.zeros(5))
    return path.with_suffix(".npz")


def as_csv(path: Path, header: str = "") -> Path:
    lines = [f'"{name}",{",".join(map(repr, map(float, row)))}' for name, row in zip(CLASSES, ROWS, strict=True)]
    path.with_suffix(".csv").write_text("\n".join([*([header] if header else []), *lines[::-1], "wolf,1,2"]) + "\n")
    return path.with_suffix(".csv")


def as_parquet(path: Path) -> Path:
    table = pyarrow.table({"class": ["wolf", *CLASSES], "a": [9.0, *ROWS[:, 0]], "b": [9.0, *ROWS[:, 1]]})
    pyarrow.parquet.write_table(table, path.with_suffix(".parquet"))
    return path.with_suffix(".parquet")


FORMS: dict[str, Callable[[Path], Path]] = {
    "npy": as_npy,
    "npz": as_npz,
    "csv": as_csv,
    "csv with a header": lambda path: as_csv(path, "class,x,y"),
    "parquet": as_parquet,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows_and_hash(form: str, tmp_path: Path) -> None:
    embeddings = read_class_embeddings(FORMS[form](tmp_path / "table"), CLASSES)
    assert np.array_equal(embeddings.rows, ROWS) and embeddings.file.startswith("table.")
    assert embeddings.sha256 == read_class_embeddings(as_npy(tmp_path / "same"), CLASSES).sha256
    assert np.array_equal(embeddings.of(np.array([2, 0, 2])), ROWS[[2, 0, 2]])


def test_another_row_has_another_hash(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ROWS)
    np.save(tmp_path / "b.npy", ROWS[[1, 0, 2]])
    first, second = (read_class_embeddings(tmp_path / f"{name}.npy", CLASSES).sha256 for name in "ab")
    assert first != second


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "cat,1,2\n7,1,3\n", "lack 'owl, barn'"),
        ("a.csv", 'cat,1,2\n7,1,3\ncat,1,4\n"owl, barn",1,2\n', "have 'cat' twice"),
        ("a.csv", 'cat,1,2\n7,1\n"owl, barn",1,2\n', "different lengths"),
        ("a.csv", 'cat,1,x\n7,1,2\n"owl, barn",1,2\n', "cannot be read: could not convert"),
        ("a.csv", 'cat,1,nan\n7,1,2\n"owl, barn",1,2\n', "not finite"),
        ("a.csv", 'cat,1,2\n7,1,2\n"owl, barn",1,2\n', "same for all classes"),
        ("a.npy", np.zeros((2, 4)), r"shape \[2, 4\], and there are 3 classes"),
        ("a.npy", pickle.dumps([1, 2]), "cannot be read"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.json", "{}", "not a file of class embeddings"),
        ("missing.npy", None, "cannot be read"),
    ],
)
def test_errors(name: str, content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, np.ndarray):
        np.save(path, content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(str(content))
    with pytest.raises(KdxError, match=message):
        read_class_embeddings(path, CLASSES)
