"""Splits and class-balanced samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kdx.data.dataset import open_data
from kdx.data.splits import class_balanced_sample, stratified_splits
from tests.data.pictures import class_folders


def test_splits_of_the_data_are_kept(tmp_path: Path) -> None:
    for folder, count in (("train", 20), ("valid", 3), ("Test", 5)):
        class_folders(tmp_path / folder, {"a": count, "b": count})
    (tmp_path / "notes").mkdir()
    dataset = open_data(str(tmp_path))
    splits = stratified_splits(dataset, 0)
    assert dataset.classes == ("a", "b")
    assert {name: len(indices) for name, indices in splits.items()} == {"train": 40, "validation": 6, "test": 10}
    assert all(dataset.ids[index].startswith("Test/") for index in splits["test"])


def test_a_missing_split_is_taken_from_train(tmp_path: Path) -> None:
    for folder, count in (("train", 20), ("test", 5)):
        class_folders(tmp_path / folder, {"a": count, "b": 2 * count})
    dataset = open_data(str(tmp_path))
    splits = stratified_splits(dataset, 0)
    assert np.bincount(dataset.labels[splits["validation"]]).tolist() == [3, 6]
    assert np.bincount(dataset.labels[splits["train"]]).tolist() == [17, 34]
    np.testing.assert_array_equal(splits["test"], dataset.splits["test"])


def test_validation_images_are_the_test_split_where_there_is_no_other(tmp_path: Path) -> None:
    """The weights must not be chosen by the images that are explained, so validation is taken from train."""
    for folder, count in (("train", 20), ("val", 5)):
        class_folders(tmp_path / folder, {"a": count, "b": 2 * count})
    dataset = open_data(str(tmp_path))
    splits = stratified_splits(dataset, 0)
    assert [dataset.ids[index] for index in splits["test"]] == [name for name in dataset.ids if name.startswith("val/")]
    assert np.bincount(dataset.labels[splits["validation"]]).tolist() == [3, 6]
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(75))
    old = stratified_splits(dataset, 0, rule_of_0_1_0=True)
    assert [dataset.ids[index] for index in old["validation"]] == [dataset.ids[index] for index in splits["test"]]
    assert np.bincount(dataset.labels[old["test"]]).tolist() == [5, 10]


def test_splits_are_stratified_disjoint_and_seeded() -> None:
    digits = open_data("digits")
    splits = stratified_splits(digits, 3)
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(1797))
    for label in range(10):
        size = np.sum(digits.labels == label)
        for name, share in (("train", 0.6), ("validation", 0.15), ("test", 0.25)):
            assert abs(np.sum(digits.labels[splits[name]] == label) - share * size) <= 1
    assert all(np.array_equal(splits[name], stratified_splits(digits, 3)[name]) for name in splits)
    assert not np.array_equal(splits["test"], stratified_splits(digits, 4)["test"])


def test_a_sample_is_as_balanced_as_it_can_be() -> None:
    labels = np.repeat([0, 1, 2], [50, 2, 9])
    for count, expected in ((3, [1, 1, 1]), (6, [2, 2, 2]), (12, [5, 2, 5]), (40, [29, 2, 9]), (99, [50, 2, 9])):
        sample = class_balanced_sample(labels, count, 0)
        assert np.bincount(labels[sample], minlength=3).tolist() == expected
        assert np.all(np.diff(sample) > 0)
    seven = [np.bincount(labels[class_balanced_sample(labels, 7, seed)], minlength=3) for seed in range(9)]
    assert all(max(counts[[0, 2]]) == 3 and sum(counts) == 7 for counts in seven)
