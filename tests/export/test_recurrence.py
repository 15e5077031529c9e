"""The steps of recurrent layers that an export of gradients unrolls are counted before the trace."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

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


class Between(nn.Module):
    """Recurrent layers between two linear layers; the images are a sequence."""

    def __init__(self, *cells: nn.Module, batch_first: bool = True) -> None:
        super().__init__()
        self.before, self.cells, self.fc = nn.Linear(3, 3), nn.ModuleList(cells), nn.Linear(2, 4)
        self.batch_first = batch_first

    def forward(self, images: Tensor) -> Tensor:
        x = self.before(images.flatten(2).transpose(1, 2))
        if not self.batch_first:
            x = x.transpose(0, 1)
        x = torch.stack([self._run(cell, x) for cell in self.cells]).sum(0)
        logits: Tensor = self.fc(x.mean(1 if self.batch_first else 0))
        return logits

    def _run(self, cell: nn.Module, x: Tensor) -> Tensor:
        if isinstance(cell, nn.RNNBase):
            result: Tensor = cell(x)[0][..., :2]
            return result
        return torch.stack([cell(step) for step in x.unbind(1)], 1)


def counted(network: nn.Module, layer: str, length: int, caplog: pytest.LogCaptureFixture) -> str:
    """The error or the announcement for images of ``length`` steps."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="kdx"):
        try:
            recurrence.check_steps(GradientGraph(network.eval(), [layer]), torch.rand(2, 3, 1, length))
        except KdxError as error:
            return error.problem
    return caplog.text


def test_an_export_of_gradients_refuses_too_many_steps_before_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "_exported", lambda *_: pytest.fail("traced"))
    graph = GradientGraph(Head(), ["conv"])
    with pytest.raises(
        KdxError, match="through RNN 'cells' cannot be exported: recurrent layers run 129 steps, which would take up to 6 minutes"
    ):
        onnx_file.write(graph, tmp_path / "file.onnx", origin=Origin("a:network", ""), image_size=(8, 129))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("network", "length", "steps", "kind"),
    [
        (Between(nn.LSTM(3, 2, batch_first=True, num_layers=3)), 50, 150, "LSTM"),
        (Between(nn.GRU(3, 2, bidirectional=True), batch_first=False), 70, 140, "GRU"),
        (Between(nn.RNN(3, 2, nonlinearity="relu", batch_first=True), nn.RNN(3, 2, batch_first=True)), 100, 200, "RNN"),
        (Between(nn.GRUCell(3, 2)), 130, 130, "GRUCell"),
    ],
    ids=["LSTM", "GRU", "two", "cell"],
)
def test_steps_are_counted_over_layers_directions_and_calls(
    network: nn.Module, length: int, steps: int, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    message = counted(network, "before", length, caplog)
    assert f"Gradients through {kind} 'cells.0'" in message and f"run {steps} steps" in message


def test_only_steps_behind_the_layer_count(caplog: pytest.LogCaptureFixture) -> None:
    network = Between(nn.LSTM(3, 2, batch_first=True))
    assert "run 300 steps" in counted(network, "before", 300, caplog)
    assert counted(network, "cells.0[0]", 300, caplog) == ""


def test_many_steps_are_announced_and_few_are_not(caplog: pytest.LogCaptureFixture) -> None:
    network = Between(nn.GRU(3, 2, batch_first=True))
    message = counted(network, "before", 100, caplog)
    assert "unrolling 100 steps" in message and "up to 300 s" in message and "WARNING" in message
    assert counted(network, "before", 4, caplog) == ""
