"""Writes a run's folder so that a kill at any moment loses at most the batch in progress. The schema is in `kdx.runs.schema`.

A batch's maps are written first. Its file under progress/ is written last, by a rename: a batch that has this file is complete. At a URL
the rename is the write of one object, which the service shows whole or not at all.
"""

from __future__ import annotations

import io
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from kdx.disk import (
    check_folder,
    check_locked,
    csv_text,
    lock_folder,
    read_json,
    remove_leftovers,
    remove_tree,
    scratch_folder,
    unwritable,
    write_atomic,
)
from kdx.errors import KdxError
from kdx.remote import RemotePath, remote_errors, zarr_store
from kdx.remote_lock import RemoteLock
from kdx.runs import grouped_scores, schema
from kdx.runs.gallery_choice import write_picture
from kdx.runs.progress_records import BatchRecord, LayerRecord
from kdx.runs.schema import Configuration, Context, ImageCounts, Manifest, StoredScores

_LISTED_FOR = 10.0
"""The seconds for which a listing of the finished batches at a URL stays valid."""

_BYTES_AT_ONCE = 1 << 24
"""The size of the maps of a layer that are in memory to be written."""


class Store:
    """The folder of one run, which may be at a URL, locked for one process at a time. `begin` creates or reopens it; `close` unlocks it.

    A context manager. The lock ends with the process, even when the process is killed.
    """

    def __init__(self, folder: Path, manifest: Manifest, lock: IO[bytes] | RemoteLock, replaces: str = "") -> None:
        self.folder = folder
        self.scratch = scratch_folder(folder)
        """The folder for features and other large files of a run that is not complete: the run's, or a local one if the run is at a URL."""
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.manifest = manifest
        self._lock = lock
        self.replaces = replaces
        """Why an unfinished run of another configuration in this folder was discarded, as a sentence; "" if there was none."""
        self._listing: tuple[float, set[str]] = -_LISTED_FOR, set()  # when the finished batches at a URL were listed, and their files
        self._group: Any = None  # of maps.zarr, once it is opened
        self._arrays: dict[str, Any] = {}  # opening an array of maps takes as long as writing a batch of them

    @classmethod
    def begin(
        cls, folder: Path, configuration: Configuration, context: Context, fingerprint_of_0_1_0: Callable[[], str] | None = None
    ) -> Store:
        """A new run, or the run in ``folder`` if it has the same configuration and classes.

        The data are recognised by their fingerprint, wherever their folder is. fingerprint_of_0_1_0 returns the one that kdx 0.1.0
        recorded for the same data.

        Another configuration replaces an unfinished run that has stored no results or that an error has ended, so that a corrected command
        runs in the same folder. Raises KdxError where the folder contains any other run or other files, or while another process writes
        to it.
        """
        configuration = json.loads(json.dumps(configuration))
        path = folder / schema.MANIFEST
        if not path.exists():
            check_folder(folder, "a run", lambda path: schema.may_precede_manifest(path.name))
        lock = lock_folder(folder)
        try:
            new = {**context, "format": schema.FORMAT, "status": schema.RUNNING, "configuration": configuration}
            if not path.exists():
                store = cls(folder, cast(Manifest, new), lock)
                store._write_manifest()
                return store
            stored = _read_manifest(path)
            if stored is None:
                store = cls(folder, cast(Manifest, new), lock, f"{path} is damaged; the run is computed again.")
                store.restart()
                return store
            known = stored.get("configuration", {}) | {"classes": stored.get("classes")}
            requested = configuration | {"classes": context["classes"]}
            different = sorted(key for key in {*known, *requested} if known.get(key) != requested.get(key))
            if "fingerprint" in different and fingerprint_of_0_1_0 is not None and known.get("fingerprint") == fingerprint_of_0_1_0():
                different.remove("fingerprint")
            if "source_code" not in known:  # older versions did not record it
                different = [key for key in different if key != "source_code"]
            if stored.get("geometry") == "whole":  # the batch does not change its results
                different = [key for key in different if key != "batch"]
            if "fingerprint" not in different:  # the same images in another folder
                different = [key for key in different if key != "data"]
            store = cls(folder, cast(Manifest, stored), lock)
            if different and stored.get("format") == schema.FORMAT and not store.complete and not store.has_results:
                names = ", ".join(different)
                store = cls(
                    folder, cast(Manifest, new), lock, f"A run in {folder} that had no results is replaced (it differs in {names})."
                )
                store.restart()
                return store
            if stored.get("format") != schema.FORMAT or different:
                raise KdxError(
                    f"{folder} contains another run (it differs in {', '.join(different) or 'format'}).",
                    "Choose another --out, or delete that folder.",
                )
            return store
        except BaseException:
            lock.close()
            raise

    def close(self) -> None:
        self._lock.close()
        if self.scratch != self.folder:
            with suppress(OSError):  # it contains files that a resumed run needs
                self.scratch.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()

    @property
    def complete(self) -> bool:
        return bool(self.manifest["status"] == schema.COMPLETE)

    @property
    def has_progress(self) -> bool:
        """Whether a part of the results, or of the features that they need, is stored."""
        state = self.scratch / schema.FEATURES / "state.npy"
        return any((self.folder / schema.PROGRESS).glob("*.npz")) or (state.exists() and bool(np.load(state, mmap_mode="r").any()))

    @property
    def has_results(self) -> bool:
        """Whether an unfinished run is worth keeping: it has progress, and no error has ended it."""
        return self.has_progress and "failure" not in self.manifest

    def fail(self, problem: str) -> None:
        """Record the error that ended the run. The same command may still resume it."""
        self.manifest["failure"] = problem
        with suppress(KdxError):  # a full disk, for example
            self._write_manifest()

    def set_geometry(self, kind: str, reason: str, *, batches: int) -> None:
        """Record the geometry, before anything is computed with it."""
        self.manifest["geometry"], self.manifest["geometry_reason"], self.manifest["batches"] = kind, reason, batches
        self._write_manifest()

    def restart(self) -> None:
        """Discard the progress, the maps and the optional results, so that every batch is computed again."""
        self.manifest["status"] = schema.RUNNING
        self.manifest.pop("geometry", None)  # runs of kdx 0.1.0 did not record it, and it is chosen again
        self._write_manifest()
        self._arrays.clear()
        self._group = None
        self._listing = -_LISTED_FOR, set()
        folders = (self.folder / schema.PROGRESS, self.scratch / schema.FEATURES, self.folder / schema.MAPS_FILE)
        for path in (*folders, *(self.folder / name for name in schema.OPTIONAL_RESULTS)):
            if path.is_dir():
                remove_tree(path)
            else:
                path.unlink(missing_ok=True)

    def has(self, batch: int) -> bool:
        path = schema.batch_path(self.folder, batch)
        if not isinstance(self.folder, RemotePath):
            return path.exists()
        listed, names = self._listing
        if time.monotonic() - listed >= _LISTED_FOR:  # one request per 1,000 batches, instead of one per batch
            names = {file.name for file in path.parent.glob("*.npz")}
            self._listing = time.monotonic(), names
        return path.name in names

    def write_batch(
        self, batch: int, rows: int, total: int, maps: Mapping[str, Mapping[str, NDArray[np.float32]]], record: BatchRecord
    ) -> None:
        """Write a batch's maps (layer -> kind -> [n, h, w]) at the rows from ``batch * rows`` of ``total``, then its record."""
        self.write_maps(batch, rows, total, maps)
        self._write_arrays(schema.batch_path(self.folder, batch), record.arrays())

    def write_maps(self, batch: int, rows: int, total: int, maps: Mapping[str, Mapping[str, NDArray[np.float32]]]) -> None:
        """Write a batch's maps (layer -> kind -> [n, h, w]) at the rows from ``batch * rows`` of ``total``."""
        with self._writing_maps():
            for layer, kinds in maps.items():
                for kind, values in kinds.items():
                    shape, chunks = (total, *values.shape[1:]), (rows, *values.shape[1:])
                    path = schema.map_path(layer, kind)
                    if path not in self._arrays:
                        self._arrays[path] = self._maps().require_array(path, shape=shape, chunks=chunks, dtype="float32")
                    block = np.zeros(chunks, np.float32)
                    block[: len(values)] = values
                    self._arrays[path][batch * rows : (batch + 1) * rows] = block

    def read_maps(self, layer: str, kind: str, start: int, count: int) -> NDArray[np.float32]:
        """``count`` maps [count, h, w] of a kind, from the row ``start``."""
        path = schema.map_path(layer, kind)
        with remote_errors(self.folder):
            if path not in self._arrays:
                self._arrays[path] = self._maps()[path]
            return np.asarray(self._arrays[path][start : start + count])

    @contextmanager
    def _writing_maps(self) -> Iterator[None]:
        """Raises KdxError if maps cannot be written in the block, for example because the disk is full."""
        try:
            with remote_errors(self.folder):
                yield
        except OSError as error:
            raise unwritable(self.folder / schema.MAPS_FILE, error) from error

    def _maps(self) -> Any:
        import zarr

        if self._group is None:
            self._group = zarr.open_group(zarr_store(self.folder / schema.MAPS_FILE, read_only=False), mode="a")
        return self._group

    def has_layer(self, place: int) -> bool:
        return schema.layer_path(self.folder, place).exists()

    def write_layer(
        self, place: int, layer: str, maps: Mapping[str, NDArray[np.float32]], order: NDArray[np.int64], record: LayerRecord
    ) -> None:
        """Write all maps of a layer (kind -> [n, h, w]) in this order, then its record. place: the number of the layer."""
        with self._writing_maps():
            group = self._maps()
            for kind, values in maps.items():
                chunks = (min(schema.MAPS_PER_CHUNK, len(values)), *values.shape[1:])
                path = schema.map_path(layer, kind)
                array = group.create_array(path, shape=values.shape, chunks=chunks, dtype="float32", overwrite=True)
                # Zarr takes milliseconds per assignment, and writes the chunks of one assignment at the same time.
                step = chunks[0] * max(1, _BYTES_AT_ONCE // (4 * math.prod(chunks)))
                for start in range(0, len(values), step):
                    array[start : start + step] = values[order[start : start + step]]
        self._write_arrays(schema.layer_path(self.folder, place), record.arrays())

    def read_layer(self, place: int) -> LayerRecord:
        with np.load(io.BytesIO(schema.layer_path(self.folder, place).read_bytes()), allow_pickle=False) as content:
            return LayerRecord.from_arrays({name: content[name] for name in content.files})

    def _write_arrays(self, path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **arrays)
        check_locked(self.folder, self._lock)
        write_atomic(path, content.getvalue())
        self._listing[1].add(path.name)

    def read_batch(self, batch: int) -> BatchRecord:
        with np.load(io.BytesIO(schema.batch_path(self.folder, batch).read_bytes()), allow_pickle=False) as content:
            return BatchRecord.from_arrays({name: content[name] for name in content.files})

    def write_samples(self, columns: Mapping[str, Sequence[Any] | NDArray[Any]]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        content = io.BytesIO()
        pq.write_table(pa.table({name: pa.array(values, from_pandas=True) for name, values in columns.items()}), content)  # NaN is null
        write_atomic(self.folder / schema.SAMPLES_FILE, content.getvalue())

    def write_scores(self, scores: StoredScores) -> None:
        """Write scores.json, its scores and contrasts as rows of scores.csv, and those of classes and groups as tables of their own."""
        self._write_json(schema.SCORES_FILE, scores)
        write_atomic(self.folder / schema.SCORES_TABLE, csv_text(schema.SCORES_TABLE_COLUMNS, schema.scores_table_rows(scores)).encode())
        for kind, name in schema.GROUPED_TABLES.items():
            rows = list(grouped_scores.grouped_rows(scores, kind))
            if rows:
                write_atomic(self.folder / name, csv_text(grouped_scores.grouped_columns(kind), rows).encode())

    def write_picture(self, row: int, pixels: NDArray[np.uint8]) -> None:
        """Write an image [H, W, 3] of the gallery at the size that the networks receive."""
        write_picture(self.folder, row, pixels)

    def finish(self, finished: str, images: ImageCounts, *, keep_features: bool = False) -> None:
        """Mark the run as complete, then delete the files that only a resumed run needs; the features only if they are not kept."""
        self._remove_partial_files()
        self.manifest = {**self.manifest, "finished": finished, "images": images, "status": schema.COMPLETE}
        self.manifest.pop("failure", None)
        self._write_manifest()
        self.tidy(keep_features=keep_features)

    def tidy(self, *, keep_features: bool) -> None:
        """Delete the files of a complete run that only a resumed run needs, unless they are deleted already.

        The progress is deleted last: if a complete run has some, a process was killed before it had deleted all of these files.
        """
        if (self.folder / schema.PROGRESS).exists():
            if not keep_features:
                remove_tree(self.scratch / schema.FEATURES, ignore_errors=True)
            if self.scratch != self.folder:
                remove_tree(self.scratch, ignore_errors=True)
            remove_tree(self.folder / schema.PROGRESS, ignore_errors=True)

    def _remove_partial_files(self) -> None:
        """Delete the temporary files that a killed process left: those of Zarr, and those of `kdx.disk.replacing` beside the results."""
        if isinstance(self.folder, RemotePath):  # objects are whole
            return
        for path in (self.folder / schema.MAPS_FILE).rglob("*.partial"):
            path.unlink(missing_ok=True)
        for folder in (self.folder, self.folder / schema.OVERLAYS):
            remove_leftovers(folder)

    def _write_manifest(self) -> None:
        self._write_json(schema.MANIFEST, self.manifest)

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        check_locked(self.folder, self._lock)
        # allow_nan=False: a NaN in a result would be a bug, and few JSON readers other than Python's accept it.
        write_atomic(self.folder / name, (json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a run; None if it is damaged but the folder contains results of a run. Raises KdxError for any other damaged
    manifest."""
    try:
        return read_json(path)
    except KdxError:
        if any((path.parent / name).exists() for name in (schema.SAMPLES_FILE, schema.MAPS_FILE, schema.PROGRESS, schema.FEATURES)):
            return None
        raise
