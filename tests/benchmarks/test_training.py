"""The speed of training is what the benchmark says that it is, and each variant is compared with its own loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import training


def test_the_speed_is_that_of_thirty_epochs() -> None:
    images, first, later = 120, 20.0, (4.0, 5.0, 30.0)  # seconds per epoch
    epochs = [(0.5, images / seconds) for seconds in (first, *later)]
    assert training.speed_of_a_training(epochs) == pytest.approx(30 * images / (20 + 29 * 5))


def test_ratios_are_taken_round_by_round_to_the_loop_with_the_same_images() -> None:
    speeds = {
        training.CAREFUL: [10.0, 20.0],
        "kdx": [15.0, 40.0],
        training.CAREFUL_MIRRORED: [5.0],
        training.MIRRORED: [6.0],
        training.USUAL: [],
    }
    size = training._figures(64, 32, speeds)
    assert size["variants"]["kdx"]["ratio"] == pytest.approx([1.625, 1.75, 1.875])
    assert size["variants"][training.MIRRORED]["ratio"] == pytest.approx([1.2] * 3)
    assert training.USUAL not in size["variants"]  # not measured yet
    assert [cells[1:] for cells in training.rows([size])][:2] == [
        (training.CAREFUL, "15.0", "1"), ("kdx", "27.5", "1.75 (1.62 to 1.88)"),
    ]  # fmt: skip


def test_the_table_of_the_docs_shows_the_stored_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "RESULTS", tmp_path)
    assert training.markdown() == "No result is stored.\n"
    sizes = [training._figures(64, 32, {training.CAREFUL: [10.0], "kdx": [15.0]})]
    environment = {"processor": "a processor", "threads": 2, "torch": "2.9"}
    (tmp_path / "training.json").write_text(json.dumps({"sizes": sizes, "environment": environment, "commit": "abc"}))
    assert "| 64 | kdx | 15.0 | 1.50 (1.50 to 1.50) |" in training.markdown()
    assert "a processor, 2 threads, PyTorch 2.9; commit abc." in training.markdown()
