"""The callback in the real Trainer of Hugging Face transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import kdx
from kdx.callbacks import HuggingFaceProbe
from kdx.errors import KdxError
from tests.callbacks.small import IMAGES, LABELS

pytestmark = pytest.mark.slow

transformers = pytest.importorskip("transformers")

LAYER = "vit.layers.0"


def classifier(seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4, num_labels=3,
        hidden_dropout_prob=0.1,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def trainer(folder: Path, model: Any = None) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder), num_train_epochs=3, per_device_train_batch_size=8, learning_rate=0.01, use_cpu=True, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, seed=5,
    )  # fmt: skip
    images = [{"pixel_values": image, "labels": label} for image, label in zip(IMAGES, LABELS, strict=True)]
    return transformers.Trainer(model or classifier(0), arguments, train_dataset=images)


def test_the_logged_scores_are_those_of_the_probe_and_the_weights_are_those_without_it(tmp_path: Path) -> None:
    probe = kdx.Probe(classifier(1), classifier(2), IMAGES, LABELS, [LAYER])
    expected = list[dict[str, float]]()

    class Recorder(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_epoch_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            expected.append(probe(others["model"]).row())

    watched = trainer(tmp_path / "with")
    callback = HuggingFaceProbe(probe, watched.log)
    watched.add_callback(callback)
    watched.add_callback(Recorder())
    watched.train()
    assert isinstance(callback, transformers.TrainerCallback)
    name = f"{LAYER}/FSS(S,T)"
    logged = [row for row in watched.state.log_history if name in row]
    assert [row["epoch"] for row in logged] == [1, 2, 3] and len({row[name] for row in logged}) == 3
    for row, scores in zip(logged, expected, strict=True):
        assert {key: row[key] for key in scores} == scores
    without = trainer(tmp_path / "without")
    without.train()
    for key, tensor in without.model.state_dict().items():
        assert torch.equal(watched.model.state_dict()[key], tensor), key


def test_the_student_may_be_a_part_of_the_model(tmp_path: Path) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = classifier(0)

        def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> Any:
            return self.student(pixel_values=pixel_values, labels=labels)

    watched = trainer(tmp_path, Wrapper())
    probe = kdx.Probe(None, classifier(2), IMAGES, LABELS, [LAYER])
    watched.add_callback(HuggingFaceProbe(probe, watched.log, "student", prefix="probe/"))
    watched.train()
    expected = probe(watched.model.student).row("probe/")
    last = [row for row in watched.state.log_history if f"probe/{LAYER}/RS(S)" in row][-1]
    assert {key: last[key] for key in expected} == expected
    watched.add_callback(HuggingFaceProbe(probe, watched.log, "teacher"))
    with pytest.raises(KdxError, match="Wrapper has no module 'teacher'"):
        watched.train()
