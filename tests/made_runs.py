"""Synthetic run folders: complete, small, and the same for the same arguments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import zarr
from PIL import Image, ImageDraw, ImageFont

from kdx.roles import score_maps_among
from kdx.runs import schema

SCORES = ("FSS(S,T)", "FSS(B,T)", "RS(T)", "RS(S)", "RS(B)", "RS(S|B)", "RS(B|S)", "RS(T|S)", "RS(S|T)")
KINDS = ("distilled", "residual", "missed", "new")

SCRIPT = "<script>alert(1)</script>"
"""A name that is an attack."""

ODD_LAYER = "block/<b>&\"$x^2$ ü--'.9"


def make_run(
    folder: Path,
    *,
    classes: Sequence[str] = ("0", "1", "2"),
    layers: Mapping[str, str] | None = None,
    images: int = 40,
    gallery: int = 16,
    size: tuple[int, int] = (32, 32),
    seed: int = 0,
    teacher: bool = True,
    score_maps: bool = True,
    sides: Sequence[int] = (),
) -> Path:
    """Write a run of ``images`` images of ``size`` (width, height) with pictures of the first ``gallery`` of them; return its folder.

    score_maps: whether it has maps that add up to the scores, and the statistics of all maps, which runs of version 0.1.0 do not have.
    sides: the cells along an edge of the maps of each layer.
    """
    roles = ("teacher", "base", "student") if teacher else ("base", "student")
    kinds = KINDS if teacher else KINDS[:2]
    layers = {"layer1": "layer1", "layer3": "layer3"} if layers is None else dict(layers)
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    schema.picture_path(folder, 0).parent.mkdir(exist_ok=True)
    labels = np.arange(images) % len(classes)
    predictions = {
        role: np.where(rng.random(images) < right, labels, (labels + 1) % len(classes))
        for role, right in (("teacher", 0.95), ("base", 0.7), ("student", 0.85))
        if role in roles
    }
    columns: dict[str, Any] = {
        schema.ROW: np.arange(images),
        schema.ID: [f"image-{i:05d}" for i in range(images)],
        schema.LABEL: labels,
        schema.BATCH: np.arange(images) // 20,
    }
    for role, predicted in predictions.items():
        columns[schema.prediction_column(role)] = predicted
        columns[schema.confidence_column(role)] = 0.5 + 0.5 * rng.random(images)

    group = zarr.open_group(folder / schema.MAPS_FILE, mode="w")
    scores = {layer: _scores(depth, len(layers), images, teacher, score_maps) for depth, layer in enumerate(layers)}
    for depth, layer in enumerate(layers):
        side = sides[depth] if sides else max(4, 16 >> depth)
        signed = _score_maps(rng, scores[layer], images, side, roles) if score_maps else {}
        for kind in kinds:
            maps = _blobs(rng, images, side)
            if kind == "new" and depth == 0:
                maps[0] = 0
            signed[kind] = maps
        for kind, maps in signed.items():
            group.create_array(schema.map_path(layer, kind), data=maps, chunks=(20, side, side))
        if score_maps:
            scores[layer]["maps"] = {kind: _statistics(rng, columns, layer, kind, maps) for kind, maps in signed.items()}
    pa.parquet.write_table(pa.table(columns), folder / schema.SAMPLES_FILE)

    for row in range(min(gallery, images)):
        _image(str(classes[labels[row]])[:1], size, rng).save(schema.picture_path(folder, row))

    models = {
        role: {"reference": f"timm:{name}@weights/{role}.safetensors", "sha256": f"{seed:064x}", "parameters": parameters}
        for role, name, parameters in (("teacher", "resnet34", 1_278_410), ("base", "resnet10t", 78_042), ("student", "resnet10t", 78_042))
        if role in roles
    }
    manifest = {
        "kdx": "0.1.0",
        "format": schema.FORMAT,
        "status": schema.COMPLETE,
        "created": "2026-03-01T10:00:00+00:00",
        "finished": "2026-03-01T10:01:04+00:00",
        "command": ["kdx", "explain", "digits", "--models", "models file.json", "--out", "run"],
        "configuration": {
            "data": "digits",
            "split": "test",
            "fingerprint": "5c1e0a9d",
            "models": models,
            "layers": layers,
            "batch": 20,
            "objective": "relevance",
            "weighting": "gap",
            "reference_images": None,
            "seed": seed,
            "permutations": 999,
            "confidence": 0.95,
            "runtime": "onnx",
            "device": "cpu",
            "image_size": list(size),
        },
        "environment": {"python": "3.11.9", "torch": "2.13.0", "platform": "Linux", "processor": "2 cores"},
        "classes": list(classes),
        "images": {"planned": images, "explained": images, "unreadable": [], "trained_on": 0},
        "batches": -(-images // 20),
        "method": "kd",
    }
    (folder / schema.MANIFEST).write_text(json.dumps(manifest))
    accuracy = {}
    for role, predicted in predictions.items():
        correct = int((predicted == labels).sum())
        share = correct / images
        half = 1.96 * (share * (1 - share) / images) ** 0.5
        accuracy[role] = {"value": share, "interval": [max(0, share - half), min(1, share + half)], "correct": correct, "n": images}
    (folder / schema.SCORES_FILE).write_text(json.dumps({"accuracy": accuracy, "layers": scores}))
    return folder


def make_hostile_run(folder: Path) -> Path:
    """Write a run in which every name is an attack, far too long, or both; return its folder."""
    long = "features." + "denseblock4_denselayer16_" * 6
    make_run(
        folder,
        classes=(SCRIPT, "</title><img src=x onerror=alert(2)>", "a\u2028b--><!--", "w" * 150),
        layers={ODD_LAYER: "<i>layer4</i>", long: long},
        images=16,
        gallery=8,
        size=(48, 30),
    )
    ids = [f"</script><script>alert({i})</script>{'x' * 90}" for i in range(16)]
    table = pa.parquet.read_table(folder / schema.SAMPLES_FILE)
    pa.parquet.write_table(table.set_column(table.column_names.index(schema.ID), schema.ID, pa.array(ids)), folder / schema.SAMPLES_FILE)
    edit(
        folder / schema.MANIFEST,
        method="<u>kd</u>",
        command=["kdx", SCRIPT, "it's"],
        configuration__data=SCRIPT,
        configuration__models__teacher__reference="timm:" + "r" * 200 + SCRIPT,
        images__unreadable=[{"id": SCRIPT, "reason": "bad \ud800 <b>bytes</b>"}],
        environment__processor=SCRIPT,
    )
    return folder


def entry(value: float, half: float, p_value: float | None = 0.001, n: int = 40, batches: int = 2) -> dict[str, Any]:
    """One number of scores.json with a symmetric interval."""
    return {"value": value, "interval": [value - half, value + half], "p_value": p_value, "n": n, "batches": batches}


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file. ``__`` separates the levels of a nested key."""
    content = json.loads(file.read_text())
    for path, value in changes.items():
        *above, last = path.split("__")
        parent = content
        for key in above:
            parent = parent[key]
        parent[last] = value
    file.write_text(json.dumps(content))


def _scores(depth: int, layers: int, n: int, teacher: bool, gain_known: bool) -> dict[str, Any]:
    """The student is closer to the teacher at deeper layers; at the first layer no difference is significant."""
    gain = 0.09 * depth / max(1, layers - 1)
    values = (0.78 + gain, 0.77, 0.62 + 0.1 * depth, 0.55 + 0.1 * depth, 0.5 + 0.09 * depth, 0.02 + 2 * gain, 0.03, 0.08 + gain, 0.05)
    halves = (0.03, 0.035, 0.04, 0.05, 0.05, 0.04, 0.04, 0.05, 0.02)
    scores = {name: entry(v, h, 0.001 if v > h else 0.21, n) for name, v, h in zip(SCORES, values, halves, strict=True)}
    contrasts = {
        "FSS(S,T) - FSS(B,T)": entry(0.01 + gain, 0.03, None, n),
        "RS(S|B) - RS(B|S)": entry(2 * gain - 0.01, 0.05, None, n),
    }
    if gain_known:
        contrasts["RS(S) - RS(B)"] = entry(values[3] - values[4], 0.04, None, n)
        contrasts["RS(S) - RS(T)"] = entry(values[3] - values[2], 0.04, None, n)
    if not teacher:
        scores, contrasts = ({name: number for name, number in table.items() if "T" not in name} for table in (scores, contrasts))
    return {"scores": scores, "contrasts": contrasts}


def _score_maps(
    rng: np.random.Generator, layer: dict[str, Any], images: int, side: int, roles: Sequence[str]
) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    """Signed maps that add up to the scores and contrasts of a layer; those of differences are differences of maps."""
    numbers = {name: number["value"] for name, number in (layer["scores"] | layer["contrasts"]).items()}
    maps: dict[str, Any] = {}
    for name, kind in score_maps_among(roles).items():
        if "minus" in name:
            continue
        blobs = _blobs(rng, images, side) - 0.4 * _blobs(rng, images, side) + 0.02 * rng.normal(size=(images, side, side))
        maps[name] = (blobs - blobs.mean()) / blobs.size + numbers[kind.score] / blobs.size
    maps["rs_student_minus_base"] = maps["rs_student"] - maps["rs_base"]
    if "teacher" in roles:
        maps["rs_student_minus_teacher"] = maps["rs_student"] - maps["rs_teacher"]
        maps["fss_student_minus_base"] = maps["fss_student"] - maps["fss_base"]
    return {name: values.astype(np.float32) for name, values in maps.items()}


def _statistics(rng: np.random.Generator, columns: dict[str, Any], layer: str, kind: str, maps: Any) -> dict[str, float]:
    """Add the columns of a kind of map to those of samples.parquet; return its summary in scores.json."""
    strength = np.abs(maps.astype(np.float64)).mean((1, 2))
    relative = strength / strength.mean()
    stability = 1 - 0.6 * rng.random(len(maps)) ** 2
    stability[strength == 0] = np.nan
    for name, values in zip(schema.MAP_COLUMNS, (maps.astype(np.float64).sum((1, 2)), relative, stability), strict=True):
        columns[schema.map_column(layer, kind, name)] = values
    null = 0.6
    return {
        "empty": float((strength == 0).mean()),
        "strength": float(strength.mean()),
        "stability": float(np.nanmedian(stability)),
        "null_strength": null,
        "above_null": float((relative > null).mean()),
    }


def _blobs(rng: np.random.Generator, n: int, side: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Smooth maps that are zero over much of their area, like rectified maps."""
    y, x = np.mgrid[:side, :side] / (side - 1)
    total = np.zeros((n, side, side))
    for _ in range(3):
        cy, cx, width = rng.random((3, n, 1, 1)) * np.array([0.8, 0.8, 0.15]).reshape(3, 1, 1, 1) + 0.1
        total += rng.random((n, 1, 1)) * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * width**2))
    return np.maximum(total - 0.15, 0).astype(np.float32)


def _image(letter: str, size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """A bright letter on a dark background with a little noise."""
    image = Image.new("L", size, 16)
    font = ImageFont.load_default(0.85 * size[1])
    ImageDraw.Draw(image).text((size[0] / 2, size[1] / 2), letter, fill=235, font=font, anchor="mm")
    noisy = np.asarray(image, dtype=np.float64) + rng.normal(0, 8, (size[1], size[0]))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).convert("RGB")
