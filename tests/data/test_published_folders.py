"""Folders exactly as ASIRRA and Plant Disease are published, at a small size."""

from __future__ import annotations

from pathlib import Path

import pytest

from kdx.data import load_images, open_data, stratified_splits
from kdx.data.dataset import located
from kdx.errors import KdxError
from tests.data.pictures import class_folders, picture

_LEAVES = ("Apple___Apple_scab", "Corn_(maize)___Cercospora_leaf_spot Gray_leaf_spot", "Tomato___healthy")


def named(folder: Path, counts: dict[str, int]) -> Path:
    """Files such as cat.0.jpg."""
    for name, count in counts.items():
        for index in range(count):
            picture(folder / f"{name}.{index}.jpg")
    return folder


@pytest.mark.parametrize("prefix", ["", "folder:"])
def test_the_names_of_files_state_the_classes(tmp_path: Path, prefix: str) -> None:
    named(tmp_path, {"cat": 12, "dog": 3})
    (tmp_path / "Thumbs.db").write_bytes(b"x")
    dataset = open_data(f"{prefix}{tmp_path}")
    assert dataset.classes == ("cat", "dog") and dataset.labels.tolist() == [0] * 12 + [1] * 3
    assert dataset.ids[9:13] == ("cat.9.jpg", "cat.10.jpg", "cat.11.jpg", "dog.0.jpg")
    assert dataset.note == "Files left out: 1 .db (not an image type)."
    assert dataset.splits == {} and dataset.image_keys is not None
    picture(tmp_path / "holiday.jpg")
    with pytest.raises(KdxError, match=r"images but no class folders\.\n.*cat\.1\.jpg"):
        open_data(f"{prefix}{tmp_path}")


@pytest.mark.parametrize("layout", ["train", "train/train"])
def test_the_archive_of_the_competition_has_unlabelled_test_images(tmp_path: Path, layout: str) -> None:
    named(tmp_path / layout, {"cat": 4, "dog": 4})
    for index in range(3):
        picture(tmp_path / "test1" / f"{index + 1}.jpg")
    (tmp_path / "sampleSubmission.csv").write_text("id,label\n")
    dataset = open_data(str(tmp_path))
    assert dataset.classes == ("cat", "dog") and len(dataset) == 8
    assert dataset.ids[0] == f"{layout}/cat.0.jpg"
    assert dataset.note == "Warning: Files left out: 3 .jpg (without a class)."
    parts = stratified_splits(dataset, 0)
    assert sorted(index for part in parts.values() for index in part) == list(range(8))


def test_the_first_publication_of_asirra_has_broken_files(tmp_path: Path) -> None:
    root = tmp_path / "kagglecatsanddogs_5340"
    class_folders(root / "PetImages", {"Cat": 4, "Dog": 4})
    (root / "PetImages" / "Cat" / "666.jpg").write_bytes(b"")
    (root / "PetImages" / "Dog" / "11702.jpg").write_bytes(b"")
    for name in ("PetImages/Cat/Thumbs.db", "PetImages/Dog/Thumbs.db", "readme[1].txt", "CDLA-Permissive-2.0.pdf"):
        (root / name).write_bytes(b"x")
    for folder, inner in ((root / "PetImages", ""), (root, "PetImages"), (tmp_path, "kagglecatsanddogs_5340/PetImages")):
        dataset = open_data(f"folder:{folder}")
        assert dataset.classes == ("Cat", "Dog") and len(dataset) == 10
        place = f"The data set is the folder {inner!r}. " if inner else ""
        assert dataset.note == f"{place}Files left out: 2 .db (not an image type)."
        images = load_images(dataset, range(10), (8, 8))
        assert [name for name, _ in images.unreadable] == ["Cat/666.jpg", "Dog/11702.jpg"] and len(images.kept) == 8
        assert dataset.fingerprint == open_data(str(root / "PetImages")).fingerprint


def test_leaves_are_in_folders_inside_the_archive(tmp_path: Path) -> None:
    root = tmp_path / "Plant_leave_diseases_dataset_with_augmentation"
    for name in _LEAVES:
        for index in (1, 2, 10):
            picture(root / name / f"image ({index}).JPG")
    for place in (root, tmp_path):
        dataset = open_data(str(place))
        assert dataset.classes == _LEAVES
        assert dataset.ids[:3] == tuple(f"Apple___Apple_scab/image ({index}).JPG" for index in (1, 2, 10))


def test_published_splits_inside_two_folders_are_kept(tmp_path: Path) -> None:
    inner = tmp_path / "New Plant Diseases Dataset(Augmented)" / "New Plant Diseases Dataset(Augmented)"
    class_folders(inner / "train", dict.fromkeys(_LEAVES, 3))
    class_folders(inner / "valid", dict.fromkeys(_LEAVES, 2))
    dataset = open_data(str(tmp_path))
    assert dataset.classes == _LEAVES and {name: len(part) for name, part in dataset.splits.items()} == {"train": 9, "validation": 6}
    assert stratified_splits(dataset, 0)["test"].tolist() == dataset.splits["validation"].tolist()
    picture(tmp_path / "test" / "test" / "AppleCedarRust1.JPG")
    with pytest.raises(KdxError, match=r"contains a data set with splits beside other folders.*\n.*Augmented\)/New Plant.* instead"):
        open_data(str(tmp_path))
    assert open_data(str(inner)).fingerprint == dataset.fingerprint


@pytest.mark.parametrize("layout", ["test/1.JPG", "test/test/1.JPG"])
def test_a_split_without_classes_is_left_out(tmp_path: Path, layout: str) -> None:
    class_folders(tmp_path / "train", {"a": 3, "b": 3})
    class_folders(tmp_path / "val", {"a": 2, "b": 2})
    picture(tmp_path / layout)
    dataset = open_data(str(tmp_path))
    assert dataset.classes == ("a", "b") and set(dataset.splits) == {"train", "validation"}
    reason = "in no class folder" if layout.count("/") == 1 else "in a split with other classes"
    assert dataset.note == f"Warning: Files left out: 1 .jpg ({reason})."


def test_a_split_may_lack_classes(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", {"a": 3, "b": 3})
    class_folders(tmp_path / "test", {"b": 2})
    assert {name: len(part) for name, part in open_data(str(tmp_path)).splits.items()} == {"train": 6, "test": 2}


def test_a_folder_of_one_class_is_no_surrounding_folder(tmp_path: Path) -> None:
    for name in ("cat/deep/1.png", "cat/deep/2.png"):
        picture(tmp_path / name)
    with pytest.raises(KdxError, match="only one class, 'cat'"):
        open_data(str(tmp_path))
    picture(tmp_path / "dog" / "dog.1.png")
    picture(tmp_path / "dog" / "cat.1.png")
    assert open_data(str(tmp_path)).classes == ("cat", "dog")


def test_a_folder_with_the_name_of_a_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "photos.csv", "photos.npz"):
        class_folders(tmp_path / name, {"a": 1, "b": 2})
        assert len(open_data(f"folder:{name}")) == 3
        assert located(f"folder:{name}") == str((tmp_path / name).resolve())
    assert located("photos.csv") == located("folder:photos.csv") and len(open_data("digits")) == 1797
