"""Scores per class and per group for a synthetic run folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdx.runs import schema


def add_groups(folder: Path, kind: str, names: Sequence[str], *, few: Sequence[str] = (), column: str = "weather") -> None:
    """Write scores of ``classes`` or ``groups`` of these names into a run. few: those without values."""
    rng = np.random.default_rng(len(names))
    path = folder / schema.SCORES_FILE
    scores = json.loads(path.read_text("utf-8"))
    for layer in scores["layers"].values():
        known = layer["scores"] | layer["contrasts"]
        layer[kind] = {name: _without(known) if name in few else _group(rng, layer, known) for name in names}
    path.write_text(json.dumps(scores), "utf-8")
    if kind == "groups":
        manifest = json.loads((folder / schema.MANIFEST).read_text("utf-8"))
        manifest["configuration"]["groups"] = {"column": column, "sha256": "0" * 64}
        (folder / schema.MANIFEST).write_text(json.dumps(manifest), "utf-8")


def _group(rng: np.random.Generator, layer: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    n = int(rng.integers(8, 90))
    entries = {name: _entry(float(np.tanh(entry["value"] + rng.normal(scale=0.1))), 0.4 / n**0.5, n) for name, entry in known.items()}
    for name in layer["contrasts"]:
        entries[name] |= {"p_value": 0.01 if abs(entries[name]["value"]) > 0.1 else 0.5}
        entries[name] |= {"p_adjusted": min(1.0, 3 * entries[name]["p_value"])}
    scores, contrasts = ({name: entries[name] for name in layer[part]} for part in ("scores", "contrasts"))
    return {"n": n, "scores": scores, "contrasts": contrasts, "missing": {}}


def _entry(value: float, reach: float, n: int) -> dict[str, Any]:
    return {"value": value, "interval": [value - reach, value + reach], "p_value": None, "p_adjusted": None, "n": n, "batches": 1}


def _without(known: dict[str, Any]) -> dict[str, Any]:
    return {"n": 3, "scores": {}, "contrasts": {}, "missing": dict.fromkeys(known, "3 images, and 5 are necessary.")}
