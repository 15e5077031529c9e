"""`kdx export`: what it writes and where, and what it refuses. A refused export leaves no file."""

from __future__ import annotations

import errno
import functools
import os
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import kdx
from kdx.choices import FileKind, FilePrecision
from kdx.commands import export as command
from kdx.commands.export import ExportOptions, _batch, export, parse_batch
from kdx.errors import KdxError
from kdx.export import engine, onnx_file
from kdx.export.description import describe
from kdx.export.graphs import GradientGraph
from kdx.models.models_file import read_models, write_models
from kdx.models.resnet import resnet
from tests import command_line as commands
from tests.command_line import Run, left_in

TINY = "kdx:resnet,width=3,depth=1,stages=2,classes=4"
SIZE = "[preprocessing]\nsize = [12, 10]\nmean = [0.5]\nstd = [0.5]\n"


class Odd(nn.Module):
    """A network with a convolution that its output does not reach; its subclasses cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.unused = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.conv(images).mean((2, 3))
        return logits


class Counting(Odd):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).argmax(1, keepdim=True)


class Branching(Odd):
    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits if images.min() > -1 else -logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models file of three networks with weights."""
    root = tmp_path_factory.mktemp("files")
    for seed, role in enumerate(("teacher", "student", "base")):
        torch.manual_seed(seed)
        save_file(resnet(3, 1, 4, 2).state_dict(), root / f"{role}.safetensors")
    references = {role: f"{TINY}@{role}.safetensors" for role in ("teacher", "student", "base")}
    write_models(root / "models.toml", **references, classes=("a", "b", "c", "d"))  # type: ignore[arg-type]
    with (root / "models.toml").open("a") as file:
        file.write(f"\n{SIZE}")
    return root


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """``run(*arguments) -> (status, stdout, stderr)`` of ``kdx export``, in an empty current folder."""
    return functools.partial(commands.in_folder(tmp_path, monkeypatch, capsys), "export")


# ---- what is written ----


@pytest.mark.slow
def test_a_gradients_file_and_its_engine(run: Run, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model = f"{folder / 'models.toml'}:student"
    options = ["--kind", "gradients", "--layer", "layer1", "--at", "layer2", "--to", "tensorrt", "--for", "sm_86", "--batch", "2:3:4"]
    status, out, err = run(model, *options, "--out", "to")
    assert (status, err) == (0, "")
    written = [
        "resnet-student.gradients.engine",
        "resnet-student.gradients.engine.json",
        "resnet-student.gradients.onnx",
        "resnet-student.gradients.onnx.parity.json",
    ]
    assert left_in(tmp_path / "to") == written
    for line in ("cotangent [batch, 6, 6, 5]", "gradient/layer1 [batch, 3, 12, 10]", "as for the ONNX file", "largest error"):
        assert line in out
    path = tmp_path / "to" / "resnet-student.gradients.onnx"
    actual = describe(path)
    student = read_models(folder / "models.toml").load("student")
    about = actual.networks["network"]
    assert (actual.kind, actual.at, actual.classes) == ("gradients", "layer2", ("a", "b", "c", "d"))
    assert (about.weights, about.preprocessing) == (student.weights_hash, student.preprocessing)
    built = engine.describe(path.with_suffix(".engine"))
    assert (built.kind, built.batch, built.arch, built.file) == ("gradients", (2, 3, 4), "sm_86", actual)
    assert built.inputs == {"images": ("batch", 3, 12, 10), "cotangent": ("batch", 6, 6, 5)}
    images, cotangent = torch.rand(3, 3, 20, 20), torch.randn(3, 6, 6, 5)
    ours = onnxruntime.InferenceSession(path).run(["gradient/layer1"], {"images": images.numpy(), "cotangent": cotangent.numpy()})[0]
    theirs = GradientGraph(student.module, ["layer1"], student.preprocessing, "layer2")(images, cotangent)[-1].numpy()
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()

    status, out, err = run(path, "--to", "tensorrt", "--for", "sm_120", "--batch", 2, "--out", "engines")
    assert (status, err) == (0, "") and left_in(tmp_path / "engines") == written[:2]
    again = engine.describe(tmp_path / "engines" / "resnet-student.gradients.engine")
    assert (again.batch, again.arch) == ((2, 2, 2), "sm_120")


@pytest.mark.slow
def test_an_explainer_file_of_a_models_file(run: Run, folder: Path, tmp_path: Path) -> None:
    models = folder / "models.toml"
    roles = [text for role in ("student", "base") for text in (f"--{role}", f"{models}:{role}")]
    status, out, err = run("--explainer", *roles, "--layer", "layer2", "--out", "files")
    assert (status, err) == (0, "")
    name = "resnet-student-given-resnet-base.explainer.onnx"
    assert left_in(tmp_path) == [f"files/{name}", f"files/{name}.parity.json"]
    assert "layer2/distilled/maps [batch, 6, 5]" in out and "target [batch, embedding]" in out
    actual = describe(tmp_path / "files" / name)
    models_file = read_models(models)
    assert {role: about.weights for role, about in actual.networks.items()} == {
        role: models_file.load(role).weights_hash for role in ("student", "base")
    }
    assert (actual.kind, actual.classes) == ("explainer", ("a", "b", "c", "d"))
    images, labels = torch.rand(9, 3, 14, 14), torch.arange(9) % 4
    with kdx.Explainer(file=tmp_path / "files" / name, permutations=9) as explainer:
        ours = explainer(images, labels).layers["layer2"].distilled
    with kdx.Explainer(
        student=models_file.load("student"), base=models_file.load("base"), layers="layer2", runtime="eager", permutations=9
    ) as eager:
        theirs = eager(images, labels).layers["layer2"].distilled
    assert float((ours.maps - theirs.maps).abs().max()) <= 1e-4 * float(theirs.maps.max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("out", "precision", "path"),
    [
        ("to", "fp16", "to/resnet-student.features.fp16.onnx"),
        ("to/net.onnx", "bf16", "to/net.onnx"),
        ("", "fp32", "resnet-student.features.onnx"),
    ],
)
def test_where_a_file_goes_and_what_it_is_called(
    out: str, precision: FilePrecision, path: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    network = {"network": f"{TINY}@{folder / 'student.safetensors'}"}
    (exported,) = export(
        network, ["layer2"], "features", Path(out), ExportOptions(precision=precision, image_size=11), announce=lambda line: None
    )
    assert exported.path == Path(path) and left_in(tmp_path) == [path, f"{path}.parity.json"]
    assert exported.bytes == (tmp_path / path).stat().st_size and exported.parity and exported.seconds > 0
    actual = describe(exported.path)
    assert (actual.precision, actual.networks["network"].preprocessing.size) == (precision, (11, 11))
    assert (exported.inputs, exported.outputs) == (actual.inputs, actual.outputs)


def test_an_engine_of_an_explainer_starts_at_four_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer images an engine's maps would be empty."""
    assert _batch(4) == (4, 32, 64) and _batch(1) == (1, 32, 64)
    with pytest.raises(KdxError, match="its engine cannot take batches of 1"):
        export(
            {"student": "a", "base": "b"},
            ["l"],
            "explainer",
            Path(),
            ExportOptions(to="tensorrt", batch=(1, 4, 8), arch="sm_86"),
            announce=lambda line: None,
        )


@pytest.mark.parametrize(("text", "batch"), [("1:32:64", (1, 32, 64)), ("8", (8, 8, 8)), ("4:4:4", (4, 4, 4))])
def test_a_range_of_batches(text: str, batch: tuple[int, int, int]) -> None:
    assert parse_batch(text) == batch


# ---- what is refused ----


@pytest.mark.parametrize(
    ("what", "layer", "message"),
    [
        ("Odd", "unused", "does not reach layer 'unused'"),
        ("Counting", "conv", "does not return logits"),
        ("Branching", "conv", "cannot be exported"),
        ("Odd", "conv2", "no layer 'conv2'"),
    ],
)
@pytest.mark.parametrize("kind", ["features", "gradients"])
def test_a_network_that_cannot_be_exported_is_refused(run: Run, what: str, layer: str, message: str, kind: str, tmp_path: Path) -> None:
    status, out, err = run(
        f"tests.commands.test_export:{what}", "--layer", layer, "--image-size", 8, "--kind", kind, "--out", tmp_path / "to"
    )
    assert status == 2 and len(err.splitlines()) == 2 and err.startswith("Error: ") and message in err
    assert "Traceback" not in out + err and left_in(tmp_path) == []


def test_a_student_that_is_the_base_is_refused(run: Run, folder: Path, tmp_path: Path) -> None:
    same = f"{folder / 'models.toml'}:base"
    status, _, err = run("--explainer", "--student", same, "--base", same, "--layer", "layer2")
    assert status == 2 and len(err.splitlines()) == 2 and "the same weights" in err and left_in(tmp_path) == []


def test_the_options_of_reference_images_reach_the_command(run: Run, tmp_path: Path) -> None:
    roles = ["--explainer", "--student", "a", "--base", "b", "--layer", "c"]
    status, _, err = run(*roles, "--reference", 3, "--data", "digits", "--seed", 1)
    assert status == 2 and "A reference set of 3 images is too small" in err
    status, _, err = run(*roles, "--seed", 1)
    assert status == 2 and "the seed has no effect" in err and len(err.splitlines()) == 2
    status, _, err = run(*roles, "--reference", 8)
    assert status == 2 and "--data" in err and len(err.splitlines()) == 2 and left_in(tmp_path) == []


@pytest.mark.parametrize(
    "code", [pytest.param(errno.EACCES, marks=pytest.mark.slow), errno.ENOSPC, pytest.param(errno.EROFS, marks=pytest.mark.slow)]
)
def test_a_folder_that_cannot_be_written_is_an_error_with_a_hint(
    run: Run, folder: Path, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(onnx_file, "_save", refused)
    status, out, err = run(f"{folder / 'models.toml'}:student", "--layer", "layer2", "--out", "to")
    assert status == 2 and f"cannot be written: {os.strerror(code)}" in err and len(err.splitlines()) == 2
    assert "Traceback" not in out + err and left_in(tmp_path) == []


def test_options_that_contradict_each_other_are_refused_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(reference: str) -> None:
        raise AssertionError(f"{reference} was loaded")

    monkeypatch.setattr(command, "load_any", load)
    one, two = {"network": "a"}, {"student": "a", "base": "b"}
    cases: list[tuple[dict[str, str], FileKind, ExportOptions, str]] = [
        ({}, "features", ExportOptions(), "contains one network"),
        (one | two, "features", ExportOptions(), "contains one network"),
        (one | two, "explainer", ExportOptions(), "contains a student, and optionally"),
        ({"base": "a", "teacher": "b"}, "explainer", ExportOptions(), "contains a student, and optionally"),
        (two, "explainer", ExportOptions(at="x"), "has no cotangent"),
        (one, "features", ExportOptions(at="x"), "has no cotangent"),
        (one, "features", ExportOptions(pooled=True), "contains no distances"),
        (two, "explainer", ExportOptions(reference=8), "no data to choose reference images from"),
        (two, "explainer", ExportOptions(reference=3, data="digits"), "A reference set of 3 images is too small"),
        (two, "explainer", ExportOptions(data="digits"), "A reference set of 0 images is too small"),
        (one, "features", ExportOptions(reference=8, data="digits"), "A file of features has no reference images"),
        (one, "features", ExportOptions(arch="sm_86"), "Only an engine is built for a GPU"),
        (one, "gradients", ExportOptions(tf32=True), "Only an engine is built for a GPU"),
        (two, "explainer", ExportOptions(batch=(4, 8, 16)), "Only an engine is built for a GPU"),
        (one, "features", ExportOptions(to="tensorrt", arch="sm_1"), "does not build for 'sm_1'"),
        (one, "features", ExportOptions(to="tensorrt", arch="sm_86", batch=(4, 2, 8)), "from 4 to 8, best 2"),
    ]
    for references, kind, options, message in cases:
        with pytest.raises(KdxError, match=message):
            export(references, ["layer1"], kind, Path("nowhere"), options, announce=lambda line: None)
    assert not Path("nowhere").exists()
