"""Traced programs against the eager graphs: in ONNX Runtime, at sizes they were not traced with; what tracing leaves alone and refuses."""

from __future__ import annotations

import contextlib
import copy
import io
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from kdx.errors import KdxError
from kdx.export import trace
from kdx.export.graphs import FeatureGraph, GradientGraph, Preprocessing
from kdx.models.resnet import resnet

TOLERANCE = 1e-5
"""Of an output's largest value: float32 sums in another order."""

BATCH = {0: Dim("batch")}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Behind(nn.Module):
    """A layer, and what stands behind it."""

    def __init__(self, rest: Callable[[Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, channels, 3, padding=1)
        self.rest = rest
        with torch.no_grad():
            found = rest.eval()(torch.rand(2, channels, 12, 10)) if isinstance(rest, nn.Module) else rest(torch.rand(2, channels, 12, 10))
        self.fc = nn.Linear(found.flatten(1).shape[1], 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.rest(self.layer(images)).flatten(1))
        return logits


def given(graph: GradientGraph, n: int, size: tuple[int, int] = (12, 10)) -> tuple[Tensor, Tensor]:
    images = torch.rand(n, 3, *size)
    with torch.no_grad():
        logits, raw = graph.watch(images)
        end = logits if graph.at is None else graph.as_map(raw[graph.at], graph.at, images)
    return images, torch.randn(end.shape)


def traced(graph: GradientGraph, size: tuple[int, int] = (12, 10)) -> ExportedProgram:
    """Quiet: torch.export warns of its own deprecated calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trace.program(graph, given(graph, 5, size), (BATCH, BATCH))


def run(program: ExportedProgram, graph: GradientGraph, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What ONNX Runtime makes of the program."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        file = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=list(graph.input_names), output_names=list(graph.output_names)
        )
    assert file is not None
    session = onnxruntime.InferenceSession(file.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {name: tensor.numpy() for name, tensor in zip(graph.input_names, inputs, strict=True)}
    return [torch.from_numpy(found) for found in session.run(None, feeds)]


def agree(found: Sequence[Tensor], graph: GradientGraph, inputs: tuple[Tensor, Tensor], tolerance: float = TOLERANCE) -> None:
    expected = graph(*inputs)
    assert len(found) == len(expected) == len(graph.output_names)
    for name, ours, theirs in zip(graph.output_names, found, expected, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, name
        off, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
        assert off <= tolerance * largest, f"{name}: {off} of {largest}"
    assert all(bool(gradient.any()) for gradient in expected[1 + len(graph.layers) :])


def in_pytorch(graph: GradientGraph, tolerance: float = TOLERANCE, size: tuple[int, int] = (12, 10)) -> ExportedProgram:
    """The program, after it gave the eager graph's numbers at another batch size."""
    program = traced(graph, size)
    inputs = given(graph, 3, size)
    agree(program.module()(*inputs), graph, inputs, tolerance)
    return program


# ---- what networks are made of ----


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
    return torch.cat([each.flatten(1) for each in resized], 1)


def poolings(x: Tensor) -> Tensor:
    line = x.flatten(2)
    pooled = [F.max_pool2d(x, 3, 2, 1, ceil_mode=True), F.avg_pool2d(x, 3, 2, 1, True, False), F.max_pool2d(x, 2, return_indices=True)[0]]
    pooled += [F.adaptive_avg_pool2d(x, (5, 7)), F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, (3, 5)), F.adaptive_max_pool2d(x, 1)]
    pooled += [F.max_pool1d(line, 3, 2, 1), F.avg_pool1d(line, 3, 2), F.adaptive_avg_pool1d(line, 7), F.lp_pool2d(x.abs() + 0.1, 2, 3)]
    return torch.cat([each.flatten(1) for each in pooled], 1)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 8, (5, 3), 2, 3, groups=8, padding_mode="reflect")
        self.same = nn.Conv2d(8, 6, (5, 3), padding="same", dilation=(1, 2))
        self.transposed = nn.ConvTranspose2d(6, 4, 3, 2, 1, 1, groups=2)
        self.line = nn.Conv1d(8, 6, 3, 2, groups=2)
        self.prelu = nn.PReLU(8)

    def forward(self, x: Tensor) -> Tensor:
        grown = self.transposed(self.same(self.prelu(x)))
        windows = F.fold(F.unfold(x, 3, stride=2, padding=1), (12, 10), 3, stride=2, padding=1)
        return torch.cat([each.flatten(1) for each in (self.grouped(x), grown, self.line(x.flatten(2)), windows)], 1)


class Normalisations(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.each = nn.Sequential(nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), nn.LayerNorm(10))
        self.running = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        self.rms = nn.RMSNorm((12, 10))
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 2, 1), nn.SiLU(), nn.Conv2d(2, 8, 1), nn.Sigmoid())
        self.scale = nn.Parameter(torch.rand(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.each(x) * self.squeeze(x) * self.scale
        found: Tensor = self.rms(self.running(x)) * torch.arange(10)
        return found


class Attentions(nn.Module):
    """Heads of torch's own module, whose eval mode has a fused path, and the function with each of its options."""

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


@pytest.mark.parametrize("rest", [paddings, Convolutions, Normalisations, *LONG])
def test_what_networks_are_made_of_has_a_gradient_in_onnx(rest: Callable[[Tensor], Tensor] | type[nn.Module]) -> None:
    network = Behind(rest() if isinstance(rest, type) else rest).eval()
    graph = GradientGraph(network, ["layer"])
    inputs = given(graph, 3)
    agree(run(traced(graph), graph, inputs), graph, inputs)


# ---- what tracing leaves alone ----


def operators(program: ExportedProgram) -> Counter[str]:
    return Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")


class Transformer(nn.Module):
    """A class token and 3 x 2 patches; blocks of layer normalisation, attention and a multilayer perceptron."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.blocks = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True) for _ in range(blocks)))
        self.fc = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch(images).flatten(2).transpose(1, 2)
        logits: Tensor = self.fc(self.blocks(torch.cat([self.token.expand(images.shape[0], -1, -1), patches], 1))[:, 0])
        return logits


def test_tokens_lose_their_class_token_and_what_stands_before_the_layer_stays_whole() -> None:
    """One block before the layer's end: its attention and normalisations are single operators still."""
    graph = GradientGraph(Transformer().eval(), ["blocks.0"])
    found = operators(in_pytorch(graph, size=(12, 8)))
    assert found["aten.scaled_dot_product_attention.default"] == 1
    assert found["aten.layer_norm.default"] == 2
    assert graph(*given(graph, 3, (12, 8)))[2].shape == (3, 8, 3, 2)


@pytest.mark.parametrize("layer", ["layer1", "layer2"])
def test_weights_get_no_gradient_and_nothing_before_the_layer_is_differentiated(layer: str) -> None:
    """Each convolution behind the layer is there twice, forward and for its input's gradient; each before it once."""
    network = resnet(4, 1, 4).eval()
    seen: list[str] = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _inputs, _output, name=name: seen.append(name))
    network(torch.rand(1, 3, 12, 10))
    for module in network.modules():
        module._forward_hooks.clear()
    behind = sum(name.startswith("layer") and name.split(".")[0] > layer for name in seen)
    found = operators(in_pytorch(GradientGraph(network, [layer])))
    assert sum(count for name, count in found.items() if "conv" in name) == len(seen) + behind


class Branches(nn.Module):
    """Two branches side by side of a stem, one that has two parts and one that gives a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.left = nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3))
        self.right = Pair()
        self.fc = nn.Linear(10, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        one, two = self.right(features)
        logits: Tensor = self.fc(torch.cat([self.left(features).mean((2, 3)) * one.mean((2, 3)), two.amax((2, 3))], 1))
        return logits


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(6, 4, 1), nn.Conv2d(6, 6, 2)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(features), self.two(features).sigmoid()


@pytest.mark.parametrize(
    "layers",
    [
        ["left", "right[1]", "left.0"],
        ["left.0", "left.2", "left"],
        ["right[1]", "right[0]", "right.one"],
        ["stem", "left.1", "right.two", "right[1]", "left"],
    ],
)
def test_several_layers_in_any_order_nested_and_side_by_side(layers: list[str]) -> None:
    in_pytorch(GradientGraph(Branches().eval(), layers))


def test_layers_and_their_parts_of_a_residual_network_towards_a_feature() -> None:
    network = resnet(4, (1, 2, 1), 4).eval()
    in_pytorch(GradientGraph(network, ["layer2.1", "layer1", "layer2"], at="layer3"))
    in_pytorch(GradientGraph(network, ["layer1.0"], Preprocessing(None, (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)), at="layer1"))


def test_in_place_operators_change_no_feature_and_no_gradient() -> None:
    def rest(x: Tensor) -> Tensor:
        y = x.mul_(2).add_(x.mean((2, 3), keepdim=True))
        y[:, 1:3] *= 3
        y += y.flip(3)
        y[:, 7].mul_(0.5)
        y[:, 5] = y[:, 6].sub(0.1).tanh_()
        return F.leaky_relu_(y.sub_(0.3))

    in_pytorch(GradientGraph(Behind(rest).eval(), ["layer"]))


class Twice(nn.Module):
    """One module called twice, with another between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)
        self.shared = nn.Conv2d(5, 5, 3, padding=1)
        self.between = nn.Conv2d(5, 5, 1)
        self.fc = nn.Linear(5, 4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.between(self.shared(self.stem(images)).relu()).tanh()
        logits: Tensor = self.fc((features + self.shared(features).relu()).mean((2, 3)))
        return logits


@pytest.mark.parametrize("layers", [["shared"], ["shared", "between"], ["stem", "shared"]])
def test_a_module_called_twice_answers_for_its_last_call(layers: list[str]) -> None:
    in_pytorch(GradientGraph(Twice().eval(), layers))


class Skip(nn.Module):
    """A dropout, which in eval mode gives on the very tensor that it was given, beside a path around it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3)
        self.drop = nn.Dropout()
        self.fc = nn.Linear(5, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        logits: Tensor = self.fc((self.drop(features).square() + features.exp()).mean((2, 3)))
        return logits


@pytest.mark.parametrize("layers", [["drop"], ["stem", "drop"]])
def test_a_layer_that_changes_nothing_answers_for_no_path_around_it(layers: list[str]) -> None:
    graph = GradientGraph(Skip().eval(), layers)
    in_pytorch(graph)
    images, cotangent = given(graph, 3)
    results = dict(zip(graph.output_names, graph(images, cotangent), strict=True))
    feature = results["drop"]
    expected = 2 * feature * (cotangent @ graph.network.fc.weight)[:, :, None, None] / feature[0, 0].numel()  # type: ignore[union-attr, operator]
    torch.testing.assert_close(results["gradient/drop"], expected.detach())


@pytest.mark.parametrize(
    ("dtype", "network", "layer"), [(torch.float16, lambda: resnet(4, 1, 4), "layer2"), (torch.bfloat16, Transformer, "blocks.0")]
)
def test_networks_in_half_precision_are_as_near_the_truth_as_eager_is(
    dtype: torch.dtype, network: Callable[[], nn.Module], layer: str
) -> None:
    """Traced in their own numbers; images, features and gradients are float32."""
    graph = GradientGraph(network().to(dtype).eval(), [layer])
    program, inputs = traced(graph, (12, 8)), given(graph, 3, (12, 8))
    exact = GradientGraph(copy.deepcopy(graph.network).double(), [layer])(*(each.double() for each in inputs))
    for ours, eager, truth in zip(program.module()(*inputs), graph(*inputs), exact, strict=True):
        assert ours.dtype == eager.dtype == torch.float32
        assert (ours - truth).norm() <= 1.5 * (eager - truth).norm() + torch.finfo(dtype).eps * truth.norm()


def test_height_and_width_are_dynamic_where_images_are_resized() -> None:
    graph = GradientGraph(resnet(4, 1, 4).eval(), ["layer2"], Preprocessing((14, 11)))
    free = BATCH | {2: Dim("height"), 3: Dim("width")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = trace.program(graph, given(graph, 5, (17, 23)), (free, BATCH))
    for n, size in ((3, (9, 31)), (2, (14, 11)), (7, (40, 19))):
        inputs = given(graph, n, size)
        agree(program.module()(*inputs), graph, inputs)


# ---- what is refused ----


def test_the_graph_of_features_alone_is_traced_as_it_is() -> None:
    graph = FeatureGraph(resnet(4, 1, 4).eval(), ["layer2"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = trace.program(graph, (torch.rand(5, 3, 12, 10),), (BATCH,))
    images = torch.rand(3, 3, 12, 10)
    for ours, theirs in zip(program.module()(images), graph(images), strict=True):
        torch.testing.assert_close(ours, theirs)


class Distances(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x.flatten(2), x.flatten(2).sin())


class Dynamic(nn.Module):
    """A convolution whose kernel is reckoned from the image."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.kernel(x.mean((0, 2, 3)))
        return F.conv2d(x, kernel[:, None, None, None].expand(-1, 8, 1, 1))


@pytest.mark.parametrize(
    ("module", "operator"),
    [
        (Distances(), "aten._cdist_backward"),
        (nn.LocalResponseNorm(3), "aten.avg_pool3d_backward"),
        (nn.AdaptiveMaxPool2d((5, 7)), "aten.adaptive_max_pool2d_backward"),
        (Dynamic(), "aten.convolution_backward"),
    ],
)
def test_an_operator_without_a_form_is_named_with_its_module(module: nn.Module, operator: str) -> None:
    network = Behind(nn.Sequential(nn.ReLU(), nn.Sequential(module, nn.Tanh()))).eval()
    with pytest.raises(KdxError) as caught:
        traced(GradientGraph(network, ["layer"]))
    assert operator in caught.value.problem and "of rest.1.0" in caught.value.problem


def test_what_is_not_differentiated_needs_no_derivative() -> None:
    """The same operators before the layer: only those without a forward form are refused."""
    network = nn.Sequential(nn.LocalResponseNorm(2), nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4)).eval()
    in_pytorch(GradientGraph(network, ["1"]))


class Ends(nn.Module):
    def __init__(self, forward: Callable[[Ends, Tensor], object]) -> None:
        super().__init__()
        self.layer, self.aside, self.fc = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 3), nn.Linear(5, 4)
        self.ends = forward

    def forward(self, images: Tensor) -> object:
        return self.ends(self, images)


def test_a_layer_that_the_prediction_does_not_depend_on_is_named() -> None:
    def forward(net: Ends, x: Tensor) -> Tensor:
        net.aside(x)
        return net.fc(net.layer(x).mean((2, 3)))  # type: ignore[no-any-return]

    for layers in (["aside"], ["layer", "aside"]):
        with pytest.raises(KdxError, match="does not depend on layer 'aside'"):
            traced(GradientGraph(Ends(forward).eval(), layers))


def test_a_cotangent_before_the_layer_is_refused() -> None:
    with pytest.raises(KdxError, match="layer1 does not depend on layer 'layer2'"):
        traced(GradientGraph(resnet(4, 1, 4).eval(), ["layer2"], at="layer1"))
    with pytest.raises(KdxError, match="both at layer 'layer1'"):
        GradientGraph(resnet(4, 1, 4), ["layer1"], at="layer1")


def test_whole_numbers_are_no_logits() -> None:
    graph = GradientGraph(Ends(lambda net, x: net.layer(x).mean((2, 3)).topk(4).indices).eval(), ["layer"])
    with warnings.catch_warnings(), pytest.raises(KdxError, match=r"does not return logits"):
        warnings.simplefilter("ignore")
        trace.program(graph, (torch.rand(5, 3, 12, 10), torch.rand(5, 4)), (BATCH, BATCH))


def test_a_path_that_the_image_decides_is_refused() -> None:
    def forward(net: Ends, x: Tensor) -> Tensor:
        features = net.layer(x)
        return net.fc((features if features.sum() > 0 else -features).mean((2, 3)))  # type: ignore[no-any-return]

    with pytest.raises(Exception, match=r"(?s)data-dependent"):
        traced(GradientGraph(Ends(forward).eval(), ["layer"]))


def test_a_cotangent_of_another_shape_is_refused() -> None:
    graph = GradientGraph(resnet(4, 1, 4).eval(), ["layer2"])
    with warnings.catch_warnings(), pytest.raises(KdxError, match="The cotangent has shape"):
        warnings.simplefilter("ignore")
        trace.program(graph, (torch.rand(5, 3, 12, 10), torch.rand(5, 7)), (BATCH, BATCH))
