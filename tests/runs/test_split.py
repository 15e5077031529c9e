"""Which images a run explains, and whether they were used in training, however their folder is written."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import kdx
from kdx.commands import explain
from kdx.data.dataset import open_data
from kdx.data.splits import stratified_splits
from kdx.models import models_file
from kdx.models.models_file import ModelsFile
from kdx.runs import store
from kdx.runs.record import read_run
from kdx.runs.split import choose_split, training_warning
from tests.data.pictures import class_folders
from tests.data.test_fingerprint import OTHER, SAME
from tests.runs.small_run import CLASSES, OPTIONS, results, same, stopping

SPLIT_SEED = 5
UNKNOWN = "It is not known whether the "


@pytest.fixture
def photos(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pictures under the names that the changes of tests/data/test_fingerprint.py need: 29 images of ant, bee and cat."""
    monkeypatch.chdir(tmp_path)  # restores the working folder
    root = tmp_path / "photos"
    for name, old in zip(("ant", "bee", "cat"), CLASSES, strict=True):
        shutil.copytree(folder / "pictures" / old, root / name)
    for name in ("ant/1", "bee/2", "cat/3", "cat/4"):
        image = root / f"{name}.png"
        if not image.exists():
            next(path for path in sorted(image.parent.iterdir()) if path.stem not in "1234").rename(image)
    return root


def trained_on(folder: Path, /, **changes: object) -> ModelsFile:
    """A models file as `kdx distill` writes it for this data."""
    data = open_data(str(folder))
    file = ModelsFile(Path("m.toml"), "b", "s", data=str(folder.resolve()), fingerprint=data.fingerprint, split_seed=SPLIT_SEED)
    return replace(file, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", SAME)
def test_training_data_are_recognised_and_their_test_images_explained(photos: Path, kind: str) -> None:
    training = open_data(str(photos))
    models = trained_on(photos)
    parts = {
        name: {training.ids[i] for i in rows} for name, rows in stratified_splits(training, SPLIT_SEED).items()
    }  # what distill trains on
    data = open_data(SAME[kind](photos))
    choice = choose_split(data, models, None, 0)
    assert choice.name == "test" and {data.ids[index] for index in choice.indices} == parts["test"]
    assert choice.trained_on(choice.indices) == 0
    assert choice.lines() == [
        f"Explaining the split test: {len(parts['test'])} images of {data.reference}, the data that the networks were trained on."
    ]
    for name in ("train", "validation", "all"):
        choice = choose_split(data, models, name, 0)
        explained = {data.ids[index] for index in choice.indices}
        assert explained == (set(training.ids) if name == "all" else parts[name])
        assert choice.trained_on(choice.indices) == len(explained & (parts["train"] | parts["validation"])) > 0
        assert "used in training" in choice.lines()[1] and "--split test" in choice.lines()[1]


def with_used_images(models: ModelsFile, folder: Path, data: str) -> ModelsFile:
    """The models file with the list that `kdx distill` writes: the keys of the images of train and validation."""
    dataset = open_data(data)
    assert dataset.image_keys is not None
    np.save(folder / "used.npy", np.delete(dataset.image_keys, stratified_splits(dataset, SPLIT_SEED)["test"]))
    return replace(models, path=folder / "m.toml", used="used.npy")


@pytest.mark.parametrize("kind", OTHER)
def test_in_changed_data_the_images_of_the_training_are_recognised(photos: Path, tmp_path: Path, kind: str) -> None:
    """The oracle compares whole contents."""
    data = open_data(str(photos))
    models = with_used_images(trained_on(photos), tmp_path, str(photos))
    test = set(stratified_splits(data, SPLIT_SEED)["test"].tolist())
    contents = {(photos / name).read_bytes() for row, name in enumerate(data.ids) if row not in test}
    OTHER[kind](photos)
    changed = open_data(str(photos))
    choice = choose_split(changed, models, None, 0)
    expected = [(photos / name).read_bytes() in contents for name in changed.ids]
    assert choice.used is not None and choice.used.tolist() == expected and 20 < sum(expected) < 29
    assert f"{sum(expected)} of the {len(changed)} images" in choice.lines()[1] and "--split test" not in choice.lines()[1]


def test_copies_of_single_training_images_are_recognised_in_other_folders(photos: Path, tmp_path: Path) -> None:
    data = open_data(str(photos))
    models = with_used_images(trained_on(photos), tmp_path, str(photos))
    parts = {name: [data.ids[row] for row in rows] for name, rows in stratified_splits(data, SPLIT_SEED).items()}
    for folder, names in (
        ("seen", parts["train"][:4] + parts["train"][-4:]),
        ("mixed", parts["test"] + parts["train"]),
        ("new", parts["test"]),
    ):
        for name in names:
            (tmp_path / folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(photos / name, (tmp_path / folder / name).with_name(f"copy of {Path(name).name}"))
        choice = choose_split(open_data(str(tmp_path / folder)), models, None, 0)
        expected = 0 if folder == "new" else len(names) - (len(parts["test"]) if folder == "mixed" else 0)
        assert choice.name == "all" and choice.trained_on(choice.indices) == expected
        assert ("other data" in choice.lines()[0]) == (folder == "new") and len(choice.lines()) == (1 if folder == "new" else 2)


def test_the_list_of_used_images_may_be_missing_but_not_damaged(photos: Path, tmp_path: Path) -> None:
    models = with_used_images(trained_on(photos), tmp_path, str(photos))
    OTHER["changed image"](photos)
    (tmp_path / "used.npy").write_bytes(b"no array")
    with pytest.raises(kdx.KdxError, match="cannot be read as a NumPy array"):
        choose_split(open_data(str(photos)), models, None, 0)
    (tmp_path / "used.npy").unlink()
    choice = choose_split(open_data(str(photos)), models, None, 0)
    assert choice.trained_on(choice.indices) is None


@pytest.mark.parametrize("kind", OTHER)
def test_data_that_have_changed_since_training_are_not_taken_for_new(photos: Path, kind: str) -> None:
    models = trained_on(photos)
    OTHER[kind](photos)
    choice = choose_split(open_data(str(photos)), models, None, 0)
    assert choice.name == "all" and choice.trained_on(choice.indices) is None
    assert "has another fingerprint" in choice.lines()[1] and UNKNOWN in choice.lines()[1]


def test_a_part_of_the_training_folder_is_not_taken_for_new(photos: Path) -> None:
    root = photos.rename(photos.parent / "train")
    for name in ("a", "b", "c", "d"):
        shutil.copytree(root / "ant", photos / "train" / name)
        shutil.copytree(root / "bee", photos / "test" / name)
    whole, part = trained_on(photos), trained_on(photos / "train")
    for models, data in ((whole, photos / "train"), (part, photos)):
        choice = choose_split(open_data(str(data)), models, None, 0)
        assert choice.trained_on(choice.indices) is None and "may contain the networks' training data" in choice.lines()[1]
    shutil.copytree(photos / "test", photos.parent / "new")
    choice = choose_split(open_data(str(photos.parent / "new")), part, None, 0)
    assert choice.name == "all" and choice.trained_on(choice.indices) == 0 and len(choice.lines()) == 1
    assert "other data than the networks were trained on" in choice.lines()[0]


@pytest.mark.parametrize(
    ("training", "explained", "is_other"),
    [
        ("hfdata:{0}/photos,split=train", "hfdata:{0}/photos", False),
        ("hfdata:{0}/photos", "folder:{0}/photos", False),
        ("hfdata:beans,split=train", "hfdata:beans,split=validation", False),
        ("cifar10:{0}/cifar-10-batches-bin", "cifar10:{0}/cifar-10-batches-py", False),
        ("cifar10:{0}/a", "cifar100:{0}/b", True),
        ("hfdata:beans", "hfdata:food101", True),
        ("npz:{0}/a.npz", "{0}/b.npz", True),
    ],
)
def test_parts_and_versions_of_the_training_data_are_not_taken_for_new(
    photos: Path, tmp_path: Path, training: str, explained: str, is_other: bool
) -> None:
    models = trained_on(photos, data=training.format(tmp_path), fingerprint="of the training data")
    data = replace(open_data(str(photos)), reference=explained.format(tmp_path))
    choice = choose_split(data, models, None, 0)
    assert choice.trained_on(choice.indices) == (0 if is_other else None)


def test_without_a_record_of_the_training_data_nothing_is_claimed(photos: Path) -> None:
    data = open_data(str(photos))
    for models in (
        trained_on(photos, data=None, fingerprint=None, split_seed=None),
        trained_on(photos, data="elsewhere", fingerprint=None),
    ):
        choice = choose_split(data, models, None, 0)
        assert choice.name == "all" and choice.trained_on(choice.indices) is None
        assert choice.lines()[1].startswith(f"Warning: {UNKNOWN}")


@pytest.mark.parametrize("kind", ["trailing slash", "detour", "relative path", "other working folder", "symbolic link", "touched files"])
def test_a_models_file_without_a_fingerprint_recognises_its_data_by_path(photos: Path, kind: str) -> None:
    models = trained_on(photos, fingerprint=None)
    relative = replace(models, data="photos/")
    assert choose_split(open_data(str(photos)), relative, None, 0).name == "test"
    choice = choose_split(open_data(SAME[kind](photos)), models, None, 0)
    assert choice.name == "test" and choice.trained_on(choice.indices) == 0


def test_data_of_0_1_0_are_recognised_after_a_move(photos: Path) -> None:
    models = trained_on(photos, fingerprint=None, training={"data_fingerprint": open_data(str(photos)).fingerprint_of_0_1_0})
    data = open_data(str(photos.rename(photos.parent / "moved")), ("cat", "bee", "ant"))
    assert choose_split(data, models, None, 0).name == "test"


def test_train_and_val_folders_are_split_as_their_networks_were_trained(tmp_path: Path) -> None:
    for split, count in (("train", 20), ("val", 5)):
        class_folders(tmp_path / "data" / split, {"a": count, "b": count})
    data = open_data(str(tmp_path / "data"))
    choice = choose_split(data, trained_on(tmp_path / "data"), None, 0)
    assert {data.ids[index].split("/")[0] for index in choice.indices} == {"val"} and choice.trained_on(choice.indices) == 0
    assert choice.validation_is_test
    old = trained_on(tmp_path / "data", fingerprint=None, training={"data_fingerprint": ""})
    choice = choose_split(data, old, None, 0)
    assert {data.ids[index].split("/")[0] for index in choice.indices} == {"train"} and choice.trained_on(choice.indices) == 0
    assert not choice.validation_is_test
    # In a models file that was written by hand, the folders alone say which images are new.
    hand = trained_on(tmp_path / "data", fingerprint=None, split_seed=None)
    assert choose_split(data, hand, None, 0).trained_on(np.arange(len(data))) == 40


def test_without_a_split_seed_it_is_not_known_which_images_are_new(photos: Path) -> None:
    choice = choose_split(open_data(str(photos)), trained_on(photos, split_seed=None), None, 0)
    assert choice.name == "test" and choice.trained_on(choice.indices) is None


def test_neither_the_seed_of_the_run_nor_the_order_of_the_classes_moves_the_split(photos: Path) -> None:
    models = trained_on(photos)
    expected = choose_split(open_data(str(photos)), models, None, 0).indices.tolist()
    for seed, classes in ((1, None), (0, ("cat", "bee", "ant")), (7, ("owl", "bee", "cat", "ant"))):
        assert choose_split(open_data(str(photos), classes), models, None, seed).indices.tolist() == expected


@pytest.mark.parametrize(
    ("trained", "images", "start"),
    [
        (None, 420, f"{UNKNOWN}420 images explained were used in training."),
        (420, 420, "All 420 images explained were used in training"),
        (1315, 2420, "1,315 of the 2,420 images explained were used in training"),
        (1, 9, "1 of the 9 images explained was used in training"),
    ],
)
def test_the_warning_names_the_numbers(trained: int | None, images: int, start: str) -> None:
    assert (training_warning(trained, images) or "").startswith(start)
    assert training_warning(0, images) is None


# ---- whole runs ----


@pytest.fixture
def models(folder: Path, photos: Path) -> Path:
    """A models file with the networks of the small run and the record of training on photos."""
    text = (folder / "models.toml").read_text().replace('"cat", "dog", "owl"', '"ant", "bee", "cat"')
    record = f'\n[data]\nreference = "{photos}"\nfingerprint = "{open_data(str(photos)).fingerprint}"\nsplit_seed = {SPLIT_SEED}\n'
    path = folder / "trained.toml"
    path.write_text(text + record)
    return path


@pytest.mark.parametrize(
    ("split", "used"), [(None, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in (("validation", 5), ("all", 23)))]
)
def test_a_run_records_and_states_how_many_images_were_used_in_training(
    photos: Path, models: Path, tmp_path: Path, lines: list[str], split: str | None, used: int
) -> None:
    out = tmp_path / "run"
    options = replace(OPTIONS, batch=64, split=split)
    copy = SAME["copy"](photos)
    explain.run(copy, models, out, (), options, announce=lines.append)
    run = read_run(out)
    ids = {open_data(copy).ids[i] for i in stratified_splits(open_data(copy), SPLIT_SEED)["test"]}
    assert run.trained_on == used == len(set(run.samples.ids) - ids)
    assert lines[0].startswith(f"Explaining the split {split or 'test'}: {run.explained} images of {copy}, the data that the networks")
    warning = training_warning(used, run.explained)
    page = (out / "report.html").read_text()
    if warning is None:
        assert not any(line.startswith("Warning") for line in lines) and 'class="notice"' not in page
    else:
        assert lines[1].startswith(f"Warning: {warning}")
        assert page.index(warning) < page.index('class="lede"')


@pytest.mark.slow
def test_an_unreadable_image_is_not_counted_among_the_explained(photos: Path, folder: Path, models: Path, tmp_path: Path) -> None:
    data = open_data(str(photos))
    torn = stratified_splits(data, SPLIT_SEED)["train"][0]
    (photos / data.ids[torn]).write_bytes(b"no picture")
    file = models_file.read_models(models)
    models.write_text(models.read_text().replace(str(file.fingerprint), open_data(str(photos)).fingerprint))
    explain.run(str(photos), models, tmp_path / "run", (), replace(OPTIONS, split="all"), announce=lambda line: None)
    run = read_run(tmp_path / "run")
    assert (run.explained, run.trained_on) == (28, 22)


@pytest.mark.slow
def test_a_stopped_run_resumes_from_a_copy_and_not_with_other_images_or_classes(
    photos: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(data: str, out: str) -> None:
        explain.run(data, models, tmp_path / out, (), replace(OPTIONS, split="all"), announce=lambda line: None)

    run(str(photos), "whole")
    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "write_batch", stopping(store.Store.write_batch, "after a batch"))
        with pytest.raises(KeyboardInterrupt):
            run(str(photos), "run")
    text = models.read_text()
    models.write_text(text.replace('"ant", "bee", "cat"', '"bee", "ant", "cat"'))
    with pytest.raises(kdx.KdxError, match="it differs in classes"):
        run(str(photos), "run")
    models.write_text(text)
    copy = SAME["copy"](photos)
    OTHER["changed image"](photos)
    with pytest.raises(kdx.KdxError, match="it differs in fingerprint"):
        run(str(photos), "run")
    run(copy, "run")
    assert same(results(tmp_path / "run"), results(tmp_path / "whole"))


def test_a_run_that_0_1_0_stopped_resumes_unless_its_folder_was_touched(
    photos: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    lines = [line for line in models.read_text().splitlines() if not line.startswith(("fingerprint", "split_seed"))]
    models.write_text("\n".join([*lines, f"seed = {SPLIT_SEED}", ""]))

    def run() -> None:
        explain.run(str(photos), models, out, (), replace(OPTIONS, split="train"), announce=lambda line: None)

    with monkeypatch.context() as patch:
        patch.setattr(store.Store, "write_batch", stopping(store.Store.write_batch, "after a batch"))
        with pytest.raises(KeyboardInterrupt):
            run()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["configuration"]["split_seed"] == SPLIT_SEED
    manifest["configuration"]["fingerprint"] = open_data(str(photos), ("ant", "bee", "cat")).fingerprint_of_0_1_0
    (out / "manifest.json").write_text(json.dumps(manifest))
    untouched = shutil.copytree(out, tmp_path / "again")
    run()
    assert read_run(out).trained_on == read_run(out).explained
    out = untouched
    SAME["touched files"](photos)
    with pytest.raises(kdx.KdxError, match="it differs in fingerprint"):
        run()
