"""Losses against slow float64 formulas; training: what base and student share, resuming, refusing."""

from __future__ import annotations

import shutil
import tomllib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from kdx import models
from kdx.distill import METHODS, Outputs, Progress, Settings, attention_transfer, distill, kd
from kdx.distill import train as training
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph
from kdx.models import models_file

Array = NDArray[np.float64]

# ---- losses ----


def slow_kd(student: Array, teacher: Array, temperature: float) -> float:
    total = 0.0
    for s, t in zip(student / temperature, teacher / temperature, strict=True):
        p, q = np.exp(t) / np.exp(t).sum(), np.exp(s) / np.exp(s).sum()
        total += float((p * np.log(p / q)).sum())
    return temperature**2 * total / len(student)


def slow_attention(features: Array) -> Array:
    maps = []
    for image in features:
        attention = sum((channel**2 for channel in image), np.zeros(image.shape[1:])) / len(image)
        maps.append(attention.ravel() / np.sqrt((attention**2).sum()))
    return np.array(maps)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_kd_is_its_formula(temperature: float) -> None:
    generator = np.random.default_rng(0)
    student, teacher = generator.normal(size=(5, 7)), 3 * generator.normal(size=(5, 7))
    value = kd(torch.from_numpy(student), torch.from_numpy(teacher), temperature)
    assert float(value) == pytest.approx(slow_kd(student, teacher, temperature), rel=1e-12)


def test_kd_has_no_gradient_where_teacher_and_student_agree() -> None:
    teacher = torch.randn(6, 4, dtype=torch.float64)
    student = (teacher + 3).requires_grad_()  # softmax does not see the shift
    value = kd(student, teacher, 4.0)
    (gradient,) = torch.autograd.grad(value, student)
    assert abs(float(value.detach())) < 1e-12 and float(gradient.abs().max()) < 1e-12
    assert float(kd(torch.randn(6, 4), torch.randn(6, 4), 4.0)) > 0
    assert torch.isfinite(kd(torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]]), 1.0))


def test_attention_transfer_is_its_formula() -> None:
    generator = np.random.default_rng(0)
    shapes = [((3, 4, 5, 7), (3, 6, 5, 7)), ((3, 2, 3, 3), (3, 9, 3, 3))]
    pairs = [
        (generator.normal(size=student).astype(np.float32), generator.normal(size=teacher).astype(np.float32))
        for student, teacher in shapes
    ]
    value = attention_transfer([torch.from_numpy(s) for s, _ in pairs], [torch.from_numpy(t) for _, t in pairs])
    expected = sum(float(((slow_attention(s.astype(np.float64)) - slow_attention(t.astype(np.float64))) ** 2).mean()) for s, t in pairs)
    assert float(value) == pytest.approx(expected, rel=1e-5)


def test_attention_ignores_scale_channels_and_resolution() -> None:
    features = torch.rand(4, 6, 8, 8)
    assert float(attention_transfer([features * 50], [features])) < 1e-12
    assert float(attention_transfer([torch.cat([features, features], 1)], [features.flip(1)])) < 1e-12
    coarse = torch.full((4, 6, 4, 4), 2.0)
    assert float(attention_transfer([coarse], [torch.full((4, 3, 9, 9), 0.5)])) < 1e-12
    assert float(attention_transfer([features], [features.flip(3)])) > 1e-5
    with pytest.raises(ValueError):
        attention_transfer([features], [])


def test_methods_mix_hard_labels_in() -> None:
    torch.manual_seed(0)
    student, teacher = (Outputs(torch.randn(5, 3), (torch.randn(5, 2, 4, 4),)) for _ in range(2))
    labels = torch.tensor([0, 1, 2, 2, 1])
    hard = torch.nn.functional.cross_entropy(student.logits, labels)
    settings = Settings(alpha=0.25, temperature=2.0, beta=10.0)
    soft = kd(student.logits, teacher.logits, 2.0)
    torch.testing.assert_close(METHODS["kd"].loss(student, teacher, labels, settings), 0.75 * hard + 0.25 * soft)
    torch.testing.assert_close(METHODS["kd"].loss(student, teacher, labels, replace(settings, alpha=0.0)), hard)
    attention = attention_transfer(student.features, teacher.features)
    torch.testing.assert_close(METHODS["at"].loss(student, teacher, labels, settings), hard + 5 * attention)


# ---- training ----

TEACHER = "kdx:resnet,width=4,depth=1,stages=2"
STUDENT = "kdx:resnet,width=2,depth=1,stages=2"
QUICK = Settings(epochs=3, teacher_epochs=2, batch=50, augment=True, flip=True, student_images=100, image_size=(8, 8))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost networks of this size more than they give, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Interruption(Exception):
    """Stands for Ctrl-C in a test."""


def stop_at(network: str, epoch: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if (progress.network, progress.epoch) == (network, epoch):
            raise Interruption

    return report


def heard(events: list[Progress]) -> list[tuple[str, int, bool]]:
    return [(event.network, event.epoch, event.loss is not None) for event in events]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("distill") / "run"
    events: list[Progress] = []
    distill("digits", teacher=TEACHER, student=STUDENT, out=out, settings=QUICK, report=events.append)
    assert heard(events) == [
        ("teacher", 1, True),
        ("teacher", 2, True),
        *((name, epoch, True) for name in ("base", "student") for epoch in (1, 2, 3)),
    ]
    return out


def test_what_a_run_leaves(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {"teacher.safetensors", "base.safetensors", "student.safetensors", "models.toml"}
    file = models_file.read_models(finished / "models.toml")
    assert (file.layers, file.classes, file.data, file.seed) == (("layer1", "layer2"), tuple("0123456789"), "digits", 0)
    assert file.training["method"] == "kd" and file.training["test_images"] == 450
    for role in ("teacher", "base", "student"):
        network = file.load(role)
        assert network.preprocessing.size == (8, 8)
        saved = load_file(finished / f"{role}.safetensors")
        assert all(torch.equal(saved[name], tensor) for name, tensor in network.module.state_dict().items())


def test_recorded_accuracies_are_of_the_test_split(finished: Path) -> None:
    from kdx.data.batches import split
    from kdx.data.dataset import open_data
    from kdx.data.images import load_images

    file = models_file.read_models(finished / "models.toml")
    digits = open_data("digits")
    test = split(digits, 0)["test"]
    network = file.load("teacher")
    with torch.no_grad():
        logits = FeatureGraph(network.module, [], network.preprocessing)(load_images(digits, test, (8, 8)).pixels)[0]
    assert file.training["teacher_accuracy"] == pytest.approx(float(np.mean(logits.argmax(1).numpy() == digits.labels[test])), abs=1e-6)


@pytest.mark.parametrize(("network", "epoch"), [("teacher", 1), ("student", 1), ("student", 3)])
def test_an_interrupted_run_ends_with_the_same_weights(finished: Path, tmp_path: Path, network: str, epoch: int) -> None:
    with pytest.raises(Interruption):
        distill("digits", teacher=TEACHER, student=STUDENT, out=tmp_path, settings=QUICK, report=stop_at(network, epoch))
    assert (tmp_path / f"{network}.state.pt").is_file() and not (tmp_path / "models.toml").exists()
    events: list[Progress] = []
    distill("digits", teacher=TEACHER, student=STUDENT, out=tmp_path, settings=QUICK, report=events.append)
    assert (network, epoch, True) not in heard(events)
    assert not list(tmp_path.glob("*.state.pt"))
    for name in ("teacher", "base", "student"):
        assert (tmp_path / f"{name}.safetensors").read_bytes() == (finished / f"{name}.safetensors").read_bytes()
    assert (tmp_path / "models.toml").read_text() == (finished / "models.toml").read_text()


def test_a_finished_run_is_kept(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*.safetensors")}
    events: list[Progress] = []
    distill("digits", teacher=TEACHER, student=STUDENT, out=finished, settings=QUICK, report=events.append)
    assert heard(events) == [("teacher", 2, False), ("base", 3, False), ("student", 3, False)]
    assert before == {path: path.stat().st_mtime_ns for path in finished.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("student", "settings", "says"),
    [
        (STUDENT, replace(QUICK, learning_rate=0.01), "teacher.safetensors .*: learning_rate differs"),
        (STUDENT, replace(QUICK, epochs=4), "base.safetensors .*: epochs differs"),
        (STUDENT, replace(QUICK, alpha=0.5), "student.safetensors .*: alpha differs"),
        (TEACHER, QUICK, "base.safetensors .*: architecture differs"),
    ],
)
def test_another_configuration_in_the_same_folder_is_refused(finished: Path, student: str, settings: Settings, says: str) -> None:
    with pytest.raises(KdxError, match=says):
        distill("digits", teacher=TEACHER, student=student, out=finished, settings=settings, report=lambda progress: None)


def test_another_configuration_does_not_go_on_from_a_state(tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        distill("digits", teacher=TEACHER, student=STUDENT, out=tmp_path, settings=QUICK, report=stop_at("teacher", 1))
    with pytest.raises(KdxError, match=r"teacher.state.pt .*: batch differs"):
        distill("digits", teacher=TEACHER, student=STUDENT, out=tmp_path, settings=replace(QUICK, batch=64))


def test_alpha_zero_is_the_base(finished: Path, tmp_path: Path) -> None:
    """Base and student start alike and see the same batches: without the teacher's part they end alike."""
    settings = replace(QUICK, alpha=0.0)
    teacher = f"{TEACHER}@{finished / 'teacher.safetensors'}"
    distill("digits", teacher=teacher, student=STUDENT, out=tmp_path, settings=settings, report=lambda progress: None)
    base, student = (load_file(tmp_path / f"{name}.safetensors") for name in ("base", "student"))
    assert all(torch.equal(base[name], student[name]) for name in base)
    trained = load_file(finished / "student.safetensors")
    assert not all(torch.equal(base[name], trained[name]) for name in base)


def test_students_share_teacher_and_base(finished: Path, tmp_path: Path) -> None:
    teacher = f"{TEACHER}@{finished / 'teacher.safetensors'}"
    events: list[Progress] = []
    settings = replace(QUICK, method="at")
    shared = finished / "base.safetensors"
    path = distill(
        "digits",
        teacher=teacher,
        student=STUDENT,
        out=tmp_path,
        settings=settings,
        layers=["layer2", "layer1=layer1"],
        base=shared,
        report=events.append,
    )
    assert heard(events) == [("teacher", 1, False), ("base", 3, False), *(("student", epoch, True) for epoch in (1, 2, 3))]
    for name in ("teacher", "base"):
        ours, theirs = load_file(tmp_path / f"{name}.safetensors"), load_file(finished / f"{name}.safetensors")
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    file = models_file.read_models(path)
    assert file.layers == ("layer2", "layer1")
    assert file.teacher == f"{TEACHER},classes=10@teacher.safetensors"  # the folder can be permuted
    permuted = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-permuted")
    assert models_file.read_models(permuted / "models.toml").load("teacher").parameters == file.load("teacher").parameters
    with pytest.raises(KdxError, match="another configuration: seed differs"):
        distill("digits", teacher=teacher, student=STUDENT, out=tmp_path / "other", settings=replace(settings, seed=1), base=shared)
    with pytest.raises(KdxError, match="no base checkpoint"):
        distill("digits", teacher=teacher, student=STUDENT, out=tmp_path / "other", settings=settings, base=tmp_path / "none.safetensors")


def test_training_learns_and_seeds_matter(finished: Path, tmp_path: Path) -> None:
    settings = Settings(epochs=4, optimizer="adamw", learning_rate=0.01, image_size=(8, 8), student_images=20)
    losses: list[float] = []

    def report(progress: Progress) -> None:
        if progress.network == "teacher" and progress.loss is not None:
            losses.append(progress.loss)

    path = distill("digits", teacher=TEACHER, student=STUDENT, out=tmp_path, settings=settings, report=report)
    assert losses[-1] < 0.8 * losses[0]
    assert models_file.read_models(path).training["teacher_accuracy"] > 0.4
    other = distill("digits", teacher=TEACHER, student=STUDENT, out=tmp_path / "b", settings=replace(settings, seed=1), report=report)
    assert models_file.read_models(path).load("student").weights_hash != models_file.read_models(other).load("student").weights_hash


def test_progress_is_a_plain_line_a_network_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = replace(QUICK, epochs=1, teacher_epochs=1, student_images=20)
    for _ in range(2):
        distill("digits", teacher=STUDENT, student=STUDENT, out=tmp_path, settings=settings)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].startswith("teacher 1/1 epochs, loss ") and lines[5] == "student 1/1 already there"


def test_images_that_cannot_be_read_are_left_out_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = np.random.default_rng(0)
    for name in ("dark", "light"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(20):
            pixels = generator.integers(0, 100, (9, 9, 3)) + (150 if name == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / name / f"{index}.png")
    (tmp_path / "data" / "dark" / "3.png").write_bytes(b"no picture")
    settings = replace(QUICK, epochs=1, student_images=None, batch=8)
    path = distill(str(tmp_path / "data"), teacher=TEACHER, student=STUDENT, out=tmp_path / "a", settings=settings)
    assert tomllib.loads(path.read_text())["training"]["unreadable_images"] == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("1 image is left out because unreadable, first dark/3.png: UnidentifiedImageError")
    monkeypatch.setattr(training, "_CACHE_BYTES", 0)  # decoded anew in every epoch
    path = distill(
        str(tmp_path / "data"), teacher=TEACHER, student=STUDENT, out=tmp_path / "b", settings=settings, report=lambda progress: None
    )
    assert tomllib.loads(path.read_text())["training"]["unreadable_images"] == 1
    assert (tmp_path / "b" / "student.safetensors").is_file()
    capsys.readouterr()
    distill(str(tmp_path / "data"), teacher=TEACHER, student=STUDENT, out=tmp_path / "c", settings=settings)
    assert "dark/3.png" in capsys.readouterr().out.splitlines()[-1]  # found while training


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "kdd"},
        {"epochs": 0},
        {"batch": 1},
        {"temperature": 0.0},
        {"alpha": 1.5},
        {"learning_rate": float("nan")},
        {"optimizer": "lion"},
        {"seed": -1},
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(KdxError):
        Settings(**settings)  # type: ignore[arg-type]


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    quick = replace(QUICK, epochs=1, teacher_epochs=1, student_images=20)
    with pytest.raises(KdxError, match="diverged"):
        distill(
            "digits",
            teacher=TEACHER,
            student=STUDENT,
            out=tmp_path / "a",
            settings=replace(quick, learning_rate=1e30),
            report=lambda progress: None,
        )
    with pytest.raises(KdxError, match="no layer 'layer9'"):
        distill("digits", teacher=TEACHER, student=STUDENT, out=tmp_path / "b", settings=quick, layers=["layer2=layer9"])
    with pytest.raises(KdxError, match="The device 'cuda:77' cannot be used"):
        distill("digits", teacher=TEACHER, student=STUDENT, out=tmp_path / "c", settings=quick, device="cuda:77")
    with pytest.raises(KdxError, match="The teacher has 4 classes, the data 10"):
        distill("digits", teacher=f"{TEACHER},classes=4", student=STUDENT, out=tmp_path / "d", settings=quick)
    with pytest.raises(KdxError, match="does not train"):
        distill("digits", teacher=TEACHER, student="net.pt2", out=tmp_path / "e", settings=quick)
    with pytest.raises(KdxError, match="does not say the size"):
        distill("digits", teacher="torch.nn:Identity", student=STUDENT, out=tmp_path / "e", settings=replace(quick, image_size=None))


@pytest.mark.parametrize(
    ("classes", "spoilt", "says"),
    [
        (12, None, "The teacher has 12 classes and the student 10"),
        (4, None, "The teacher has 4 classes, the data 10"),
        (10, float("nan"), "The weights of the teacher are not finite numbers: fc.weight"),
        (10, float("inf"), "The weights of the teacher are not finite numbers: fc.weight"),
        (10, 3e38, "The teacher's logits are not finite numbers"),
    ],
)
def test_a_teacher_that_cannot_teach_is_found_before_anything_is_trained(
    tmp_path: Path, classes: int, spoilt: float | None, says: str
) -> None:
    network = models.load(f"{TEACHER},classes={classes}").module
    if spoilt is not None:
        nn.init.constant_(network.get_parameter("fc.weight"), spoilt)
    save_file(network.state_dict(), tmp_path / "t.safetensors")
    events: list[Progress] = []
    with pytest.raises(KdxError, match=says):
        distill(
            "digits",
            teacher=f"{TEACHER},classes={classes}@{tmp_path / 't.safetensors'}",
            student=STUDENT,
            out=tmp_path / "run",
            settings=QUICK,
            report=events.append,
        )
    assert not events and not list((tmp_path / "run").iterdir())


def save_program(teacher: nn.Module, path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shapes = ({0: torch.export.Dim("n", min=1)},)
        torch.export.save(torch.export.export(teacher, (torch.rand(2, 3, 8, 8),), dynamic_shapes=shapes), path)
    return str(path)


def save_folder(teacher: Any, path: Path) -> str:
    teacher.save_pretrained(path)
    return f"hf:{path}"


@pytest.mark.parametrize("kind", ["program", "folder"])
def test_a_network_that_carries_its_weights_teaches_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    if kind == "program":
        teacher = models.load(TEACHER, classes=10).module
        reference = save_program(teacher, tmp_path / "teacher.pt2")
    else:
        pytest.importorskip("torchvision")
        transformers = pytest.importorskip("transformers")
        config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=10)
        teacher = transformers.ResNetForImageClassification(config)
        reference = save_folder(teacher, tmp_path / "teacher")
    events: list[Progress] = []
    monkeypatch.chdir(tmp_path)
    settings = replace(QUICK, epochs=1)
    relative = reference.replace(f"{tmp_path}/", "./")
    path = distill("digits", teacher=relative, student=STUDENT, out="run", settings=settings, report=events.append)
    assert heard(events) == [("teacher", 1, False), ("base", 1, True), ("student", 1, True)]
    monkeypatch.chdir("/")
    file = models_file.read_models(tmp_path / path)
    assert file.load("teacher").weights_hash == models.weights_hash(teacher)
    assert file.load("teacher").trained and file.load("student").trained
