"""Features as rows, in memory and on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

import kdx
from kdx.features.rows import Selected, Source, resident, rows_of
from tests import oracle


def stored(values: np.ndarray, folder: Path) -> dict[str, Source]:
    """The same features in every form that rows can be read from."""
    np.save(folder / "features.npy", values)
    array = zarr.create_array(folder / "features.zarr", shape=values.shape, chunks=(5, *values.shape[1:]), dtype=values.dtype)
    array[:] = values
    sharded = zarr.create_array(
        folder / "sharded.zarr", shape=values.shape, chunks=(2, *values.shape[1:]), shards=(6, *values.shape[1:]), dtype=values.dtype
    )
    sharded[:] = values
    return {
        "numpy": values,
        "strided": np.repeat(values, 2, axis=0)[::2],
        "torch": torch.from_numpy(values.copy()),
        "read-only": np.load(folder / "features.npy", mmap_mode="r"),
        "big-endian": np.memmap(_swapped(values, folder), dtype=values.dtype.newbyteorder(">"), mode="r", shape=values.shape),
        "zarr": zarr.open_array(folder / "features.zarr", mode="r"),
        "sharded": zarr.open_array(folder / "sharded.zarr", mode="r"),
    }


def _swapped(values: np.ndarray, folder: Path) -> Path:
    (folder / "swapped.bin").write_bytes(values.astype(values.dtype.newbyteorder(">")).tobytes())
    return folder / "swapped.bin"


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_every_form_gives_the_same_rows(tmp_path: Path, dtype: type[np.floating]) -> None:
    values = np.random.default_rng(0).normal(size=(23, 3, 4, 2)).astype(dtype)
    forms = stored(values, tmp_path)
    for index in (torch.tensor([4, 5, 6, 7]), torch.tensor([22, 0, 7, 8, 1]), torch.tensor([9])):
        for name, source in forms.items():
            rows = rows_of(source, "features")
            assert rows.shape == (23, 24) and rows.dtype == torch.from_numpy(values).dtype, name
            assert torch.equal(rows.read(index), torch.from_numpy(values[index.numpy()].reshape(len(index), -1))), name


def test_rows_of_a_chunk_are_read_together(tmp_path: Path) -> None:
    forms = stored(np.zeros((23, 4), np.float32), tmp_path)
    assert {name: rows_of(source, "features").run for name, source in forms.items()} == {
        "numpy": 1,
        "strided": 1,
        "torch": 1,
        "read-only": 1,
        "big-endian": 1,
        "zarr": 5,
        "sharded": 6,
    }


@pytest.mark.slow
def test_scores_of_files_equal_scores_of_arrays(tmp_path: Path) -> None:
    x, y, labels = oracle.features(n=300)
    there, here = tmp_path / "x", tmp_path / "y"
    there.mkdir()
    here.mkdir()
    forms_x, forms_y = stored(x.float().numpy(), there), stored(y.float().numpy(), here)
    expected = kdx.rs(x.float(), labels, y.float(), permutations=0).value
    for name in forms_x:
        assert kdx.rs(forms_x[name], labels, forms_y[name], permutations=0).value == pytest.approx(expected, abs=1e-6), name


def test_bad_input(tmp_path: Path) -> None:
    values = np.ones((8, 3), np.float32)
    for source, message in (
        (values[:, :0], "shape"),
        (values[:, :, None], "shape"),
        (values.astype(np.int32), "int32"),
        (stored(values.astype(np.int32), tmp_path)["zarr"], "int32"),
        (np.ones(3, np.float32), "shape"),
        ((row for row in values), "generator"),
        ([1.0, 2.0], "list"),
    ):
        with pytest.raises(kdx.KdxError, match=message):
            rows_of(source, "features")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="features"):
        rows_of(3, "features")  # type: ignore[arg-type]


def test_rows_that_fit_are_read_once_into_the_memory_of_the_device(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(700, 3, 2, 2)).astype(np.float32)
    np.save(tmp_path / "features.npy", values)
    index = torch.arange(0, 700, 3)
    selected = Selected(rows_of(np.load(tmp_path / "features.npy", mmap_mode="r"), "features"), index, torch.device("cpu"))
    size = len(index) * 12 * 4
    fitting = resident(selected, torch.device("cpu"), 4 * size)
    assert resident(selected, torch.device("cpu"), 4 * size - 1) is selected
    assert fitting is not selected and (fitting.shape, fitting.dtype, fitting.run) == ((234, 12), torch.float32, 1)
    for part in (torch.arange(5, 90), torch.tensor([3, 1, 233]), torch.arange(234)):
        assert torch.equal(fitting.read(part), torch.from_numpy(values[index[part]]).flatten(1))
    np.save(tmp_path / "features.npy", np.zeros_like(values))  # the file is not read again
    assert torch.equal(fitting.read(torch.tensor([7])), torch.from_numpy(values[21:22]).flatten(1))


def test_selected_rows_are_on_the_device_that_computes() -> None:
    rows = Selected(rows_of(torch.ones(6, 4), "features"), torch.tensor([5, 0, 2]), torch.device("meta"))
    assert rows.read(torch.tensor([0, 2])).device.type == "meta" and rows.shape == (3, 4)
