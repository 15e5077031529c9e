"""A small run for tests: its options, how to compute it, its results, and how to interrupt it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import zarr

from kdx.commands import explain
from kdx.runs import schema, store
from kdx.runs.run import RunOptions

CLASSES = ("cat", "dog", "owl")
SIZE = (12, 12)
OPTIONS = RunOptions(batch=9, geometry="batch", permutations=19, runtime="eager", seed=3, gallery=6)
WHOLE = replace(OPTIONS, geometry="whole")
SALIENT = replace(OPTIONS, features="salient", keep=0.4, noise=0.05)


def run(folder: Path, out: Path, options: RunOptions = OPTIONS, data: str | None = None, layers: tuple[str, ...] = ()) -> Path:
    return explain.run(data or str(folder / "pictures"), folder / "models.toml", out, layers, options, announce=lambda line: None)


def results(out: Path) -> dict[str, Any]:
    """Everything that a run computed, without times and the machine."""
    group: Any = zarr.open_group(out / "maps.zarr", mode="r")
    arrays = {f"{layer}/{name}": np.asarray(array) for layer in ("layer2", "layer3") for name, array in group[layer].arrays()}
    return {
        "scores": (out / "scores.json").read_bytes(),
        "table": (out / "scores.csv").read_bytes(),
        "samples": pq.read_table(out / "samples.parquet").to_pydict(),
        "images": json.loads((out / "manifest.json").read_text())["images"],
        "overlays": sorted((path.name, path.read_bytes()) for path in (out / "overlays").iterdir()),
        **arrays,
    }


def same(actual: dict[str, Any], expected: dict[str, Any]) -> bool:
    return actual.keys() == expected.keys() and all(
        np.array_equal(actual[key], value) if isinstance(value, np.ndarray) else actual[key] == value for key, value in expected.items()
    )


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def stopping(write: Any, stop: str) -> Any:
    """`write`, interrupted at the second batch at the point that ``stop`` names."""

    def interrupted(self: store.Store, batch: int, *rest: Any) -> None:
        if batch == 1 and stop == "before the maps":
            raise KeyboardInterrupt
        write(self, batch, *rest)
        if batch == 1 and stop == "between maps and record":
            schema.batch_path(self.folder, batch).unlink()
            raise KeyboardInterrupt
        if batch == 1 and stop == "after a batch":
            raise KeyboardInterrupt

    return interrupted
