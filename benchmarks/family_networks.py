"""The networks of `benchmarks.families --all`: the smallest of each timm module with classifiers, and transformers' image classifiers.

All weights are random. timm's networks have their own image size, or 128 x 128 if their configuration does not fix the size, and at most
two blocks per stage or four in a stack, if their number is an argument. transformers' networks have small configurations with blocks of
every kind that the architecture has.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from benchmarks import torchvision_operators as torchvision_operators
from kdx import models
from kdx.export.graphs import Preprocessing

CLASSES = 10
SIDE = 128
"""Height and width of the images of networks that take any size."""

_SIDES = (SIDE, 112)
"""Sizes to try, because patches of 14 pixels do not fit into the first."""

_SMALL: dict[str, int] = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 96, "image_size": SIDE}
"""Values of a small configuration, where an architecture has the setting as a number."""

_VISION: dict[str, Any] = {"vision_config": {**_SMALL, "patch_size": 16}}
_OWN: dict[str, dict[str, Any]] = {
    "clip": _VISION,
    "dinov2": {"image_size": 112},
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 0.5, "hidden_dim": 640},
    "donut-swin": {"image_size": 224},  # the windows of the last stage do not fit into a smaller image
    "imagegpt": {"n_embd": 48, "n_layer": 4, "n_head": 4},
    "levit": {"image_size": 224},
    "metaclip_2": _VISION,
    "perceiver": {"d_latents": 48, "num_latents": 16, "num_self_attends_per_block": 2},
    "shieldgemma2": {
        **_VISION,
        "text_config": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
        | {"intermediate_size": 96, "vocab_size": 262208},
    },
    "siglip": _VISION,
    "siglip2": _VISION,
    "swin": {"image_size": 224},
    "swinv2": {"image_size": 224},
    "textnet": {"image_size": [SIDE, SIDE]},
    "timm_wrapper": {"architecture": "test_resnet"},
}
"""Settings of single architectures, which replace those of `_SMALL`."""


_BLOCKS = (
    "depth",
    "depths",
    "layers",
    "num_blocks",
    "stages",
    "block_config",
    "k_sec",
    "depth_list",
    "num_blocks_list",
    "parallel_depth",
    "serial_depths",
)
"""The names of timm's arguments for the number of blocks: of a stack, or of each stage."""

_STACK, _STAGE = 4, 2
"""The largest number of blocks in a stack, and in each of several stages."""

_OWN_TIMM: dict[str, dict[str, Any]] = {
    "convit_tiny": {"depth": 4, "local_up_to_layer": 3},
    "deepseek_vit_412m": {"depth": 4, "embed_dim": 256, "num_heads": 4},  # the exports of 412 million parameters take 17 GB
    "sam2_hiera_tiny": {"stages": (1, 2, 7, 2)},  # it states which of its blocks attend to all positions
    "samvit_base_patch16_224": {"depth": 6},  # the third block attends to all positions
}
"""Arguments of single timm networks, which replace the standard ones."""


def timm_networks() -> dict[str, str]:
    """timm's module -> its smallest classifier. It takes minutes."""
    return smallest_classifiers(parameter_counts())


def parameter_counts() -> dict[str, dict[str, int]]:
    """timm's module -> the number of parameters of each of its networks, counted without memory. It takes some minutes."""
    import timm
    from timm.models import _registry

    counts: dict[str, dict[str, int]] = {}
    for name in timm.list_models():
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = timm.create_model(name)
        counts.setdefault(_registry._model_to_module[name], {})[name] = sum(parameter.numel() for parameter in network.parameters())
    return counts


def smallest_classifiers(counts: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """timm's module -> its network with the fewest parameters among its classifiers, from `parameter_counts`."""
    smallest = {
        module: next(filter(_is_classifier, sorted(networks, key=networks.__getitem__)), None) for module, networks in counts.items()
    }
    return {module: name for module, name in sorted(smallest.items()) if name is not None}


def _is_classifier(name: str) -> bool:
    """Whether a timm network takes a number of classes and returns logits of that many."""
    import timm

    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            network = timm.create_model(name, num_classes=CLASSES)
    except TypeError:  # it does not take num_classes
        return False
    return bool(getattr(network, "num_classes", 0) == CLASSES)


def transformers_architectures() -> list[str]:
    """The architectures for which transformers has an image classifier."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as names

    return list(names)


def build(name: str, seed: int) -> tuple[nn.Module, Preprocessing]:
    """The network ``timm:NAME`` or ``transformers:ARCHITECTURE`` in eval mode, with random weights from ``seed``, and its preprocessing.

    Weights that start at zero, such as some heads and residual branches, are random too: without them there would be no gradient.
    Batch norms have the statistics of random images, as those of a trained network. With the initial ones, deep features of two images can
    differ by less than the rounding of their common part. Convolutions beside a batch norm have larger weights in transformers' networks:
    with the initial ones, features shrink by about 1e6 per stage. Those of attention keep the initial ones: larger ones let every position
    attend to one position, so that a patch changes the features of all positions.
    """
    torch.manual_seed(seed)
    source, _, rest = name.partition(":")
    module, preprocessing = _from_timm(rest) if source == "timm" else _from_transformers(rest)
    for parameter in module.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    _calibrate(module, preprocessing, draw_convolutions=source == "transformers")
    return module.eval(), preprocessing


def _calibrate(module: nn.Module, preprocessing: Preprocessing, *, draw_convolutions: bool) -> None:
    """Give batch norms the statistics of four images, and, if asked, the convolutions beside them weights that keep the scale."""
    norms = [inner for inner in module.eval().modules() if isinstance(inner, nn.BatchNorm2d) and inner.track_running_stats]
    if not norms or preprocessing.size is None:
        return
    for parent in module.modules() if draw_convolutions else ():
        if any(isinstance(child, nn.BatchNorm2d) for child in parent.children()):
            for child in parent.children():
                if isinstance(child, nn.Conv2d):
                    nn.init.kaiming_normal_(child.weight)
    for norm in norms:
        norm.train()
        norm.momentum = None  # the mean over passes: of one pass
    with torch.no_grad():
        module(torch.rand(4, 3, *preprocessing.size) * 2 - 1)


def _from_timm(name: str) -> tuple[nn.Module, Preprocessing]:
    with _few_blocks(name):
        network = models.load(f"timm:{name}", classes=CLASSES)
    preprocessing = network.preprocessing
    assert preprocessing.size is not None
    configuration: Any = getattr(network.module, "pretrained_cfg", {})
    sides = [side for side in _SIDES if side < min(preprocessing.size)] if not configuration.get("fixed_input_size") else []
    side = next((side for side in sides if _runs(network.module, side)), None)
    return network.module, replace(preprocessing, size=(side, side)) if side else preprocessing


@contextmanager
def _few_blocks(name: str) -> Iterator[None]:
    """Let timm build a network with at most four blocks in a stack, or two per stage, if this works.

    timm's functions pass the number of blocks to a common builder, often without an argument of their own for it.
    """
    import timm
    from timm.models import _registry

    module: Any = sys.modules[f"timm.models.{_registry._model_to_module[name]}"]
    builder = module.build_model_with_cfg

    def small(*arguments: Any, **settings: Any) -> Any:
        few = {key: _fewer(value) for key, value in settings.items() if key in _BLOCKS}
        return builder(*arguments, **settings | few | _OWN_TIMM.get(name, {}))

    with patch.object(module, "build_model_with_cfg", small), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                timm.create_model(name)
            works = True
        except Exception:  # a network may need its own number of blocks, and may raise any exception otherwise
            works = False
        if works:
            yield
    if not works:
        yield


def _fewer(blocks: Any) -> Any:
    """A smaller number of blocks of a stack, or of each stage. Anything else remains as it is."""
    if isinstance(blocks, int):
        return min(blocks, _STACK)
    if isinstance(blocks, list | tuple) and all(isinstance(number, int) for number in blocks):
        return type(blocks)(min(number, _STAGE) for number in blocks)
    return blocks


def _runs(module: nn.Module, side: int) -> bool:
    """Whether a network takes images of this height and width."""
    try:
        with torch.no_grad():
            module.eval()(torch.rand(2, 3, side, side))
    except Exception:  # networks of another package refuse a size with exceptions of any kind
        return False
    return True


def _from_transformers(architecture: str) -> tuple[nn.Module, Preprocessing]:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as names

    transformers.logging.set_verbosity_error()
    kind: Any = CONFIG_MAPPING[architecture]
    standard = kind().to_dict()
    settings: dict[str, Any] = {key: value for key, value in _SMALL.items() if isinstance(standard.get(key), int)}
    if isinstance(standard.get("depths"), list):
        settings["depths"] = [min(depth, 2) for depth in standard["depths"]]
    configuration = kind(**settings | _OWN.get(architecture, {}), num_labels=CLASSES)
    class_name = names[architecture]
    module = getattr(transformers, class_name if isinstance(class_name, str) else class_name[0])(configuration)
    vision = getattr(configuration, "vision_config", configuration)
    side = getattr(vision, "image_size", SIDE)
    return module, Preprocessing(tuple(side) if isinstance(side, list | tuple) else (side, side), (0.5,), (0.5,))
