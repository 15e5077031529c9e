"""Networks from references: sources, preprocessing, classes, and errors."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from kdx import models
from kdx.errors import KdxError
from kdx.export.graphs import Preprocessing

SMALL = "kdx:resnet,width=4,depth=1,classes=3"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, which is not on sys.path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return tmp_path


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("timm:resnet81", "resnet18"),
        ("torchvision:resnet51", "resnet50"),
        ("torchvision:fasterrcnn_resnet50_fpn", "has no model"),
        ("kdx:vgg", "has no model"),
        ("tim:resnet18", "Did you mean timm"),
        ("no_such_package.nets:make", "neither a source"),
        ("timm:resnet18,wide=3", "could not be built"),
        ("torchvision:resnet18,wide=3", "could not be built"),
        ("torch.nn:Lineal", "Linear"),
        ("torch.nn:Linear", "could not be built"),
        ("builtins:dict", "not a torch.nn.Module"),
    ],
)
def test_errors_in_a_reference_are_named(reference: str, message: str) -> None:
    with pytest.raises(KdxError, match=message):
        models.load(reference)


def test_the_preprocessing_is_that_of_the_source() -> None:
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert models.load("timm:mobilenetv3_small_050").preprocessing == Preprocessing((224, 224), *imagenet)
    assert models.load("torchvision:squeezenet1_1").preprocessing == Preprocessing((224, 224), *imagenet)
    assert models.load(SMALL).preprocessing == Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3)
    assert models.load("torch.nn:Identity").preprocessing == Preprocessing()


@pytest.mark.parametrize("reference", ["timm:mobilenetv3_small_050", "torchvision:squeezenet1_1", "kdx:resnet,width=4"])
def test_classes_are_set_if_the_reference_does_not_set_them(reference: str) -> None:
    network = models.load(reference, classes=7)
    with torch.no_grad():
        assert network.module(torch.rand(1, 3, 64, 64)).shape == (1, 7)
    assert not network.module.training


def test_a_factory_in_the_current_folder(folder: Path) -> None:
    source = """
        from torch import nn
        from kdx.export.graphs import Preprocessing

        def make(width=2):
            network = nn.Conv2d(3, width, 1)
            network.preprocessing = Preprocessing((8, 9))
            return network

        def fail():
            raise OSError("no such tape.\\nsecond line")
    """
    (folder / "own_nets_a.py").write_text(textwrap.dedent(source))
    network = models.load("own_nets_a:make,width=5")
    assert network.parameters == 5 * 3 + 5
    assert network.preprocessing == Preprocessing((8, 9))
    with pytest.raises(KdxError, match=r"no such tape\.\n"):
        models.load("own_nets_a:fail")
    (folder / "own_nets_b.py").write_text("import no_such_package_b")
    with pytest.raises(KdxError, match="it needs 'no_such_package_b'"):
        models.load("own_nets_b:make")
    (folder / "own_nets_c.py").write_text("1 / 0")
    with pytest.raises(KdxError, match="division by zero"):
        models.load("own_nets_c:make")


def test_random_weights_are_not_trained(tmp_path: Path) -> None:
    assert not models.load(SMALL).trained
    assert not models.load("timm:mobilenetv3_small_050,pretrained=false").trained
    save_file(models.load(SMALL).module.state_dict(), tmp_path / "w.safetensors")
    assert models.load(f"{SMALL}@w.safetensors", folder=tmp_path).trained
    assert models.load("torch.nn:Identity").trained  # a factory may have loaded its own
    assert models.parse_reference("torchvision:resnet18,pretrained=true").is_trained


@pytest.mark.parametrize(("side", "size"), [("64", (64, 64)), ("64-96", (64, 96))])
def test_the_image_size_of_timm_is_that_of_the_preprocessing(side: str, size: tuple[int, int]) -> None:
    network = models.load(f"timm:vit_tiny_patch16_224,depth=1,img_size={side},num_classes=2")
    assert network.preprocessing.size == size
    assert network.module(torch.zeros(1, 3, *size)).shape == (1, 2)


def test_a_head_of_timm_for_other_classes_is_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **options: create(name, **{**options, "pretrained": False}))  # no download
    for classes, trained in ((1000, True), (7, False)):
        assert models.load("timm:mobilenetv3_small_050,pretrained=true", classes=classes).trained is trained


def test_untrained_networks_are_the_architecture_as_its_library_initialises_it() -> None:
    state = torch.random.get_rng_state()
    reference = "kdx:resnet,width=4,depth=1,classes=3"
    one, same, other = (models.untrained(f"{reference}@nowhere.pt", seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    assert one.weights_hash == same.weights_hash == models.load(reference).weights_hash != other.weights_hash
    assert not one.trained and not one.module.training
    for known_to_the_user in ("net.pt2", "tests.models.nets:factory"):
        with pytest.raises(KdxError, match="initialises its weights is not known"):
            models.untrained(known_to_the_user)
