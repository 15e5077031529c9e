"""Evaluations of runs: values, files, resuming, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import stats

import kdx
from kdx.disk import write_atomic
from kdx.errors import KdxError
from kdx.evaluate import evaluate as module
from kdx.evaluate.candidates import at_image_size
from kdx.evaluate.cost import Costs, affordable
from kdx.evaluate.evaluate import evaluate
from kdx.evaluate.localisation import energy, iou_curves
from kdx.evaluate.metrics import Metric
from kdx.evaluate.registry import METRICS
from kdx.runs import schema
from kdx.runs.evaluation import mean_interval, read_evaluation
from kdx.runs.record import read_run
from tests.made_runs import edit
from tests.runs.small_run import CLASSES

OTHER = {"base": "student", "student": "base"}


def silent(line: str) -> None: ...


@pytest.fixture(scope="session")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Masks of 20 of the 29 pictures of 17 x 14, by the names of the pictures."""
    folder = tmp_path_factory.mktemp("masks")
    rng = np.random.default_rng(5)
    for number in range(20):
        mask = np.zeros((14, 17), np.uint8)
        top, left = rng.integers(0, 7), rng.integers(3, 8)
        mask[top : top + 6, left : left + 5] = 255
        path = folder / CLASSES[number % 3] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(mask).save(path)
    return folder


@pytest.fixture
def made_masks(tmp_path: Path) -> Path:
    folder = tmp_path / "masks"
    folder.mkdir()
    for number in range(10):
        mask = np.zeros((32, 32), np.uint8)
        mask[number : number + 12, 8:20] = 1
        Image.fromarray(mask).save(folder / f"image-{number:05d}.png")
    return folder


def test_values_are_the_definitions_on_the_stored_maps(made: Path, made_masks: Path) -> None:
    lines: list[str] = []
    result = evaluate(made, masks=made_masks, metrics=["energy", "iou"], maps=["RS(S) - RS(B)", "uniform"], announce=lines.append)
    assert any("2 of 12 images without a mask" in line and "image-00010" in line for line in lines)
    run = kdx.open_run(made)
    marked = np.stack([np.asarray(Image.open(made_masks / f"image-{number:05d}.png")) > 0 for number in range(10)])
    seen = at_image_size(run.maps("layer3", "rs_student_minus_base")[:10], (32, 32))
    values = run.number("layer3/rs_student_minus_base/energy")
    assert np.allclose(values[:10], energy(seen, marked)) and np.isnan(values[10:]).all()
    assert np.allclose(run.number("uniform/energy")[:10], 144 / 1024)
    curves = iou_curves(seen, marked)
    assert np.allclose(run.number("layer3/rs_student_minus_base/iou[per image]")[:10], curves.max(1))
    (measured,) = [m for m in result.of("energy", "layer3") if m.layer]
    expected = stats.bootstrap((values[:10],), np.mean, rng=np.random.default_rng(0), method="percentile").confidence_interval
    assert measured.value == pytest.approx(values[:10].mean()) and measured.n == 10
    assert measured.interval == pytest.approx(tuple(expected), abs=0.04)
    best = next(m for m in result.of("iou", "layer3") if m.layer)
    assert best.value == pytest.approx(curves.mean(0).max())
    assert run.sorted("layer3/rs_student_minus_base/energy").images[0] == f"image-{int(np.nanargmax(values)):05d}"
    assert run[0].layers["layer3"].numbers["rs_student_minus_base/energy"] == values[0]


def test_paired_difference(made: Path, made_masks: Path) -> None:
    result = evaluate(made, masks=made_masks, metrics=["energy"], maps=["rs_student", "centre"], announce=silent)
    first, second = result.of("energy", "layer3")
    a, b = (result.values[m.number][:10] for m in (first, second))
    value, (low, high) = result.difference(first, second)
    expected = stats.ttest_rel(a, b).confidence_interval(result.confidence)
    assert value == pytest.approx((a - b).mean()) and (low, high) == pytest.approx((expected.low, expected.high))


def test_intervals() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=25)
    expected = stats.t.interval(0.9, 24, loc=values.mean(), scale=stats.sem(values))
    assert mean_interval(values, 0.9)[1] == pytest.approx(expected)
    low, high = mean_interval(np.ones(10), 0.95, hits=True)[1]  # Wilson: n / (n + z^2)
    assert (low, high) == pytest.approx((10 / (10 + stats.norm.ppf(0.975) ** 2), 1))
    assert mean_interval(np.ones(10), 0.95) == (1, (1, 1))
    assert np.isnan(mean_interval(np.empty(0), 0.95)[0]) and np.isnan(mean_interval(np.ones(1), 0.95)[1]).all()


def test_grad_cam_and_its_difference(explained: Path, folder: Path, masks: Path) -> None:
    """The maps of the run's networks are those of kdx.grad_cam for the labels; pixels and masks are those of the run."""
    models = folder / "models.toml"
    names = ["grad_cam_student", "hires_cam_student", "grad_cam_student_minus_base"]
    evaluate(explained, masks=masks, models=models, metrics=["energy"], maps=names, announce=silent)
    run = kdx.open_run(explained)
    images = [index for index, value in enumerate(run.number("layer3/grad_cam_student/energy")) if np.isfinite(value)]
    assert len(images) == 20
    files = [folder / "pictures" / run.images[index] for index in images]
    labels = [run[index].label for index in images]
    cropped = [np.asarray(Image.open(masks / run.images[index]).resize((15, 12), Image.Resampling.BILINEAR)) for index in images]
    marked = np.stack(cropped)[:, :, 1:13] >= 128  # a picture of 17 x 14 covers 12 x 12 as 15 x 12, cropped at its centre
    cams = {}
    for role in ("student", "base"):
        cams[role] = kdx.grad_cam(f"{models}:{role}", files, "layer3", labels).maps
    hires = kdx.hires_cam(f"{models}:student", files, "layer3", labels).maps
    shares = {role: cam / np.maximum(cam.sum((1, 2), keepdims=True), 1e-30) for role, cam in cams.items()}
    for name, maps in zip(names, (cams["student"], hires, shares["student"] - shares["base"]), strict=True):
        expected = energy(at_image_size(maps, (12, 12)), marked)
        assert np.allclose(run.number(f"layer3/{name}/energy")[images], expected, atol=1e-5)


def test_metrics_that_do_not_fit_into_the_time_are_left_out_unless_they_are_named(
    explained: Path, folder: Path, masks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run itself names its models file."""
    measured = []

    def measure(metric: Metric, *arguments: Any) -> None:
        measured.append(metric.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_measured", measure)
    for metrics, minutes, first in (((), 0, "energy"), (("insertion",), 0, "insertion"), ((), 1000, "energy")):
        lines: list[str] = []
        with pytest.raises(KeyboardInterrupt):
            evaluate(explained, masks=None if metrics else masks, metrics=metrics, max_minutes=minutes, announce=lines.append)
        assert measured.pop() == first
        left_out = [line for line in lines if line.startswith("These metrics would take too long and are left out")]
        assert len(left_out) == (not metrics and not minutes)
        if left_out:
            assert "the insertion curve" in left_out[0] and "--metric sensitivity" in left_out[0] and "energy" not in left_out[0]


def test_metrics_are_chosen_in_order_and_shared_work_counts_once() -> None:
    costs = Costs({"insertion": 5.0, "deletion": 5.0, "keep": 2.0, "remove": 2.0}, {"randomisation": 30.0, "sensitivity": 1.0})
    names = ("energy", "insertion", "deletion", "road_keep", "road_remove", "road", "randomisation", "randomisation_ssim", "sensitivity")
    metrics = [(METRICS[name], 3) for name in names]
    for limit, expected in (
        (0, {"energy"}),
        (1, {"energy", "sensitivity"}),
        (15 + 15 + 6 + 6 + 1, {*names} - {"randomisation", "randomisation_ssim"}),
        (15 + 15 + 6 + 6 + 30 + 1, {*names}),
        (15 + 15 + 6 + 5, {"energy", "insertion", "deletion", "road_keep", "sensitivity"}),
    ):
        chosen, left_out = affordable(costs, metrics, limit)
        assert {metric.name for metric in chosen} == expected and {metric.name for metric in left_out} == {*names} - expected
    assert affordable(costs, metrics, 0)[1][METRICS["insertion"]] == 15
    assert affordable(costs, [(METRICS["insertion"], 0)], 0)[0] == [METRICS["insertion"]]  # everything is measured already


def test_no_map_is_measured_after_the_time_limit(explained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "affordable", lambda costs, metrics, limit: ([metric for metric, _ in metrics], {}))
    lines: list[str] = []
    stored = evaluate(explained, max_minutes=0, announce=lines.append)
    assert not [measurement for measurement in stored.measurements if measurement.metric == "insertion"]
    assert any(
        line.startswith(
            "The time limit (0 s) is reached, and metrics are incomplete. To compute them, give --metric insertion --metric deletion"
        )
        for line in lines
    )


def test_other_networks_and_other_data_are_refused(explained: Path, folder: Path, masks: Path, tmp_path: Path) -> None:
    text = (folder / "models.toml").read_text()
    (folder / "swapped.toml").write_text(re.sub("(base|student).safetensors", lambda m: f"{OTHER[m[1]]}.safetensors", text))
    other = tmp_path / "pictures"
    for name in ("cat", "dog", "owl"):
        (other / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(other / name / "1.png")
    with pytest.raises(KdxError, match="other weights"):
        evaluate(explained, masks=masks, models=folder / "swapped.toml", maps=["grad_cam_student"], announce=silent)
    with pytest.raises(KdxError, match="not the run's data"):
        evaluate(explained, masks=masks, data=str(other), announce=silent)


def test_a_run_without_networks_and_data_evaluates_its_maps(made: Path, made_masks: Path) -> None:
    lines: list[str] = []
    edit(made / "manifest.json", configuration__data="folder:gone")
    result = evaluate(made, masks=made_masks, metrics=["energy", "pointing"], announce=lines.append)
    names = {m.candidate for m in result.measurements}
    assert {"rs_student_minus_base", "distilled", "uniform", "centre"} <= names and not any("cam" in name for name in names)
    assert any(line.startswith("Left out: Grad-CAM(S)") and "--data" in line for line in lines)
    with pytest.raises(KdxError, match="data cannot be opened"):
        evaluate(made, masks=made_masks, maps=["grad_cam_student"], announce=silent)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metrics": ["energie"]}, "no metric 'energie'"),
        ({"maps": ["rs_stud"]}, "no map 'rs_stud'"),
        ({"layers": ["layer9"]}, "no layer 'layer9'"),
        ({"images": 1}, "at least 2 images"),
        ({"masks": None, "metrics": ["energy"]}, "no masks"),
        ({"masks": Path("nowhere")}, "no masks at nowhere"),
    ],
)
def test_bad_arguments(made: Path, made_masks: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(KdxError, match=message):
        evaluate(made, announce=silent, **{"masks": made_masks, **arguments})
    assert not (made / schema.EVALUATION_FILE).exists()


def test_an_interrupted_evaluation_resumes(made: Path, made_masks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: Any = {"masks": made_masks, "metrics": ["energy", "iou"], "maps": ["rs_student", "distilled", "centre"], "announce": silent}
    measured = module._measured
    calls: list[str] = []

    def counted(metric: Any, task: Any, *rest: Any) -> Any:
        calls.append(f"{metric.name} {task.candidate.name}")
        if len(calls) == 4:
            raise KeyboardInterrupt
        return measured(metric, task, *rest)

    monkeypatch.setattr(module, "_measured", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(made, **arguments)
    assert calls == ["energy rs_student", "energy distilled", "energy centre", "iou rs_student"]
    evaluate(made, **arguments)
    assert calls[4:] == ["iou rs_student", "iou distilled", "iou centre"]
    files = [(made / name).read_bytes() for name in (schema.EVALUATION_FILE, schema.EVALUATION_TABLE)]
    evaluate(made, **arguments)
    assert len(calls) == 7
    monkeypatch.undo()
    for name in (schema.EVALUATION_FILE, schema.EVALUATION_TABLE):
        (made / name).unlink()
    evaluate(made, **arguments)
    assert files == [(made / name).read_bytes() for name in (schema.EVALUATION_FILE, schema.EVALUATION_TABLE)]


def test_other_images_replace_a_metric_and_keep_the_others(made: Path, made_masks: Path) -> None:
    evaluate(made, masks=made_masks, metrics=["energy", "density"], maps=["rs_student"], announce=silent)
    evaluate(made, masks=made_masks, metrics=["density"], maps=["rs_student"], images=6, announce=silent)
    stored = read_evaluation(read_run(made))
    assert stored is not None and [(m.metric, m.n) for m in stored.measurements] == [("energy", 10), ("density", 6)]
    edit(made / "manifest.json", finished="2026-04-01T10:00:00+00:00")  # the run was computed again
    assert read_evaluation(read_run(made)) is None and not any("energy" in name for name in kdx.open_run(made).numbers)


def test_a_process_that_is_killed_between_the_two_files_leaves_no_wrong_values(
    made: Path, made_masks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: Any = {"masks": made_masks, "metrics": ["density"], "maps": ["rs_student", "centre"], "announce": silent}
    expected = evaluate(made, **arguments)
    written: list[str] = []

    def die(path: Path, content: bytes) -> None:
        if schema.EVALUATION_TABLE in written:
            raise SystemExit
        write_atomic(path, content)
        written.append(path.name)

    monkeypatch.setattr("kdx.runs.evaluation.write_atomic", die)
    with pytest.raises(SystemExit):
        evaluate(made, images=6, **arguments)
    monkeypatch.undo()
    again = evaluate(made, **arguments)
    assert again.measurements == expected.measurements
    for name, values in expected.values.items():
        np.testing.assert_array_equal(again.values[name], values)


def test_a_damaged_evaluation_is_computed_again(made: Path, made_masks: Path) -> None:
    evaluate(made, masks=made_masks, metrics=["energy"], maps=["rs_student"], announce=silent)
    content = json.loads((made / schema.EVALUATION_FILE).read_text())
    for damage in ("{", json.dumps({**content, "metrics": {"energy": {}}}), json.dumps([])):
        (made / schema.EVALUATION_FILE).write_text(damage)
        assert read_evaluation(read_run(made)) is None and kdx.open_run(made).numbers
        assert evaluate(made, masks=made_masks, metrics=["energy"], maps=["rs_student"], announce=silent).measurements
