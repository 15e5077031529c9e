"""The steps of recurrent layers that an export of gradients unrolls."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from kdx.errors import KdxError
from kdx.export import onnx_file, recurrence
from kdx.export.description import Origin
from kdx.export.graphs import GradientGraph


class Head(nn.Module):
    """A convolution whose columns are the steps of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, (4, 1))
        self.cells = nn.RNN(5, 6, batch_first=True)
        self.fc = nn.Linear(6, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.cells(self.conv(images).mean(2).transpose(1, 2))[0].mean(1))
        return logits


class Only(nn.Module):
    def __init__(self, cells: nn.RNNBase) -> None:
        super().__init__()
        self.cells = cells

    def forward(self, sequence: Tensor) -> Tensor:
        result: Tensor = self.cells(sequence)[0]
        return result


def nodes(cells: nn.RNNBase, *shape: int) -> list[fx.Node]:
    """The operators of a recurrent layer."""
    return list(torch.export.export(Only(cells), (torch.rand(shape),)).graph.nodes)


def test_an_export_of_gradients_refuses_too_many_steps_and_leaves_no_file(tmp_path: Path) -> None:
    graph = GradientGraph(Head(), ["conv"])
    with pytest.raises(KdxError, match="through RNN 'cells' cannot be exported: recurrent layers run 129 steps"):
        onnx_file.write(graph, tmp_path / "file.onnx", origin=Origin("a:network", ""), image_size=(8, 129))
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:The tensor attribute")
@pytest.mark.parametrize(
    ("cells", "shape", "steps", "kind"),
    [
        (nn.LSTM(3, 2, batch_first=True, num_layers=3), (2, 50, 3), 150, "LSTM"),
        (nn.GRU(3, 2, bidirectional=True), (70, 2, 3), 140, "GRU"),
        (nn.RNN(3, 2, nonlinearity="relu"), (200, 2, 3), 200, "RNN"),
    ],
    ids=["LSTM", "GRU", "RNN"],
)
def test_steps_are_counted_over_layers_and_directions(cells: nn.RNNBase, shape: tuple[int, ...], steps: int, kind: str) -> None:
    with pytest.raises(KdxError, match=f"{kind} .* run {steps} steps"):
        recurrence.check_steps(nodes(cells, *shape))


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_many_steps_are_announced_and_few_are_not(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="kdx"):
        recurrence.check_steps(nodes(nn.GRU(3, 2, batch_first=True), 100, 4, 3))
        assert "unrolling" not in caplog.text
        recurrence.check_steps(nodes(nn.GRU(3, 2, batch_first=True), 4, 100, 3))
    assert "unrolling 100 steps" in caplog.text
