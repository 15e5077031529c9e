"""What timm and transformers state about their layouts, against their own reshaping and against what a probe shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdx
from kdx.export.graphs import FeatureGraph
from kdx.export.layouts import Decider

pytestmark = pytest.mark.slow

SIZE = (64, 64)


def pixels(n: int = 2, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float32)


def hiera() -> Any:
    from timm.models.hiera import Hiera

    torch.manual_seed(0)
    stages: dict[str, Any] = {"embed_dim": 16, "num_heads": 1, "stages": (1, 2, 1, 1), "mask_unit_size": (8, 8)}
    network: Any = Hiera(img_size=SIZE, num_classes=5, **stages)
    nn.init.normal_(network.head.fc.weight)
    return network.eval()


def swin() -> Any:
    import timm

    torch.manual_seed(0)
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=SIZE,
        window_size=4,
        embed_dim=24,
        depths=(2, 2),
        num_heads=(2, 2),
        num_classes=5,
    ).eval()


def vision_transformer(**arguments: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(img_size=SIZE, patch_size=16, embed_dim=24, depth=3, num_heads=2, num_classes=5, **arguments).eval()


NETWORKS = {
    "hiera": (hiera, "blocks.{}"),
    "swin": (swin, "layers.{}"),
    "class token": (vision_transformer, "blocks.{}"),
    "registers": (lambda: vision_transformer(reg_tokens=4), "blocks.{}"),
    "no class token": (lambda: vision_transformer(class_token=False, global_pool="avg"), "blocks.{}"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_those_of_timms_own_reshaping(name: str) -> None:
    network, layer = NETWORKS[name][0](), NETWORKS[name][1]
    images = pixels()
    with torch.no_grad():
        features = network.forward_intermediates(images, norm=False, intermediates_only=True, output_fmt="NCHW")
        places = network.stage_ends if name == "hiera" else range(len(features))
        for place, expected in zip(places, features, strict=True):
            graph = FeatureGraph(network, [layer.format(place)])
            torch.testing.assert_close(graph(images)[1], expected)
            assert {decided.source for decided in graph.decisions.values()} == {"timm"}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_probe_shows_what_timm_states(name: str) -> None:
    network, layer = NETWORKS[name][0](), NETWORKS[name][1].format(0)
    graph = FeatureGraph(network, [layer])
    graph.decide_for(SIZE)
    shown = Decider(network, lambda images: graph.watch(images)[1], SIZE, graph.mean)._probe.layout(layer, [])
    # The overlapping patches of Hiera show no token of its own for each position, and no known order: the probe does not decide.
    assert shown == (None if name == "hiera" else graph.decisions[layer, SIZE].layout)


@pytest.mark.parametrize("block", [0, 2, 3])
def test_class_maps_of_hiera_are_those_of_autograd_and_reroll(block: int) -> None:
    network, images = hiera(), pixels()
    kept: list[Tensor] = []
    handle = network.blocks[block].register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    logits = network(images)
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[:, 3].sum(), kept[0])
    feature, gradient = (network.reroll(part.detach(), block).permute(0, 3, 1, 2) for part in (kept[0], gradient))
    expected = (gradient.mean((2, 3), keepdim=True) * feature).sum(1).relu()
    torch.testing.assert_close(kdx.grad_cam(network, images, f"blocks.{block}", 3).maps, expected, rtol=1e-3, atol=1e-6)
    elementwise = (gradient * feature).sum(1).relu()
    torch.testing.assert_close(kdx.hires_cam(network, images, f"blocks.{block}", 3).maps, elementwise, rtol=1e-3, atol=1e-6)


def test_coat_states_its_tokens_and_its_tables_are_not_maps() -> None:
    from timm.models.coat import CoaT

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dims": [16, 16, 16, 16], "serial_depths": [1, 1, 1, 1], "num_heads": 8, "mlp_ratios": [2, 2, 2, 2]}
    network = CoaT(img_size=96, patch_size=4, parallel_depth=1, num_classes=5, **sizes).eval()
    images, kept = pixels(size=(96, 96)), {}
    paths = {"serial_blocks1.0": 24, "serial_blocks2.0": 12, "serial_blocks3.0": 6, "parallel_blocks.0.factoratt_crpe3": 6}
    handles = [
        network.get_submodule(path).register_forward_hook(lambda _m, _i, output, path=path: kept.update({path: output})) for path in paths
    ]
    with torch.no_grad():
        network(images)
    for handle in handles:
        handle.remove()
    graph = FeatureGraph(network, [*paths])
    for feature, (path, side) in zip(graph(images)[1:], paths.items(), strict=True):
        torch.testing.assert_close(feature, kept[path][:, 1:].transpose(1, 2).unflatten(2, (side, side)))
    assert {decided.source for decided in graph.decisions.values()} == {"timm"}
    with pytest.raises(kdx.KdxError, match="crpe3"):
        kdx.grad_cam(network, images, "crpe3", 0)
    # The last parallel block is left out: the head reads class tokens. The first outputs of the others are those of the serial blocks.
    assert kdx.models.layers(network, (96, 96)) == [f"serial_blocks{stage}.0" for stage in range(1, 5)]


@pytest.mark.parametrize(("name", "layers"), [("nest_tiny", ["levels.0", "levels.2"]), ("twins_svt_small", ["blocks.0.1", "blocks.2.3"])])
def test_levels_and_blocks_of_timm_need_no_probe(name: str, layers: list[str]) -> None:
    import timm

    torch.manual_seed(0)
    module = timm.create_model(name, num_classes=5).eval()
    graph = FeatureGraph(module, layers)
    image = 0.3 * torch.rand(1, 3, 7, 7, generator=torch.Generator().manual_seed(0)).repeat_interleave(32, 2).repeat_interleave(32, 3)
    brighter = image.clone()
    brighter[:, :, :32, 192:] += 0.6
    with torch.no_grad():
        before, after = (graph(part)[1:] for part in (image, brighter))
    for first, second in zip(before, after, strict=True):
        cells = first.shape[-1]
        row, column = divmod(int((second - first).norm(dim=1).argmax()), cells)
        assert row <= cells // 7 and column >= cells - 1 - cells // 7
    assert "probe" not in {decided.source for decided in graph.decisions.values()}


def test_latents_of_a_perceiver_are_refused_with_the_reason() -> None:
    import transformers

    sizes = {"num_latents": 16, "d_latents": 16, "num_self_attends_per_block": 2, "num_self_attention_heads": 2, "image_size": 16}
    config: Any = transformers.PerceiverConfig
    network = transformers.PerceiverForImageClassificationLearned(config(**sizes, num_labels=5)).eval()
    assert kdx.models.layers(network, (16, 16)) == []
    with pytest.raises(kdx.KdxError, match="latents that attend to the whole image"):
        kdx.grad_cam(network, pixels(size=(16, 16)), "perceiver.encoder.self_attends.1", 0)


def test_rows_in_swins_windows_are_refused() -> None:
    with pytest.raises(kdx.KdxError, match=r"'layers.0.blocks.0.attn.proj' returns \d+ rows for 3 images"):
        kdx.grad_cam(swin(), pixels(), "layers.0.blocks.0.attn.proj", 0)


def transformer(kind: str) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    arguments = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "patch_size": 16}
    config = getattr(transformers, f"{kind}Config")(image_size=64, num_labels=5, **arguments)
    network: nn.Module = transformers.AutoModelForImageClassification.from_config(config)
    return network.eval()


@pytest.mark.parametrize("kind", ["ViT", "Dinov2WithRegisters"])
def test_a_probe_shows_what_transformers_states(kind: str) -> None:
    network = transformer(kind)
    layer = kdx.models.layers(network, SIZE)[0]
    graph = FeatureGraph(network, [layer])
    graph.decide_for(SIZE)
    assert graph.decisions[layer, SIZE].source == "transformers"
    shown = Decider(network, lambda images: graph.watch(images)[1], SIZE, graph.mean)._probe.layout(layer, [])
    assert shown == graph.decisions[layer, SIZE].layout


@pytest.mark.parametrize("name", NETWORKS)
def test_the_default_layer_of_an_advised_network_has_a_map(name: str) -> None:
    network = NETWORKS[name][0]()
    advised = kdx.models.layers(network, SIZE)
    if name in ("class token", "registers"):
        assert advised == ["blocks.0", "blocks.1"]  # after blocks.2, the head reads only the class token
    maps = kdx.grad_cam(network, pixels(), classes=1).maps
    assert maps.shape[0] == 2 and bool(maps.any())


def with_grids(kind: str) -> Any:
    """A small network of transformers whose grid changes between its stages. Its images are 64 x 64, except for Levit."""
    import transformers

    torch.manual_seed(0)
    widths: dict[str, dict[str, Any]] = {
        "Hiera": {"embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 1, 1, 1], "image_size": list(SIZE)},
        "Levit": {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2] * 3, "depths": [1] * 3, "key_dim": [8] * 3, "image_size": 128},
        "Swin": {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4, "image_size": 64},
        "Swinv2": {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4, "image_size": 64},
        "DonutSwin": {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4, "image_size": 64},
    }
    config = getattr(transformers, f"{kind}Config")(num_labels=5, **widths[kind])
    return getattr(transformers, f"{kind}ForImageClassification")(config).eval()


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("Hiera", [f"hiera.encoder.stages.{stage}" for stage in range(4)]),
        ("Swin", ["swin.encoder.layers.0[0]", "swin.encoder.layers.1[0]"]),
        ("Swinv2", ["swinv2.encoder.layers.0[0]", "swinv2.encoder.layers.1[0]"]),
        ("DonutSwin", ["donut.encoder.layers.0[0]", "donut.encoder.layers.1[0]"]),
    ],
)
def test_stages_of_transformers_are_its_own_reshaped_hidden_states(kind: str, layers: list[str]) -> None:
    network = with_grids(kind)
    backbone = getattr(network, layers[0].partition(".")[0])
    graph = FeatureGraph(network, [f"{layer.removesuffix('[0]')}[0]" for layer in layers])
    images = pixels()
    with torch.no_grad():
        features = graph(images)[1:]
        states = backbone(images, output_hidden_states=True).reshaped_hidden_states[1:]
    for feature, state in zip(features, states, strict=True):
        torch.testing.assert_close(feature, state.movedim(-1, 1) if kind == "Hiera" else state)
    assert {decided.source for decided in graph.decisions.values()} == {"transformers"}


def test_tokens_of_levit_are_at_their_positions() -> None:
    network = with_grids("Levit")
    block, stage = "levit.encoder.stages.0.layers.0", "levit.encoder.stages.0"
    norm = network.get_submodule(f"{block}.module.projection.batch_norm")
    nn.init.zeros_(norm.weight)  # the block then returns the embeddings of the patches, which are a convolution's map
    for attention in (inner for inner in network.modules() if type(inner).__name__ == "LevitAttentionSubsample"):
        nn.init.constant_(attention.attention_biases[:, 0].data, 30.0)  # every position attends to itself
    graph = FeatureGraph(network, [block, stage])
    image = pixels(1, (128, 128))
    brighter = image.clone()
    brighter[:, :, 34:48, 98:112] += 0.5  # the embeddings see it at rows 2 and 3 and columns 6 and 7 of 8
    images = torch.cat([image, brighter])
    with torch.no_grad():
        first, last = graph(images)[1:]
        network.levit.patch_embeddings.embedding_layer_4.register_forward_hook(lambda *call: maps.append(call[2]))
        maps: list[Tensor] = []
        network(images)
    torch.testing.assert_close(first, maps[0])
    assert last.shape[2:] == (4, 4)
    assert (last[1] - last[0]).norm(dim=0).nonzero().tolist() == [[1, 3]]
    assert {decided.source for decided in graph.decisions.values()} == {"transformers"}
    assert kdx.models.layers(network, (128, 128)) == [f"levit.encoder.stages.{number}" for number in range(3)]
