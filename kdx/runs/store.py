"""What a run leaves on disk, written so that a kill at any moment loses at most the batch it was in.

    manifest.json    everything needed to repeat the run, and whether it is complete
    samples.parquet  a row an image
    maps.zarr        LAYER/{distilled,residual,missed,new} [rows, h, w], one chunk a batch (the last two with a teacher only)
    scores.json      scores and differences a layer; scores.csv the same as a table
    overlays/        the gallery's pictures
    networks/        the networks as the runtime executes them
    progress/        a file a finished batch, while the run is under way
    .lock            held by the process that writes, and empty

A batch's maps are written first and its progress file last, by a rename: what has a progress file is whole.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray

from kdx.disk import lock_folder, read_json, write_atomic
from kdx.errors import KdxError

FORMAT = 1


@dataclass(frozen=True)
class BatchRecord:
    """What a finished batch keeps besides its maps: arrays by name, and the images that could not be read."""

    arrays: dict[str, NDArray[Any]]
    unreadable: tuple[tuple[str, str], ...]


class Store:
    """The folder of one run, for one process at a time. `begin` creates it or takes it up again; `close` lets others in.

    A context manager. The lock goes with the process, however that ends.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], lock: IO[bytes]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._lock = lock

    @classmethod
    def begin(cls, folder: Path, configuration: Mapping[str, Any], rest: Mapping[str, Any]) -> Store:
        """A new run, or the one that stands in ``folder`` if its configuration is this one.

        Raises KdxError where the folder is another run's, holds something else, or is being written by another process.
        """
        configuration = json.loads(json.dumps(configuration))
        path = folder / "manifest.json"
        if not path.exists() and folder.exists() and (not folder.is_dir() or any(not _ours(entry.name) for entry in folder.iterdir())):
            raise KdxError(f"{folder} is not empty and not a run.", "Choose a new folder for --out.")
        lock = lock_folder(folder)
        try:
            if not path.exists():
                store = cls(folder, {**rest, "format": FORMAT, "status": "running", "configuration": configuration}, lock)
                store.write_json("manifest.json", store.manifest)
                return store
            manifest = read_json(path)
            known = manifest.get("configuration", {})
            different = sorted(key for key in {*known, *configuration} if known.get(key) != configuration.get(key))
            if manifest.get("format") != FORMAT or different:
                raise KdxError(
                    f"{folder} holds another run (it differs in {', '.join(different) or 'format'}).",
                    "Choose another --out, or delete that folder.",
                )
            return cls(folder, manifest, lock)
        except BaseException:
            lock.close()
            raise

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()

    @property
    def complete(self) -> bool:
        return bool(self.manifest["status"] == "complete")

    def restart(self) -> None:
        """Back to the beginning, as for a run whose results were lost: nothing is done, and nothing stands in the way."""
        self.manifest["status"] = "running"
        self.write_json("manifest.json", self.manifest)
        for path in (self.folder / "progress", self.folder / "maps.zarr"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def has(self, batch: int) -> bool:
        return self._progress(batch).exists()

    def write_batch(
        self, batch: int, rows: int, total: int, maps: Mapping[str, Mapping[str, NDArray[np.float32]]], record: BatchRecord
    ) -> None:
        """A batch's maps (layer -> name -> [n, h, w]) at rows batch * rows onwards of total, then its record."""
        import zarr

        group = zarr.open_group(self.folder / "maps.zarr", mode="a")
        for layer, named in maps.items():
            for name, values in named.items():
                shape = (total, *values.shape[1:])
                array = group.require_array(f"{layer}/{name}", shape=shape, chunks=(rows, *values.shape[1:]), dtype="float32")
                block = np.zeros((rows, *values.shape[1:]), np.float32)
                block[: len(values)] = values
                array[batch * rows : (batch + 1) * rows] = block
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **record.arrays, unreadable=np.array(record.unreadable, dtype=np.str_).reshape(-1, 2))
        write_atomic(self._progress(batch), content.getvalue())

    def read_batch(self, batch: int) -> BatchRecord:
        with np.load(self._progress(batch), allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
        unreadable = tuple((str(name), str(reason)) for name, reason in arrays.pop("unreadable"))
        return BatchRecord(arrays, unreadable)

    def write_samples(self, columns: Mapping[str, Sequence[Any] | NDArray[Any]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        content = io.BytesIO()
        pq.write_table(pa.table(dict(columns)), content)
        write_atomic(self.folder / "samples.parquet", content.getvalue())

    def write_scores(self, scores: Mapping[str, Any]) -> None:
        """scores.json, and its scores and differences as rows of scores.csv."""
        self.write_json("scores.json", scores)
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("layer", "score", "value", "low", "high", "p_value", "n", "batches"))
        for layer, entry in scores["layers"].items():
            for name, score in (entry["scores"] | entry["contrasts"]).items():
                table.writerow((layer, name, score["value"], *score["interval"], score["p_value"], score["n"], score["batches"]))
        write_atomic(self.folder / "scores.csv", text.getvalue().encode())

    def write_picture(self, row: int, pixels: NDArray[np.uint8]) -> None:
        """An image [H, W, 3] of the gallery, as the networks saw it."""
        from PIL import Image

        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "PNG")
        write_atomic(self.folder / "overlays" / f"{row:05d}.png", content.getvalue())

    def finish(self, rest: Mapping[str, Any]) -> None:
        """Declare the run complete, then drop what only resuming needs."""
        self.manifest = self.manifest | dict(rest) | {"status": "complete"}
        self.write_json("manifest.json", self.manifest)
        shutil.rmtree(self.folder / "progress", ignore_errors=True)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        # allow_nan: a NaN in a result would be a bug, and no JSON reader outside Python takes one.
        write_atomic(self.folder / name, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())

    def _progress(self, batch: int) -> Path:
        return self.folder / "progress" / f"{batch:05d}.npz"


def _ours(name: str) -> bool:
    """Whether a file may stand in a folder that is to become a run's: left by a run that was killed as it began, or no one's."""
    return name in (".DS_Store", ".lock", "networks") or name.startswith(".manifest.json.")
