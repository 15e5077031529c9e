"""The operators of networks have gradients in ONNX."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdx.export import trace
from kdx.export.graphs import FeatureGraph, GradientGraph
from tests.export.trace.programs import BATCH, Behind, agree, random_inputs, run, traced


def activations(x: Tensor) -> Tensor:
    smooth = F.softplus(x) + F.celu(x, 0.7) + F.selu(x) + F.elu(x) + F.mish(x) + F.silu(x) + F.gelu(x) + F.gelu(x, approximate="tanh")
    pieces = F.hardswish(x) * F.hardsigmoid(x) + F.relu6(3 * x) + F.leaky_relu(x) + F.hardtanh(x, -0.5, 0.5) + F.softsign(x)
    cut = F.softshrink(x, 0.1) + F.hardshrink(x, 0.1) + F.tanhshrink(x) + F.threshold(x, 0.1, 0.2) + F.logsigmoid(x)
    clamped = x.clamp(-0.1, 0.3) + torch.maximum(x, -0.3 * x) + torch.where(x > 0.1, x.exp(), x.square())
    return torch.cat([smooth, pieces, F.glu(cut, 1), clamped], 1)


def statistics(x: Tensor) -> Tensor:
    position = F.normalize(x, dim=1) + x.norm(dim=1, keepdim=True) + x.var(1, keepdim=True) + x.logsumexp(1, keepdim=True)
    position = position + x.softmax(1) + x.log_softmax(1) + x.amax(1, keepdim=True) + x.max(1, keepdim=True).values + x.cumsum(1)
    channel = x.std((2, 3)) + x.amax((2, 3)) + x.clamp(min=1e-3).pow(3).mean((2, 3)).pow(1 / 3)
    return torch.cat([position.flatten(1), channel, F.cosine_similarity(x[:, :4], x[:, 4:], dim=1).flatten(1)], 1)


def rearrangements(x: Tensor) -> Tensor:
    shuffled = F.pixel_unshuffle(F.pixel_shuffle(x, 2)[:, :, 2:, 4:], 2).roll((1, -2), (2, 3)) * torch.arange(8)
    chosen = x[:, torch.tensor([3, 1, 3])] * x.index_select(1, torch.tensor([1, 0, 7])) + x[:, 1:-1:2, ::2, -5:].repeat(1, 1, 2, 2)
    parts = torch.cat([torch.stack(part.unbind(1)[::-1], 1) * i for i, part in enumerate(x.chunk(3, 1))] + [x.split((3, 5), 1)[1]], 1)
    written = x.clone()
    written[:, 2:4] = x[:, :2] * 3
    written[:, :, 1] = 0
    pooled = x.mean((2, 3), keepdim=True).expand(-1, -1, 3, 2) * torch.arange(2) + x.unfold(2, 4, 4).unfold(3, 5, 5).sum((4, 5))
    return torch.cat([part.flatten(1) for part in (shuffled, chosen, parts, written, pooled, x.flip(3).repeat_interleave(2, 1))], 1)


def paddings(x: Tensor) -> Tensor:
    padded = [F.pad(x, (1, 2, 0, 1), mode=mode) for mode in ("constant", "reflect", "replicate", "circular")]
    return torch.cat([*padded, F.pad(x, (-1, 4, -2, 3))], 1) * torch.arange(13)


def resizings(x: Tensor) -> Tensor:
    sizes = [(24, 20), (7, 13)]
    resized = [F.interpolate(x, size, mode=mode) for size in sizes for mode in ("nearest", "bilinear", "nearest-exact")]
    resized += [F.interpolate(x, scale_factor=1.37, mode="bilinear"), F.interpolate(x, scale_factor=1.37, mode="nearest")]
    resized += [F.interpolate(x, sizes[0], mode="bilinear", align_corners=True), F.interpolate(x, (5, 7), mode="area")]
    return torch.cat([part.flatten(1) for part in resized], 1)


def poolings(x: Tensor) -> Tensor:
    line = x.flatten(2)
    pooled = [F.max_pool2d(x, 3, 2, 1, ceil_mode=True), F.avg_pool2d(x, 3, 2, 1, True, False), F.max_pool2d(x, 2, return_indices=True)[0]]
    pooled += [F.adaptive_avg_pool2d(x, (5, 7)), F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, (3, 5)), F.adaptive_max_pool2d(x, 1)]
    pooled += [F.max_pool1d(line, 3, 2, 1), F.avg_pool1d(line, 3, 2), F.adaptive_avg_pool1d(line, 7), F.lp_pool2d(x.abs() + 0.1, 2, 3)]
    return torch.cat([part.flatten(1) for part in pooled], 1)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 8, (5, 3), 2, 3, groups=8, padding_mode="reflect")
        self.same = nn.Conv2d(8, 6, (5, 3), padding="same", dilation=(1, 2))
        self.transposed = nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2)
        self.line = nn.Conv1d(8, 6, 3, 2, groups=2)
        self.valid = nn.Conv2d(8, 6, 3, 2, padding="valid")
        self.prelu = nn.PReLU(8)

    def forward(self, x: Tensor) -> Tensor:
        grown = self.transposed(self.same(self.prelu(x)))
        windows = F.fold(F.unfold(x, 3, stride=2, padding=1), (12, 10), 3, stride=2, padding=1)
        single = F.conv2d(x, self.valid.weight, stride=[2], padding=[1], dilation=[2])
        parts = (self.grouped(x), grown, self.line(x.flatten(2)), windows, self.valid(x), self.valid(x.flip(3)[:, :, :5, :5]), single)
        return torch.cat([part.flatten(1) for part in parts], 1)


class Normalisations(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sequence = nn.Sequential(nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), nn.LayerNorm(10))
        self.running = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        self.rms = nn.RMSNorm((12, 10))
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 2, 1), nn.SiLU(), nn.Conv2d(2, 8, 1), nn.Sigmoid())
        self.scale = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.sequence(x) * self.squeeze(x) * self.scale
        scaled: Tensor = self.rms(self.running(x)) * torch.arange(10)
        return scaled


class Attentions(nn.Module):
    """PyTorch's attention module, which has a fused implementation in eval mode, and the function with all its options."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.MultiheadAttention(10, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(10, 2, 16, batch_first=True, activation="gelu")

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(1, 2)
        tokens = tokens + self.heads(tokens, tokens, tokens)[0]
        tokens = self.encoder(tokens).unflatten(1, (8, 12))
        seen = torch.arange(12)[:, None] >= torch.arange(12) - 3
        causal = F.scaled_dot_product_attention(tokens, x, x.sin(), is_causal=True)
        shared = F.scaled_dot_product_attention(tokens, x[:, :2], x[:, 2:4], enable_gqa=True, scale=0.4)
        return causal + shared + F.scaled_dot_product_attention(x, tokens, x, attn_mask=seen) + torch.einsum("nchw,ncvw->ncvh", x, x) @ x


LONG = [pytest.param(rest, marks=pytest.mark.slow) for rest in (activations, rearrangements, resizings, statistics, poolings, Attentions)]


@pytest.mark.slow
@pytest.mark.parametrize("rest", [paddings, Convolutions, Normalisations, *LONG])
def test_the_operators_of_networks_have_gradients_in_onnx(rest: Callable[[Tensor], Tensor] | type[nn.Module]) -> None:
    network = Behind(rest() if isinstance(rest, type) else rest).eval()
    graph = GradientGraph(network, ["layer"])
    inputs = random_inputs(graph, 3)
    agree(run(traced(graph), graph, inputs), graph, inputs)


class Windows(nn.Module):
    """Attention over all tokens, of three dimensions, inside windows, of five, and by heads, of four; then a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 2, 2)
        self.project = nn.Linear(8, 24)
        self.after = nn.Conv2d(8, 6, 1)
        self.fc = nn.Linear(6, 4)
        self.seen: Tensor
        self.register_buffer("seen", torch.eye(5, dtype=torch.bool) | (torch.rand(3, 1, 5, 5) > 0.4))

    def forward(self, images: Tensor) -> Tensor:
        features = self.patch(images)
        tokens = features.flatten(2).transpose(1, 2)
        query, key, value = self.project(tokens).chunk(3, -1)
        single = F.scaled_dot_product_attention(query, key, value)
        windows = self.project(single).unflatten(1, (3, 10)).unflatten(3, (3, 2, 4)).permute(3, 0, 1, 4, 2, 5)[..., ::2, :]
        query, key, value = windows.unbind(0)
        inside = F.scaled_dot_product_attention(query, key, value, self.seen).transpose(2, 3).flatten(3).flatten(1, 2)
        heads = (part.unflatten(2, (2, 4)).transpose(1, 2) for part in self.project(inside).chunk(3, -1))
        query, key, value = heads
        inside = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(inside.shape)  # a view after PyTorch's kernel
        logits: Tensor = self.fc(self.after(inside.transpose(1, 2).unflatten(2, (3, 5))).mean((2, 3)))
        return logits


class Assignments(nn.Module):
    """Assigns to parts of a tensor, as relative positions in attention do, before the layer and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.after, self.fc = nn.Conv2d(3, 6, 2, 2), nn.Conv2d(6, 6, 1), nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images)
        x[:, :, 1:, 1:] = x[:, :, 1:, 1:] + x[:, :, :-1, :1]
        x = self.after(x)
        x[:, 2] = 0.5
        x[:, 3:, ::2] *= 1.5
        logits: Tensor = self.fc(x.relu_().mean((2, 3)))
        return logits


@pytest.mark.slow
@pytest.mark.parametrize(
    "graph",
    [
        FeatureGraph(Assignments().eval(), ["after"]),
        GradientGraph(Assignments().eval(), ["after"]),
    ],
    ids=["features", "gradients"],
)
def test_assignments_to_parts_of_a_tensor(graph: FeatureGraph | GradientGraph) -> None:
    agree_with_the_graph(graph)


@pytest.mark.slow
@pytest.mark.parametrize(
    "graph", [FeatureGraph(Windows().eval(), ["after"]), GradientGraph(Windows().eval(), ["after"])], ids=["features", "gradients"]
)
def test_attention_over_other_than_four_dimensions_before_the_layer(graph: FeatureGraph | GradientGraph) -> None:
    agree_with_the_graph(graph)


def agree_with_the_graph(graph: FeatureGraph | GradientGraph) -> None:
    """Compare the results of the graph's program in ONNX Runtime with those of the graph."""
    inputs: tuple[Tensor, ...] = (torch.rand(5, 3, 12, 10),) if isinstance(graph, FeatureGraph) else random_inputs(graph, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = trace.traced_program(graph, inputs, (BATCH,) * len(inputs))
    inputs = tuple(tensor[:3] for tensor in inputs)
    for ours, theirs in zip(run(program, graph, inputs), graph(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-5 * float(theirs.detach().abs().max()))
