"""The runtime eager: gradients, float64 and the mode of the network."""

from __future__ import annotations

import torch
from torch import nn

from kdx.export.graphs import GradientGraph, Preprocessing
from kdx.runtimes.eager import EagerRunner
from tests.runtimes.small_network import CPU, Small, graph, images


def test_eager_runs_a_graph_of_gradients(network: nn.Module) -> None:
    gradients = GradientGraph(network, ["conv2"], Preprocessing())
    with EagerRunner(gradients, CPU) as runner:
        actual = runner.run({"cotangent": torch.eye(5)[:4], "images": images(4)})
    assert list(actual) == ["logits", "conv2", "gradient/conv2"] and not any(output.requires_grad for output in actual.values())
    pixels = images(4)
    feature = network.get_submodule("conv2")(network.get_submodule("norm")(network.get_submodule("conv1")(pixels)).relu())
    feature = feature.detach().requires_grad_()
    network.get_submodule("fc")(feature.relu().mean((2, 3))).diagonal().sum().backward()
    assert feature.grad is not None
    torch.testing.assert_close(actual["gradient/conv2"], feature.grad)


def test_a_network_in_float64_runs_in_eager_on_float32_images() -> None:
    torch.manual_seed(0)
    wide = Small().double()
    actual = EagerRunner(graph(wide), CPU).infer(images(3))
    assert actual.logits.dtype == torch.float64
    with torch.no_grad():
        torch.testing.assert_close(actual.logits, graph(wide.eval())(images(3).double())[0])


def test_a_runner_evaluates_even_a_graph_in_training_mode(network: nn.Module) -> None:
    training = graph(network).train()
    actual = EagerRunner(training, CPU).infer(images(5))
    with torch.no_grad():
        assert torch.equal(actual.logits, graph(network.eval())(images(5))[0])
