"""Hugging Face references: loaded networks against the saved ones, and preprocessing against the image processors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdx import models
from kdx.errors import KdxError
from kdx.export.graphs import Preprocessing

transformers = pytest.importorskip("transformers")
pytest.importorskip("torchvision")

IMAGES = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test contacts the hub, not even for a name that is not in the cache."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    yield


def residual(**extra: Any) -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 24], depths=[1, 2, 1, 1], layer_type="basic", num_labels=4, **extra
    )
    network: nn.Module = transformers.ResNetForImageClassification(config)
    return network.eval()


def transformer() -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8, num_labels=4
    )
    network: nn.Module = transformers.ViTForImageClassification(config)
    return network.eval()


def saved(network: Any, folder: Path, processor: Any = None) -> Path:
    network.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return folder


def logits(network: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = network(IMAGES / 255).logits
    return result


@pytest.mark.parametrize("build", [residual, transformer])
def test_loading_a_folder_returns_the_saved_network(tmp_path: Path, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    network = build()
    saved(network, tmp_path / "net")
    loaded = models.load(f"hf:{tmp_path / 'net'}", classes=4)
    assert torch.equal(logits(loaded.module), logits(network)) and type(loaded.module) is type(network)
    assert loaded.trained and not loaded.module.training
    monkeypatch.chdir(tmp_path)
    for reference, folder in (("hf:./net", None), ("hf:net", None), ("hf:./net", tmp_path), ("hf:../net", tmp_path / "other")):
        assert models.load(reference, folder=folder).weights_hash == loaded.weights_hash
    assert models.file_name("hf:./net") == "net" and models.file_name("hf:microsoft/resnet-18@runs/s.pt") == "resnet-18-s"


def test_a_weights_file_replaces_the_checkpoint(tmp_path: Path) -> None:
    saved(residual(), tmp_path / "net")
    other = residual()
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    loaded = models.load(f"hf:{tmp_path / 'net'}@{tmp_path / 'w.safetensors'}")
    assert loaded.trained and torch.equal(logits(loaded.module), logits(other))


def test_a_new_head_is_not_trained(tmp_path: Path) -> None:
    network = residual()
    folder = saved(network, tmp_path / "net")
    ten = models.load(f"hf:{folder}", classes=10)
    assert not ten.trained and logits(ten.module).shape == (2, 10)
    before, after = network.state_dict(), ten.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("classifier"))
    blank = models.load(f"hf:{folder},pretrained=false")
    assert not blank.trained and not torch.equal(blank.module.state_dict()["classifier.1.weight"], before["classifier.1.weight"])


def test_a_checkpoint_without_parts_of_the_backbone_is_refused(tmp_path: Path) -> None:
    folder = saved(residual(), tmp_path / "net")
    state = load_file(folder / "model.safetensors")
    state.pop("resnet.encoder.stages.1.layers.0.layer.0.convolution.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KdxError, match=r"such as resnet.encoder.stages.1"):
        models.load(f"hf:{folder}")


def test_nothing_is_unpickled_and_no_code_of_a_repository_is_executed(tmp_path: Path) -> None:
    folder = saved(residual(), tmp_path / "net")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(KdxError, match="safetensors"):
        models.load(f"hf:{folder}")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.Network"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('the code ran')")
    with pytest.raises(KdxError, match="could not be built"):
        models.load(f"hf:{folder}")


def test_errors_in_a_reference_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(residual(), tmp_path / "net")
    with pytest.raises(KdxError, match=r"There is no folder .*nowhere"):
        models.load("hf:./nowhere")
    with pytest.raises(
        KdxError, match=r"no-one/no-such-network cannot be read.*\n.*without an internet connection a name works only .* the cache"
    ):
        models.load("hf:no-one/no-such-network")
    with pytest.raises(KdxError, match="has no wide"):
        models.load(f"hf:{folder},wide=3")
    transformers.BertConfig().save_pretrained(tmp_path / "text")
    with pytest.raises(KdxError, match=r"could not be built: .*BertConfig"):
        models.load(f"hf:{tmp_path / 'text'}")

    def broken(*_arguments: object, **_keywords: object) -> None:
        try:
            raise RuntimeError("operator torchvision::nms does not exist")
        except RuntimeError as error:
            raise ModuleNotFoundError("Could not import module 'ResNetForImageClassification'.") from error

    with monkeypatch.context() as patch:
        patch.setattr(transformers.AutoConfig, "from_pretrained", broken)
        with pytest.raises(KdxError, match=r"cannot be imported: operator torchvision::nms does not exist\.\n"):
            models.load(f"hf:{folder}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(KdxError, match=r"kdx\[models\]"):
        models.load(f"hf:{folder}")


# ---- preprocessing ----

PROCESSORS: dict[str, tuple[Any, dict[str, Any]]] = {
    "vit": (transformers.ViTImageProcessor, {"size": {"height": 32, "width": 32}}),
    "crop": (transformers.CLIPImageProcessor, {"size": {"shortest_edge": 32}, "crop_size": 32}),
    "convnext": (transformers.ConvNextImageProcessor, {"size": {"shortest_edge": 32}, "crop_pct": 1.0}),
    "unnormalised": (transformers.ViTImageProcessor, {"size": {"height": 32, "width": 32}, "do_normalize": False}),
    "factor": (transformers.ViTImageProcessor, {"size": {"height": 32, "width": 32}, "rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3}),
    "raw": (transformers.ViTImageProcessor, {"size": {"height": 32, "width": 32}, "do_rescale": False, "image_std": [3.0, 4.0, 5.0]}),
    "unresized": (transformers.ViTImageProcessor, {"do_resize": False}),
    "efficientnet": (transformers.EfficientNetImageProcessor, {"size": {"height": 32, "width": 32}, "rescale_offset": True}),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_the_preprocessing_equals_the_image_processor(tmp_path: Path, kind: str) -> None:
    """On images that have the final size already, so that resizing is not compared."""
    build, settings = PROCESSORS[kind]
    processor = build(**settings)
    folder = saved(residual(), tmp_path / "net", processor)
    preprocessing = models.load(f"hf:{folder}").preprocessing
    assert preprocessing.size == (None if kind == "unresized" else (32, 32))
    theirs = processor([image.permute(1, 2, 0).numpy() for image in IMAGES], return_tensors="pt")["pixel_values"]
    mean, std = (np.reshape(values, (-1, 1, 1)) for values in (preprocessing.mean, preprocessing.std))
    np.testing.assert_allclose((IMAGES.numpy() / 255 - mean) / std, theirs.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (transformers.ViTImageProcessor, {"size": {"longest_edge": 32}}, "does not state a single size"),
        (transformers.ViTImageProcessor, {"size": {"shortest_edge": 32, "longest_edge": 64}}, "does not state a single size"),
        (transformers.MobileViTImageProcessor, {}, "a step that kdx does not have: do_flip_channel_order"),
        (transformers.CLIPImageProcessor, {"do_resize": False}, "a crop without a resize"),
    ],
)
def test_preprocessing_that_kdx_does_not_have_is_refused(tmp_path: Path, build: Any, settings: dict[str, Any], message: str) -> None:
    folder = saved(residual(), tmp_path / "net", build(**settings))
    with pytest.raises(KdxError, match=message):
        models.load(f"hf:{folder}")


def test_without_a_processor_the_size_is_that_of_the_configuration(tmp_path: Path) -> None:
    assert models.load(f"hf:{saved(transformer(), tmp_path / 'vit')}").preprocessing == Preprocessing((32, 32))
    assert models.load(f"hf:{saved(residual(), tmp_path / 'net')}").preprocessing == Preprocessing()


# ---- layers ----


def test_layers_are_the_stages_and_the_blocks() -> None:
    assert models.layers(residual(), (64, 64)) == [f"resnet.encoder.stages.{index}" for index in range(4)]
    assert models.layers(transformer(), (32, 32)) == [f"vit.layers.{index}" for index in range(2)]
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    network = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**shape))
    assert models.layers(network, (32, 32)) == [f"dinov2.encoder.layer.{index}" for index in range(3)]
    network = transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(depth_multiplier=0.35))
    assert [name for name in models.layers(network, (64, 64)) if name.count(".") > 2] == []  # blocks, not their convolutions


def test_writing_a_reference_with_a_slash_is_the_inverse_of_reading_it() -> None:
    parsed = models.parse_reference("hf:microsoft/resnet-18,revision=main@w.pt")
    assert (parsed.source, parsed.name, parsed.weights) == ("hf", "microsoft/resnet-18", "w.pt")
    assert str(parsed) == "hf:microsoft/resnet-18,revision=main@w.pt"
    assert str(parsed.located().with_classes(3)) == "hf:microsoft/resnet-18,revision=main,num_labels=3@w.pt"
