"""The callback in the real Trainer of PyTorch Lightning, from both of its packages."""

from __future__ import annotations

import copy
import csv
import importlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import kdx
from kdx.callbacks import LightningProbe
from kdx.errors import KdxError
from tests.callbacks.small import IMAGES, LABELS, Classifier

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but"),
]

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def probe(*layers: str) -> kdx.Probe:
    return kdx.Probe(Classifier(1), Classifier(2), IMAGES, LABELS, [LAYERS | {"student": layer} for layer in layers])


LAYERS = {"base": "second", "teacher": "second"}


def module(package: Any, seed: int = 0) -> Any:
    class Training(package.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.network = Classifier(seed)
            self.rows: list[dict[str, float]] = []

        def forward(self, images: torch.Tensor) -> Any:
            return self.network(images)

        def training_step(self, batch: Any, _index: int) -> Any:
            return functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, _index: int) -> None:
            self.log("validation_loss", functional.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

    return Training()


def fitted(package: Any, folder: Path, callbacks: list[Any], *, validate: bool = True) -> tuple[Any, Any, list[dict[str, str]]]:
    """A Trainer after three epochs, its module, and the rows of its log that have scores."""
    torch.manual_seed(5)
    trained = module(package)
    logger = importlib.import_module(f"{package.__name__}.loggers").CSVLogger(folder)
    trainer = package.Trainer(
        max_epochs=3, accelerator="cpu", callbacks=callbacks, logger=logger, log_every_n_steps=1, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    batches = DataLoader(TensorDataset(IMAGES, LABELS), 8, shuffle=True)
    trainer.fit(trained, batches, DataLoader(TensorDataset(IMAGES, LABELS), 8) if validate else None)
    path = Path(logger.log_dir) / "metrics.csv"
    rows = list(csv.DictReader(io.StringIO(path.read_text()))) if path.exists() else []
    return trainer, trained, [row for row in rows if any("FSS" in name and value for name, value in row.items())]


def recorder(package: Any, scores: list[dict[str, float]], of: kdx.Probe) -> Any:
    """A callback that computes the scores itself at the end of every epoch."""

    class Recorder(package.Callback):  # type: ignore[misc]
        def on_train_epoch_end(self, _trainer: Any, pl_module: Any) -> None:
            scores.append(of(pl_module.network).row())

    return Recorder()


@pytest.mark.parametrize("name", PACKAGES)
@pytest.mark.parametrize("stage", ["train", "validation"])
def test_the_logged_scores_are_those_of_the_probe_and_the_weights_are_those_without_it(name: str, stage: Any, tmp_path: Path) -> None:
    package = importlib.import_module(name)
    expected = list[dict[str, float]]()
    callback = LightningProbe(probe("second"), "network", stage=stage, prefix="probe/")
    trainer, trained, rows = fitted(package, tmp_path / "with", [callback, recorder(package, expected, probe("second"))])
    assert isinstance(callback, package.Callback) and len(rows) == len(expected) == 3
    for row, scores in zip(rows, expected, strict=True):
        logged = {key.removeprefix("probe/"): float(value) for key, value in row.items() if key.startswith("probe/")}
        assert logged == {key: float(np.float32(value)) for key, value in scores.items()}  # Lightning logs in float32
    assert len({row["probe/second/FSS(S,T)"] for row in rows}) == 3
    assert "probe/second/FSS(S,T)" in trainer.callback_metrics
    _, without, _ = fitted(package, tmp_path / "without", [])
    for key, tensor in without.state_dict().items():
        assert torch.equal(trained.state_dict()[key], tensor), key


def test_the_lightning_module_itself_is_the_student_by_default(tmp_path: Path) -> None:
    package = importlib.import_module("lightning.pytorch")
    trainer, trained, rows = fitted(package, tmp_path, [LightningProbe(probe("network.second"))], validate=False)
    expected = {f"network.{key}": value for key, value in probe("second")(trained.network).row().items()}
    assert {key: float(rows[-1][key]) for key in expected} == {key: float(np.float32(value)) for key, value in expected.items()}
    assert trained.trainer is trainer


def test_a_checkpoint_may_be_chosen_by_a_score(tmp_path: Path) -> None:
    package = importlib.import_module("lightning.pytorch")
    checkpoint = package.callbacks.ModelCheckpoint(tmp_path / "best", monitor="second/FSS(S,T)", mode="max")
    _, _, rows = fitted(package, tmp_path, [LightningProbe(probe("second"), "network", stage="validation"), checkpoint])
    assert checkpoint.best_model_score.item() == max(float(np.float32(row["second/FSS(S,T)"])) for row in rows)


def test_a_wrong_name_is_an_error_and_a_callback_can_be_copied(tmp_path: Path) -> None:
    package = importlib.import_module("lightning.pytorch")
    with pytest.raises(KdxError, match="Training has no module 'student'"):
        fitted(package, tmp_path, [LightningProbe(probe("second"), "student")])
    with pytest.raises(ValueError, match="stage must be"):
        LightningProbe(probe("second"), stage="test")  # type: ignore[arg-type]
    callback = LightningProbe(probe("second"), "network")
    for duplicate in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert type(duplicate) is type(callback)
