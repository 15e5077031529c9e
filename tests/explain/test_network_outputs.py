"""Networks that return more than logits, through every entry point: results equal those of the same network with plain logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import kdx
from kdx.cam import GradCAM
from kdx.commands import explain
from kdx.commands.export import ExportOptions, export
from kdx.distill import TrainingSettings, distill
from kdx.runs.run import RunOptions
from tests.models import own_networks as own

IMAGES = torch.rand(12, 3, 12, 12, generator=torch.Generator().manual_seed(0))
LABELS = np.arange(12) % 3
HOME = "tests.models.own_networks"

KINDS: dict[str, tuple[type[nn.Module], str, dict[str, Any]]] = {
    "(logits, dict)": (own.OfMdistiller, "", {}),
    "is_feat": (own.OfRepDistiller, "", {}),
    "(list, logits)": (own.FeaturesFirst, "", {}),
    "(features, logits), stated": (own.Pooled, ",logits=1", {}),
    "dict with pred": (own.Named, "", {}),
    "dict with out": (own.Named, ",key=out", {"key": "out"}),
    "dict with a name of its own": (own.Named, ",key=mine,logits=mine", {"key": "mine"}),
    "object": (own.Attributed, "", {}),
    "named tuple": (own.WithAuxiliary, "", {}),
}


def network(kind: str, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """A network of the kind, and one with plain logits and the same weights."""
    class_, arguments, options = KINDS[kind]
    plain = own.seeded(own.Plain, seed)
    module = class_(**options)
    module.load_state_dict(plain.state_dict())
    if "logits=" in arguments:
        stated = arguments.rpartition("=")[2]
        module.logits_output = int(stated) if stated.isdigit() else stated  # type: ignore[assignment]
    return module.eval(), plain


@pytest.mark.parametrize("kind", KINDS)
def test_maps_and_scores_are_those_of_plain_logits(kind: str) -> None:
    pairs = [network(kind, seed) for seed in (0, 1)]
    explanations = []
    for student, base in zip(*pairs, strict=True):
        with kdx.Explainer(student=student, base=base, layers=["layer3"], runtime="eager", permutations=9) as explainer:
            explanations.append(explainer(IMAGES, LABELS))
    own_result, plain_result = explanations
    assert torch.equal(own_result.logits["student"], plain_result.logits["student"])
    for score, value in plain_result.layers["layer3"].scores.items():
        assert own_result.layers["layer3"].scores[score].value == value.value
    module, plain = pairs[0]
    assert torch.equal(kdx.grad_cam(module, IMAGES, "layer3").maps, kdx.grad_cam(plain, IMAGES, "layer3").maps)
    cams = [GradCAM(net, [net.layer3])(IMAGES) for net in (module, plain)]  # type: ignore[list-item]
    assert np.array_equal(cams[0], cams[1])
    hires = [kdx.hires_cam(net, IMAGES, "layer2", classes=LABELS) for net in (module, plain)]
    assert torch.equal(hires[0].maps, hires[1].maps)


def test_the_number_of_classes_of_a_models_file_decides(tmp_path: Path) -> None:
    module, plain = network("(features, logits), stated")
    torch.save(module.state_dict(), tmp_path / "w.pth")
    (tmp_path / "models.toml").write_text(f'student = "{HOME}:Pooled@w.pth"\nclasses = ["a", "b", "c"]\n')
    for reference in (str(tmp_path / "models.toml:student"), f"{HOME}:Pooled,logits=1@{tmp_path / 'w.pth'}"):
        assert torch.equal(kdx.grad_cam(reference, IMAGES, "layer3").logits, kdx.grad_cam(plain, IMAGES, "layer3").logits)
    with pytest.raises(kdx.KdxError, match=r"may be the logits: 0 \[\d+, 16\], 1 \[\d+, 3\]"):
        kdx.grad_cam(f"{HOME}:Pooled@{tmp_path / 'w.pth'}", IMAGES, "layer3")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of three classes, and weights of three networks."""
    from PIL import Image

    root = tmp_path_factory.mktemp("outputs")
    for number, pixels in enumerate(IMAGES):
        folder = root / "pictures" / "abc"[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.mul(255).round().byte().permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    for seed, role in enumerate(("teacher", "base", "student")):
        torch.save(own.seeded(own.Plain, seed).state_dict(), root / f"{role}.pth")
    return root


ROLES = {"teacher": "OfMdistiller", "base": "FeaturesFirst", "student": "Pooled"}


def scores(pictures: Path, out: Path, names: dict[str, str], runtime: Any) -> dict[str, float]:
    models = out.with_suffix(".toml")
    lines = [f'{role} = "{HOME}:{name}@{pictures / role}.pth"' for role, name in names.items()]
    models.write_text("\n".join([*lines, 'layers = ["layer3"]', 'classes = ["a", "b", "c"]', "[preprocessing]", "size = [12, 12]"]))
    options = RunOptions(batch=12, permutations=0, runtime=runtime, gallery=2)
    explain.run(str(pictures / "pictures"), models, out, (), options, announce=lambda line: None)
    stored = json.loads((out / "scores.json").read_text())["layers"]["layer3"]["scores"]
    return {name: entry["value"] for name, entry in stored.items()}


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["eager", "onnx", "openvino"])
def test_a_run_has_the_scores_of_plain_logits(runtime: str, pictures: Path, tmp_path: Path) -> None:
    expected = scores(pictures, tmp_path / "plain", dict.fromkeys(ROLES, "Plain"), "eager")
    assert scores(pictures, tmp_path / "own", ROLES, runtime) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_files_of_every_kind_have_the_logits(pictures: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    references = {role: f"{HOME}:{name}{',logits=1' * (name == 'Pooled')}@{pictures / role}.pth" for role, name in ROLES.items()}
    options = ExportOptions(image_size=12)
    expected = own.seeded(own.Plain, 2)(IMAGES).detach().numpy()
    for kind in ("features", "gradients", "explainer"):
        named = references if kind == "explainer" else {"network": references["student"]}
        (file,) = export(named, ["layer3"], kind, tmp_path / kind, options, announce=lambda line: None)
        session = onnxruntime.InferenceSession(str(file.path), providers=["CPUExecutionProvider"])
        feeds = {"images": IMAGES.numpy(), "cotangent": np.ones((12, 3), np.float32), "target": np.eye(3, dtype=np.float32)[LABELS]}
        names = [value.name for value in session.get_inputs()]
        outputs = dict(zip([value.name for value in session.get_outputs()], session.run(None, {n: feeds[n] for n in names}), strict=True))
        logits = outputs["logits/student" if kind == "explainer" else "logits"]
        assert np.allclose(logits, expected, atol=1e-4)


def test_teacher_and_student_of_a_distillation_may_return_more_than_logits(pictures: Path, tmp_path: Path) -> None:
    """The same weights result as with networks that return plain logits."""
    settings = TrainingSettings(epochs=1, batch=4, learning_rate=0.01, image_size=(12, 12), method="kd+at:0.1")
    for name, (teacher, student) in {"own": ("OfMdistiller", "Pooled"), "plain": ("Plain", "Plain")}.items():
        distill(
            str(pictures / "pictures"),
            teacher=f"{HOME}:{teacher}@{pictures / 'teacher.pth'}",
            student=f"{HOME}:{student}",
            out=tmp_path / name,
            settings=settings,
            layers=["layer2", "layer3"],
            report=lambda result: None,
        )
    states = [kdx.models.load(f"{HOME}:Plain@{tmp_path / name / 'student.safetensors'}").module.state_dict() for name in ("own", "plain")]
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
