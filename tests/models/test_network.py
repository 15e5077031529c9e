"""References, weights, layers, the models file; the built-in network against torchvision's."""

from __future__ import annotations

import os
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from kdx import models
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.models import models_file
from kdx.models.resnet import resnet

SMALL = "kdx:resnet,width=4,depth=1,classes=3"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, not yet importable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    return tmp_path


# ---- the built-in network ----


def test_resnet_is_torchvisions_resnet50() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    theirs = torchvision.models.resnet50(weights=None).eval()
    ours = resnet(64, (3, 4, 6, 3), 1000, block="bottleneck", stem="imagenet").eval()
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    images = torch.randn(2, 3, 71, 65)
    with torch.no_grad():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("stages", "depth"), [(1, 1), (3, 2), (4, (1, 2, 1, 1))])
def test_resnet_stages_halve_the_resolution_and_double_the_width(stages: int, depth: int | tuple[int, ...]) -> None:
    network = resnet(4, depth, 5, stages)
    names = [f"layer{index + 1}" for index in range(stages)]
    logits, *features = FeatureGraph(network, names)(torch.rand(2, 3, 24, 16))
    assert logits.shape == (2, 5)
    assert [tuple(feature.shape[1:]) for feature in features] == [(4 * 2**i, 24 // 2**i, 16 // 2**i) for i in range(stages)]


@pytest.mark.parametrize(
    "arguments", ["width=0", "depth=0", "stages=0", "depth=2-0", "block=wide", "stem=none", "width=1.5", "depth=deep", "colour=red"]
)
def test_resnet_refuses_sizes_that_are_none(arguments: str) -> None:
    with pytest.raises(KdxError):
        models.load(f"kdx:resnet,{arguments}")


# ---- references ----


def test_a_reference_is_read_and_written_alike() -> None:
    text = "package.module:make,width=8,rate=0.5,deep=true,depth=3-4-6-3,kind=basic@folder/a@b.pt"
    parsed = models.parse_reference(text)
    assert parsed.arguments == {"width": 8, "rate": 0.5, "deep": True, "depth": (3, 4, 6, 3), "kind": "basic"}
    assert (parsed.source, parsed.name, parsed.weights, str(parsed)) == ("package.module", "make", "folder/a@b.pt", text)
    assert (
        str(models.parse_reference("timm:resnet18,pretrained=true").with_classes(7).with_weights("w.pt"))
        == "timm:resnet18,num_classes=7@w.pt"
    )
    assert str(models.parse_reference("kdx:resnet,classes=2").with_classes(7)) == "kdx:resnet,classes=2"


@pytest.mark.parametrize(
    "text", ["", "resnet18", "timm:", ":resnet18", "timm:resnet18,", "timm:a,b", "timm:a,b=", "timm:a,b=1,b=2", "timm:a@"]
)
def test_a_malformed_reference_says_the_form(text: str) -> None:
    with pytest.raises(KdxError, match="SOURCE:NAME"):
        models.load(text)


@pytest.mark.parametrize(
    ("reference", "says"),
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
def test_what_a_reference_gets_wrong_is_named(reference: str, says: str) -> None:
    with pytest.raises(KdxError, match=says):
        models.load(reference)


def test_preprocessing_is_the_sources() -> None:
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert models.load("timm:mobilenetv3_small_050").preprocessing == Preprocessing((224, 224), *imagenet)
    assert models.load("torchvision:squeezenet1_1").preprocessing == Preprocessing((224, 224), *imagenet)
    assert models.load(SMALL).preprocessing == Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3)
    assert models.load("torch.nn:Identity").preprocessing == Preprocessing()


@pytest.mark.parametrize("reference", ["timm:mobilenetv3_small_050", "torchvision:squeezenet1_1", "kdx:resnet,width=4"])
def test_classes_are_given_where_the_reference_does_not_say(reference: str) -> None:
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


def test_random_weights_are_told_apart_from_trained_ones(tmp_path: Path) -> None:
    assert not models.load(SMALL).trained
    assert not models.load("timm:mobilenetv3_small_050,pretrained=false").trained
    save_file(models.load(SMALL).module.state_dict(), tmp_path / "w.safetensors")
    assert models.load(f"{SMALL}@w.safetensors", folder=tmp_path).trained
    assert models.load("torch.nn:Identity").trained  # a factory may have loaded its own
    assert models.parse_reference("torchvision:resnet18,pretrained=true").is_trained


# ---- weights ----


@pytest.mark.parametrize("kind", ["safetensors", "pt", "pth", "state_dict", "model", "parallel", "half"])
def test_weights_come_back_whatever_they_were_saved_as(tmp_path: Path, kind: str) -> None:
    state = models.load(SMALL).module.state_dict()
    path = tmp_path / f"w.{kind if kind in ('safetensors', 'pth') else 'pt'}"
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "half":
        state = {name: tensor.half().to(tensor.dtype) for name, tensor in state.items()}
        torch.save({name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}, path)
    elif kind == "parallel":
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, path)
    else:
        torch.save({kind: state} if kind in ("state_dict", "model") else state, path)
    loaded = models.load(f"{SMALL}@{path.name}", folder=tmp_path).module.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_weights_of_another_network_are_told_apart(tmp_path: Path) -> None:
    save_file(models.load(SMALL).module.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(KdxError, match=r"shapes differ: fc.weight is \[3, 16\] in the file and \[4, 16\] in the network"):
        models.load(f"kdx:resnet,width=4,depth=1,classes=4@{tmp_path}/w.safetensors")
    with pytest.raises(KdxError, match=r"it lacks layer1.1.conv1.weight, .* and \d+ more"):
        models.load(f"kdx:resnet,width=4,depth=2,classes=3@{tmp_path}/w.safetensors")
    with pytest.raises(KdxError, match="it has beside them layer3"):
        models.load(f"kdx:resnet,width=4,depth=1,classes=3,stages=2@{tmp_path}/w.safetensors")


def test_weights_files_that_are_none(tmp_path: Path) -> None:
    state = models.load(SMALL).module.state_dict()
    save_file(state, tmp_path / "cut.safetensors")
    torch.save(state, tmp_path / "cut.pt")
    torch.save(nn.Linear(2, 2), tmp_path / "pickled.pt")
    torch.save({"epoch": 3}, tmp_path / "other.pt")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "w.h5").touch()
    for name in ("cut.safetensors", "cut.pt"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:2000])
    for name in ("cut.safetensors", "cut.pt", "pickled.pt", "other.pt", "empty.pth", "w.h5", "missing.pt"):
        with pytest.raises(KdxError, match=name):
            models.load(f"{SMALL}@{tmp_path / name}")


def test_the_hash_follows_the_weights() -> None:
    network = models.load("timm:mobilenetv3_small_050", classes=3)
    before = network.weights_hash
    other = models.load("timm:mobilenetv3_small_050", classes=3)
    assert other.weights_hash != before
    other.module.load_state_dict(network.module.state_dict())
    assert other.weights_hash == before
    with torch.no_grad():
        next(reversed(list(other.module.buffers()))).add_(1)
    assert other.weights_hash != before


# ---- layers ----


@pytest.mark.parametrize(
    ("reference", "size", "expected"),
    [
        ("kdx:resnet,width=4", (16, 16), ["layer1", "layer2", "layer3"]),
        ("timm:resnet18", (64, 64), ["layer1", "layer2", "layer3", "layer4"]),
        ("timm:resnet18d", (64, 64), ["layer1", "layer2", "layer3", "layer4"]),
        ("torchvision:resnet18", (64, 64), ["layer1", "layer2", "layer3", "layer4"]),
        ("timm:vit_tiny_patch16_224", None, [f"blocks.{index}" for index in range(12)]),
        ("timm:mobilenetv3_small_100", (64, 64), [f"blocks.{index}" for index in range(6)]),
        ("timm:mixer_s32_224", None, [f"blocks.{index}" for index in range(8)]),
        ("timm:swin_s3_tiny_224", None, [f"layers.{index}" for index in range(4)]),
        ("timm:pit_ti_224", None, [f"transformers.{index}.blocks" for index in range(3)]),
        ("timm:convnext_atto", (64, 64), [f"stages.{index}" for index in range(4)]),
        ("torchvision:densenet121", (64, 64), [f"features.denseblock{index}" for index in range(1, 5)]),
        ("torchvision:regnet_y_400mf", (64, 64), [f"trunk_output.block{index}" for index in range(1, 5)]),
    ],
)
def test_layers_are_the_stages(reference: str, size: tuple[int, int] | None, expected: list[str]) -> None:
    network = models.load(reference, classes=10)
    found = models.layers(network, size)
    assert found == expected
    image = torch.rand(1, 3, *(size or network.preprocessing.size or (224, 224)))
    with torch.no_grad():
        FeatureGraph(network.module, found)(image)  # each is one map


def test_layers_of_a_plain_sequence_are_one_a_resolution() -> None:
    network = models.load("timm:vgg11_bn,num_classes=10").module.get_submodule("features")
    assert models.layers(nn.Sequential(network, nn.Flatten()), (64, 64)) == [f"0.{index}" for index in (1, 5, 12, 19, 26)]
    assert models.layers(network, (64, 64)) == ["1", "5", "12", "19", "26"]


class Joined(nn.Module):
    """Branches at two resolutions, joined; the last output is not a child's own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(channels, 4, 3, padding=1), nn.AvgPool2d(2))
        self.coarse = nn.Sequential(nn.AvgPool2d(2), nn.Sequential(nn.Conv2d(channels, 4, 1)))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.fine(features), self.coarse(features)], 1)


class Listed(nn.Module):
    """Blocks in a ModuleList, which itself never runs; training mode and an unused branch beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Joined(3), Joined(8), Joined(8)])
        self.unused = Joined(3)
        self.head = nn.Linear(8, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            images = block(images)
        logits: torch.Tensor = self.head(images.mean((2, 3)))
        return logits


def test_layers_of_an_own_network() -> None:
    network = Listed()
    network.blocks[0].eval()
    assert models.layers(network, (32, 24)) == ["blocks.1", "blocks.2"]  # the first takes the image
    assert network.training and not network.blocks[0].training  # modes are as before
    assert not any(module._forward_hooks for module in network.modules())
    with pytest.raises(KdxError, match="does not run on an image of 2 x 2"):
        models.layers(network, (2, 2))


# ---- the models file ----


def test_a_models_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = models_file.write_models(
        tmp_path / "models.toml",
        teacher="timm:resnet18@t.pt",
        base=SMALL,
        student=SMALL,
        layers=["layer3", "layer1=stem.0"],
        classes=["cat", 'a "quoted"\n\\name\x7f', "猫"],
        preprocessing=Preprocessing((24, 32), (0.5, 0.25, 1e-7), (0.1,)),
        data="digits",
        seed=3,
        training={"method": "kd", "accuracy": 0.97, "whole": 1.0, "augment": True, "nested": {"odd key": [1, 2]}, "nothing": None},
    )
    assert models_file.read_models(tmp_path / "models.toml") == written
    assert written.preprocessing == Preprocessing((24, 32), (0.5, 0.25, 1e-7), (0.1,))
    assert written.classes == ("cat", 'a "quoted"\n\\name\x7f', "猫")
    assert written.training == {"method": "kd", "accuracy": 0.97, "whole": 1.0, "augment": True, "nested": {"odd key": [1, 2]}}
    assert (written.layers, written.data, written.seed) == (("layer3", "layer1=stem.0"), "digits", 3)
    assert os.listdir(tmp_path) == ["models.toml"]  # noqa: PTH208 - names are compared


def test_a_models_file_loads_weights_beside_it(tmp_path: Path) -> None:
    state = models.load(SMALL).module.state_dict()
    save_file(state, tmp_path / "s.safetensors")
    file = models_file.write_models(
        tmp_path / "m.toml",
        teacher="kdx:resnet,width=4",
        base=SMALL,
        student=f"{SMALL}@s.safetensors",
        classes=["a", "b"],
        preprocessing=Preprocessing((9, 9)),
    )
    student = file.load("student")
    assert torch.equal(student.module.state_dict()["fc.weight"], state["fc.weight"])
    assert student.preprocessing == Preprocessing((9, 9))
    assert file.load("teacher").module.get_submodule("fc").out_features == 2
    assert replace(file, preprocessing=None).load("base").preprocessing.size == (32, 32)
    with pytest.raises(ValueError, match="role"):
        file.load("pupil")
    network, classes = models_file.load_any(f"{tmp_path}/m.toml:student")
    assert (network.weights_hash, classes) == (student.weights_hash, ("a", "b"))
    with pytest.raises(KdxError, match=r"'pupil' .* is not a role"):
        models_file.load_any(f"{tmp_path}/m.toml:pupil")
    assert models_file.load_any(SMALL)[1] == ()


def test_a_models_file_may_name_no_teacher(tmp_path: Path) -> None:
    written = models_file.write_models(tmp_path / "m.toml", base=SMALL, student=SMALL, layers=["layer3"])
    assert "teacher" not in (tmp_path / "m.toml").read_text()
    assert models_file.read_models(tmp_path / "m.toml") == written
    assert written.teacher is None and written.references == {"base": SMALL, "student": SMALL}
    for ask in (lambda: written.load("teacher"), lambda: models_file.load_any(f"{tmp_path}/m.toml:teacher")):
        with pytest.raises(KdxError, match="names no teacher"):
            ask()


def test_file_names_are_safe() -> None:
    assert models.file_name("timm:resnet18,num_classes=10@runs/s.safetensors") == "resnet18-s"
    assert models.file_name("timm:hub/net x") == "hub-net-x"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("teacher = ", "cannot be read"),
        ("teacher = 'a:b'", "no base and no student"),
        ("{roles}\nlayer = ['a']", "unknown key 'layer'\\.\nDid you mean 'layers'"),
        ("{roles}\nlayers = 'a'", "'layers' .* is not a list"),
        ("{roles}\nclasses = [1]", "'classes' .* is not text"),
        ("{roles}\n[data]\nseed = true", "'data.seed' .* is not a whole number"),
        ("{roles}\n[data]\nsed = 1", "unknown key data.'sed'"),
        ("{roles}\n[preprocessing]\nsize = [3]", "not sound"),
        ("{roles}\n[preprocessing]\nstd = [0.0]", "not sound"),
        ("{roles}\n[preprocessing]\nmean = ['x']", "not sound"),
        ("teacher = 1\nbase = 'a:b'\nstudent = 'a:b'", "'teacher' .* is not text"),
    ],
)
def test_what_a_models_file_gets_wrong_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "m.toml"
    path.write_text(text.replace("{roles}", "teacher = 'a:b'\nbase = 'a:b'\nstudent = 'a:b'"))
    with pytest.raises(KdxError, match=says):
        models_file.read_models(path)


def test_no_models_file(tmp_path: Path) -> None:
    with pytest.raises(KdxError, match="No such file"):
        models_file.read_models(tmp_path / "m.toml")
