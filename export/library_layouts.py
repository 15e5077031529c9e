"""What is known of the layout of a layer's output without running anything: from the kinds of its modules, and from timm, torchvision
and transformers, whose networks state their grid and their extra tokens.

A layout is returned only if the output's shape has no other reading.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdx.features.layout import Grid, Layout, aspect_grid, batch_first_tokens, channels_first, channels_last, compact, has_aspect

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
_NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d)
_POOLS = (
    *(nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.FractionalMaxPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(nn.Upsample, nn.PixelShuffle, nn.Dropout2d, nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d),
)
"""Modules that take [n, C, H, W]."""

_MIXING = (nn.MultiheadAttention, nn.LayerNorm, nn.RNNBase, nn.TransformerEncoderLayer)
"""Modules of networks whose features are not only [n, C, H, W]."""

_TIMM_TOKENS = {
    *("vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos", "deit", "beit", "eva", "convit", "cait", "xcit"),
}
"""The modules of timm whose tokens are [n, prefix + H W, C] in reading order."""

_TIMM_GRIDS = {"levit", "mvitv2", "mlp_mixer"}
"""The modules of timm whose stages and blocks return [n, prefix + H W, C] in reading order, on a grid that may change."""

_HF_TOKENS = {
    *("vit", "deit", "beit", "data2vec-vision", "dinov2", "dinov2_with_registers", "dinov3_vit", "vit_msn", "vit_mae", "ijepa"),
    *("clip_vision_model", "siglip_vision_model"),
}
"""The model types of transformers whose tokens are [n, prefix + H W, C] in reading order."""

_HF_GRIDS = {
    "levit": r"(.*\.)?stages\.\d+(\.layers\.\d+)?",
    **dict.fromkeys(("swin", "swinv2", "donut-swin"), r"(.*\.)?layers\.\d+(\.blocks\.\d+)?"),
}
"""The model types of transformers whose stages and blocks return [n, H W, C] in reading order on a grid that changes, and their paths."""

_HF_LATENTS = {"perceiver": ("encoder", "decoder")}
"""The model types of transformers with latents in place of positions, and the modules that return them."""

_MOST_PREFIX = 16


def convolutional(network: nn.Module, module: nn.Module, shape: Sequence[int], image_size: Grid) -> Layout | None:
    """[n, C, H, W] of a layer with convolutions, if [n, H, W, C] would not have the images' aspect ratio; otherwise None."""
    if len(shape) != 4 or has_aspect(shape[1], shape[2], image_size):
        return None
    if usually_convolutional(network, module, shape, image_size):
        return channels_first(shape)
    only_here = has_aspect(shape[2], shape[3], image_size)
    return channels_first(shape) if only_here and (shape[1] in _widths(module) or _weights_are_convolutions(module)) else None


def usually_convolutional(network: nn.Module, module: nn.Module, shape: Sequence[int], image_size: Grid) -> bool:
    """Whether [n, C, H, W] is the layout of a layer unless a probe shows another one: its modules take that layout, or it has no weights
    and is in a network of convolutions."""
    return is_convolutional(module, shape, image_size) or (len(shape) == 4 and _is_plain(network, module, shape[1]))


def _is_plain(network: nn.Module, module: nn.Module, channels: int) -> bool:
    """Whether the layer has no weights, such as an activation, and the network of convolutions has layers with this number of channels."""
    if any(module.children()) or list(module.parameters()) or channels not in _widths(network):
        return False
    return not any(isinstance(inner, _MIXING) for inner in network.modules())


def is_convolutional(module: nn.Module, shape: Sequence[int], image_size: Grid) -> bool:
    """Whether the layer's own modules all take [n, C, H, W], so that this is its layout unless a probe shows another one.

    A layer of several modules may also rearrange what its convolutions return, so its output must have the images' aspect ratio too.
    """
    if len(shape) != 4 or (any(module.children()) and not has_aspect(shape[2], shape[3], image_size)):
        return False
    return isinstance(module, _POOLS) or (shape[1] in _widths(module) and _weights_are_convolutions(module))


def _weights_are_convolutions(module: nn.Module) -> bool:
    """Whether all weights inside a module are those of convolutions and their norms, and there are some."""
    weighted = [inner for inner in module.modules() if list(inner.parameters(recurse=False))]
    return bool(weighted) and all(isinstance(inner, (*_CONVOLUTIONS, *_NORMS, nn.GroupNorm)) for inner in weighted)


def _widths(module: nn.Module) -> Iterator[int]:
    """The numbers of channels that convolutions and norms inside a module return."""
    for inner in module.modules():
        if isinstance(inner, _CONVOLUTIONS):
            yield inner.out_channels
        elif isinstance(inner, _NORMS):
            yield inner.num_features
        elif isinstance(inner, nn.GroupNorm):
            yield inner.num_channels


def library(network: nn.Module, path: str, shape: Sequence[int], image_size: Grid) -> tuple[Layout, str] | None:
    """The layout that the library of the network, or of a part of it that contains the layer, states, and the library's name."""
    for owner, rest in _owners(network, path):
        home = type(owner).__module__
        if home.startswith("timm.models."):
            layout = _timm(owner, home.rpartition(".")[2], rest, shape, image_size)
            return None if layout is None else (layout, "timm")
        if home.startswith("transformers.") and hasattr(owner, "config"):
            layout = _transformers(owner, rest, shape, image_size)
            return None if layout is None else (layout, "transformers")
        if home == "torchvision.models.vision_transformer" and hasattr(owner, "patch_size"):
            layout = _tokens(shape, _patches(image_size, owner.patch_size), (1,))
            return None if layout is None else (layout, "torchvision")
        if home == "torchvision.models.swin_transformer" and hasattr(owner, "head"):
            return (channels_last(shape), "torchvision") if _is_channels_last(shape, image_size) else None
    return None


def latents(network: nn.Module, path: str) -> bool:
    """Whether the library states that the layer's tokens are latents: each of them attends to the whole image, and none has a position."""
    for owner, rest in _owners(network, path):
        if type(owner).__module__.startswith("transformers.") and hasattr(owner, "config"):
            modules = _HF_LATENTS.get(getattr(owner.config, "model_type", ""), ())
            return any(name in modules for name in rest.split("."))
    return False


def _owners(network: nn.Module, path: str) -> Iterator[tuple[Any, str]]:
    """The network and the modules around the layer, each with the rest of the layer's path."""
    names = path.split(".")
    owner: nn.Module | None = network
    for place, name in enumerate(names):
        yield owner, ".".join(names[place:])
        owner = getattr(owner, name, None)
        if owner is None:
            return


def _timm(owner: Any, family: str, rest: str, shape: Sequence[int], image_size: Grid) -> Layout | None:
    if hasattr(owner, "reroll") and hasattr(owner, "mask_unit_size"):
        return _hiera(owner, rest, shape)
    if getattr(owner, "output_fmt", None) == "NHWC":
        return channels_last(shape) if _is_channels_last(shape, image_size) else None
    prefix = int(getattr(owner, "num_prefix_tokens", 0))
    if family == "coat" and len(shape) == 3:  # a class token and a grid that changes, and no class token from the embeddings of patches
        prefixes = [prefix for prefix in (1, 0) if aspect_grid(shape[1] - prefix, image_size)]
        return _tokens(shape, aspect_grid(shape[1] - prefixes[0], image_size) or (1, 1), prefixes) if prefixes else None
    if family == "nest":  # its levels put the blocks of the image back into their places
        return channels_first(shape) if re.fullmatch(r"levels\.\d+", rest) and len(shape) == 4 else None
    if family == "twins":
        grid = aspect_grid(shape[1], image_size) if len(shape) == 3 and re.fullmatch(r"blocks\.\d+\.\d+", rest) else None
        return None if grid is None else _tokens(shape, grid, (0,))
    if family in _TIMM_GRIDS:
        is_stage = re.fullmatch(r"(stages|blocks)(\.\d+)?(\[0\])?", rest)
        grid = aspect_grid(shape[1] - prefix, image_size) if is_stage else None
        return None if grid is None else _tokens(shape, grid, (prefix,))
    embedding = getattr(owner, "patch_embed", None)
    if family not in _TIMM_TOKENS or embedding is None:
        return None
    grids = [tuple(embedding.grid_size)] if getattr(embedding, "grid_size", None) else []
    if getattr(embedding, "patch_size", None):
        grids.append(_patches(image_size, embedding.patch_size))
    return next((layout for grid in grids if (layout := _tokens(shape, grid, (prefix, 0))) is not None), None)


def _hiera(owner: Any, rest: str, shape: Sequence[int]) -> Layout | None:
    """The tokens of a block of Hiera, which are ordered by the units that later stages pool. ``reroll`` puts them in reading order."""
    names = rest.split(".")
    if len(names) != 2 or names[0] != "blocks" or len(shape) != 3:
        return None
    return _rerolled(owner.reroll, owner.reroll.schedule, int(names[1]), shape)


def _rerolled(reroll: Callable[[Tensor, int], Tensor], schedule: Mapping[int, Any], place: int, shape: Sequence[int]) -> Layout | None:
    """The tokens [n, L, C] that ``reroll`` puts in reading order. schedule: block or stage -> the pools that follow, and its grid."""
    if place not in schedule or math.prod(schedule[place][1]) != shape[1]:
        return None
    tokens = reroll(torch.arange(shape[1]).view(1, -1, 1), place)
    if tokens.ndim != 4:
        return None
    return Layout(3, 0, 2, shape[1], (tokens.shape[1], tokens.shape[2]), compact(tokens.flatten().tolist()))


def _transformers(owner: Any, rest: str, shape: Sequence[int], image_size: Grid) -> Layout | None:
    config = owner.config
    if len(shape) != 3:
        return None
    kind = getattr(config, "model_type", "")
    if kind == "hiera" and (match := re.fullmatch(r"(.*?)\.?stages\.(\d+)(\.layers\.\d+)?", rest)):
        encoder = owner.get_submodule(match[1])
        return _rerolled(encoder.reroll, encoder.schedule, int(match[2]), shape)
    if kind in _HF_GRIDS:
        grid = aspect_grid(shape[1], image_size) if re.fullmatch(_HF_GRIDS[kind], rest) else None
        return None if grid is None else _tokens(shape, grid, (0,))
    patch = getattr(config, "patch_size", None)
    if kind not in _HF_TOKENS or patch is None:
        return None
    grid = _patches(image_size, patch)
    extra = shape[1] - math.prod(grid)
    registers = int(getattr(config, "num_register_tokens", 0) or 0)
    known = {0: (0,), 1: (1,), 2: (2,)} | {1 + registers: (1 + registers,)}
    return _tokens(shape, grid, known.get(extra, ()))


def _tokens(shape: Sequence[int], grid: Grid, prefixes: Sequence[int]) -> Layout | None:
    if len(shape) != 3:
        return None
    for prefix in prefixes:
        if shape[1] == prefix + math.prod(grid) and 0 <= prefix <= _MOST_PREFIX:
            return batch_first_tokens(shape, grid, prefix)
    return None


def _patches(image_size: Grid, patch: int | Sequence[int]) -> Grid:
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return image_size[0] // height, image_size[1] // width


def _is_channels_last(shape: Sequence[int], image_size: Grid) -> bool:
    return len(shape) == 4 and has_aspect(shape[1], shape[2], image_size)
