"""Explainer files with reference images: one image in, the maps of reference mode out, with and without kdx."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import kdx
from kdx.commands import explain
from kdx.commands.export import ExportOptions, export
from kdx.data.dataset import Dataset, open_data
from kdx.data.images import load_images
from kdx.data.splits import stratified_splits
from kdx.disk import cache_folder
from kdx.errors import KdxError
from kdx.explain.explainer import Explainer
from kdx.export import engine
from kdx.export.description import describe
from kdx.export.graphs import FeatureGraph
from kdx.models.models_file import read_models, write_models
from kdx.models.network import Network
from kdx.models.resnet import resnet
from kdx.roles import pairs_among, score_maps_among
from tests.explain.test_graph import ALONE
from tests.explain.written_files import CLASSES, MAPS_AGREE, SCORES_AGREE, by_definition, by_pytorch, decomposed, images, worst

pytestmark = pytest.mark.slow  # writing the file takes ten seconds
SIZE = (12, 10)
COUNT = 13
ROLES = ("student", "base")
LAYER = "layer2"


@dataclass(frozen=True)
class Referenced:
    """A file that `kdx export --explainer --reference` wrote, its networks, its data and its reference images."""

    path: Path
    networks: dict[str, Network]
    dataset: Dataset
    references: Tensor
    labels: Tensor

    def run(self, pixels: Tensor, labels: Tensor) -> dict[str, NDArray[np.float32]]:
        session = onnxruntime.InferenceSession(self.path, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(None, {"images": pixels.numpy(), "labels": labels.numpy()}), strict=True))

    def features(self, pixels: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return {
                role: FeatureGraph(network.module, [LAYER], network.preprocessing)(pixels)[1] for role, network in self.networks.items()
            }


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Referenced:
    root = tmp_path_factory.mktemp("referenced")
    generator = np.random.default_rng(0)
    for number in range(60):
        place = root / "pictures" / CLASSES[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((17, 14), Image.Resampling.BICUBIC).save(place / f"{number}.png")
    for seed, role in enumerate(ROLES):
        torch.manual_seed(seed)
        save_file(resnet(3, 1, 3, 2).state_dict(), root / f"{role}.safetensors")
    references = {role: f"kdx:resnet,width=3,depth=1,stages=2,classes=3@{role}.safetensors" for role in ROLES}
    write_models(root / "models.toml", **references, classes=CLASSES, data=str(root / "pictures"), split_seed=5)  # type: ignore[arg-type]
    with (root / "models.toml").open("a") as toml:
        toml.write("\n[preprocessing]\nsize = [12, 10]\nmean = [0.5]\nstd = [0.25]\n")
    options = ExportOptions(reference=COUNT, data=str(root / "pictures"), seed=3)
    roles = {role: f"{root / 'models.toml'}:{role}" for role in ROLES}
    (written,) = export(roles, [LAYER], "explainer", root, options, announce=lambda line: None)
    about = describe(written.path).references
    assert about is not None
    dataset = open_data(str(root / "pictures"), CLASSES)
    rows = np.array([dataset.ids.index(name) for name in about.ids])
    networks = {role: read_models(root / "models.toml").load(role) for role in ROLES}
    return Referenced(written.path, networks, dataset, load_images(dataset, rows, SIZE).pixels, torch.from_numpy(dataset.labels[rows]))


def test_the_references_are_a_seeded_balanced_part_of_the_train_split(file: Referenced) -> None:
    about = describe(file.path)
    assert about.references is not None and about.least_images == 1 and about.classes == CLASSES
    assert about.inputs == {"images": ("batch", 3, "height", "width"), "labels": ("batch",)}
    rows = [file.dataset.ids.index(name) for name in about.references.ids]
    assert len(set(rows)) == COUNT and set(rows) <= set(stratified_splits(file.dataset, 5)["train"].tolist())
    assert about.references.labels == tuple(file.dataset.labels[rows])
    assert sorted(np.bincount(about.references.labels)) == [4, 4, 5]


def assert_near(actual: NDArray[np.float32], expected: Tensor) -> None:
    """Asserts that every error is at most a share of the largest value."""
    assert actual.shape == expected.shape
    assert np.abs(actual - expected.numpy()).max() <= MAPS_AGREE * float(expected.abs().max())


def assert_of_reference_mode(file: Referenced, actual: Mapping[str, NDArray[np.float32]], pixels: Tensor, labels: Tensor) -> None:
    """Asserts that the outputs are those of kdx with these references: its UniCAM maps, score maps and scores."""
    known, own = file.features(file.references), file.features(pixels)
    for name, (explained, given) in pairs_among(ROLES).items():
        among = kdx.ReferenceSet(known[explained], known[given], file.labels)
        expected = kdx.unicam(own[explained], own[given], labels, reference=among)
        assert_near(actual[f"{LAYER}/{name}/maps"], expected.maps)
        assert_near(actual[f"{LAYER}/{name}/weights"], expected.weights)
        scaled = expected.scaled((pixels.shape[2], pixels.shape[3]))
        assert np.abs(actual[f"{LAYER}/{name}/scaled"] - scaled.numpy()).max() <= 1e-3
    names = describe(file.path).scores
    for image in range(len(pixels)):
        together = {role: torch.cat([known[role], own[role][image : image + 1]]) for role in ROLES}
        target = torch.cat([file.labels, labels[image : image + 1]])
        rows = (target[:, None] == target.unique()).float()
        scores = dict(zip(names, actual[f"{LAYER}/scores"][image].tolist(), strict=True))
        assert scores == pytest.approx(by_definition(together, rows), abs=SCORES_AGREE)
        for name, kind in score_maps_among(ROLES).items():
            assert_near(actual[f"{LAYER}/{name}/maps"][image], decomposed(kind, together, target).maps[-1])


@pytest.mark.parametrize("n", [1, 2, 6])
def test_the_outputs_are_those_of_reference_mode(file: Referenced, n: int) -> None:
    pixels, labels = images(n, SIZE, seed=n + 20), torch.arange(n) % 3
    actual = file.run(pixels, labels)
    logits = file.networks["student"].module((pixels - 0.5) / 0.25)
    assert worst(actual["logits/student"], logits.detach()) <= MAPS_AGREE
    assert actual[f"{LAYER}/distances"].shape == (2, n, n)
    assert_of_reference_mode(file, actual, pixels, labels)


def test_an_images_maps_do_not_depend_on_its_batch(file: Referenced) -> None:
    pixels, labels = images(7, (15, 21), seed=9), torch.arange(7) % 3
    together, alone = file.run(pixels, labels), file.run(pixels[4:5], labels[4:5])
    for name in (f"{LAYER}/distilled/maps", f"{LAYER}/rs_student_minus_base/maps", f"{LAYER}/scores"):
        assert np.allclose(together[name][4], alone[name][0], rtol=0, atol=1e-5 * np.abs(together[name]).max())


def test_a_label_that_no_reference_has_and_an_image_that_is_a_reference(file: Referenced) -> None:
    pixels = torch.cat([images(2, SIZE, seed=1), file.references[:1]])
    actual, other = (file.run(pixels, torch.tensor([label, 0, 1])) for label in (7, 70))
    assert_of_reference_mode(file, actual, pixels, torch.tensor([7, 0, 1]))
    assert np.array_equal(actual[f"{LAYER}/distilled/maps"], other[f"{LAYER}/distilled/maps"])


def test_kdx_explains_with_it_as_with_the_networks_and_these_references(file: Referenced, tmp_path: Path) -> None:
    pixels, labels = images(9, SIZE, seed=2), torch.arange(9) % 3
    with Explainer(file=file.path, permutations=19) as ours, by_pytorch(file.networks, layers=LAYER, permutations=19) as theirs:
        theirs.use_references(file.references, file.labels)
        actual, expected = ours(pixels, labels).layers[LAYER], theirs(pixels, labels).layers[LAYER]
        for name in pairs_among(ROLES):
            assert worst(getattr(actual, name).maps, getattr(expected, name).maps) <= MAPS_AGREE
            assert getattr(actual, name).score == pytest.approx(getattr(expected, name).score, abs=SCORES_AGREE)
        for score, value in expected.scores.items():  # of the batch, as in reference mode
            assert actual.scores[score].value == pytest.approx(value.value, abs=SCORES_AGREE)
        assert actual.score_maps == {}
        with pytest.raises(KdxError, match=f"with its own {COUNT} reference images"):
            ours.use_references(file.references, file.labels)
        with pytest.raises(KdxError, match="takes labels, and this target is an embedding"):
            ours(pixels, torch.eye(3)[labels])


def test_openvino_takes_labels_too(file: Referenced) -> None:
    pytest.importorskip("openvino")
    pixels, labels = images(6, SIZE, seed=2), torch.arange(6) % 3
    with Explainer(file=file.path, permutations=9, runtime="openvino") as ours, Explainer(file=file.path, permutations=9) as theirs:
        actual, expected = ours(pixels, labels).layers[LAYER], theirs(pixels, labels).layers[LAYER]
    assert ours.choice.runtime == "openvino" and worst(actual.distilled.maps, expected.distilled.maps) <= MAPS_AGREE


def test_kdx_explain_refuses_it(file: Referenced, tmp_path: Path) -> None:
    with pytest.raises(KdxError, match=f"with its own {COUNT} reference images, and a run"):
        explain.run(file.dataset.reference, file.path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_engine_takes_one_image(file: Referenced, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    built = engine.build(file.path, tmp_path / "x.engine", batch=(1, 4, 4), arch="sm_86", image_size=SIZE)
    assert built.inputs == {"images": ("batch", 3, *SIZE), "labels": ("batch",)} and built.file.references is not None


def test_onnx_runtime_alone_maps_an_image(file: Referenced, tmp_path: Path) -> None:
    pixels, labels = images(1, (20, 14), seed=3), torch.tensor([2])
    np.save(tmp_path / "images.npy", pixels.numpy())
    np.save(tmp_path / "labels.npy", labels.numpy())
    done = subprocess.run([sys.executable, "-c", ALONE, file.path], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "outputs.npz") as content:
        actual = {name.replace("|", "/"): content[name] for name in content.files}
    assert_of_reference_mode(file, actual, pixels, labels)


def node_modules() -> Path:
    """A folder with onnxruntime-node, from npm, in kdx's cache. Skips the test without Node.js, npm or the registry."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder = cache_folder() / "tests" / "node"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "node_modules" / "onnxruntime-node").is_dir():
        install = ["npm", "install", "--no-audit", "--no-fund", "--onnxruntime-node-install=skip", "onnxruntime-node"]
        done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=600)
        if done.returncode:
            pytest.skip(f"npm cannot install onnxruntime-node: {' '.join(done.stderr.split())[:200]}")
    return folder


@pytest.mark.slow
def test_node_maps_an_image_with_the_script_of_the_documentation(file: Referenced, tmp_path: Path) -> None:
    folder = node_modules()
    page = (Path(__file__).parents[2] / "docs" / "export.md").read_text("utf-8")
    (script,) = re.findall(r"^```js\n(.*?)^```", page, re.S | re.M)
    (tmp_path / "node_modules").symlink_to(folder / "node_modules")
    (tmp_path / "explain.js").write_text(script.replace("explainer.onnx", str(file.path)).replace("layer4", LAYER).replace("224", "12"))
    pixels = images(1, (12, 12), seed=4)
    (tmp_path / "image.raw").write_bytes(pixels.mul(255).round().byte()[0].permute(1, 2, 0).contiguous().numpy().tobytes())
    done = subprocess.run(["node", "explain.js"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    exact = pixels.mul(255).round() / 255
    expected = file.run(exact, torch.tensor([1]))
    maps: dict[str, Any] = {name: np.fromfile(tmp_path / f"{name}.f32", np.float32) for name in ("distilled", "gain")}
    assert maps["distilled"].any()
    assert np.abs(maps["distilled"] - expected[f"{LAYER}/distilled/maps"].ravel()).max() <= 1e-5 * np.abs(maps["distilled"]).max()
    actual = {f"{LAYER}/rs_student_minus_base/maps": maps["gain"].reshape(expected[f"{LAYER}/rs_student_minus_base/maps"].shape)}
    assert_of_reference_mode(file, expected | actual, exact, torch.tensor([1]))
