"""A sample of another data set: its images, classes and splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdx.data.dataset import located, open_data
from kdx.errors import KdxError


def write_arrays(folder: Path) -> Path:
    """A data set with the splits train (40 images) and test (20), of four classes, in which every image has its own grey level."""
    generator = np.random.default_rng(0)
    images = np.arange(60, dtype=np.uint8)[:, None, None] * np.ones((1, 3, 3), np.uint8)
    labels = generator.permutation(np.arange(60) % 4)
    path = folder / "set.npz"
    np.savez(path, images=images[:40], labels=labels[:40], test_images=images[40:], test_labels=labels[40:])
    return path


def test_a_sample_keeps_images_classes_and_the_shares_of_the_splits(tmp_path: Path) -> None:
    path = write_arrays(tmp_path)
    whole, sample = open_data(str(path)), open_data(f"sample:24:{path}")
    assert len(sample) == 24 and np.bincount(sample.labels).tolist() == [6, 6, 6, 6]
    assert {name: len(indices) for name, indices in sample.splits.items()} == {"train": 16, "test": 8}
    places = [whole.ids.index(name) for name in sample.ids]
    assert places == sorted(places)
    for index, place in enumerate(places):
        assert sample.labels[index] == whole.labels[place]
        assert np.array_equal(np.asarray(sample.read(index)), np.asarray(whole.read(place)))
    for name, indices in sample.splits.items():
        assert set(np.array(places)[indices]) <= set(whole.splits[name])
    assert sample.fingerprint == open_data(f"sample:24:npz:{path}").fingerprint != open_data(f"sample:20:{path}").fingerprint


def test_a_sample_of_more_images_than_there_are_is_the_whole_set() -> None:
    whole = open_data("digits")
    sample = open_data("sample:5000:digits")
    assert (sample.ids, sample.fingerprint) == (whole.ids, whole.fingerprint)


def test_the_path_in_a_sample_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_arrays(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert located("sample:8:set.npz") == f"sample:8:{path.resolve()}"


@pytest.mark.parametrize("reference", ["sample:digits", "sample:0:digits", "sample:8:"])
def test_a_malformed_sample_is_an_error(reference: str) -> None:
    with pytest.raises(KdxError, match="is not a sample"):
        open_data(reference)
