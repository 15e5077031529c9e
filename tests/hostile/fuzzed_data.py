"""Damaged data sets, tables and annotations."""

from __future__ import annotations

import csv
import functools
import io
import json
import pickle
import random
import shutil
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from kdx.data.class_embeddings import read_class_embeddings, read_image_rows
from kdx.data.dataset import open_data
from kdx.data.images import load_images
from kdx.data.label_tables import read_column
from kdx.errors import KdxError
from kdx.evaluate.annotations import read_annotations
from tests.hostile.fuzzed_images import images
from tests.hostile.input_files import Call, Canary, fresh, written
from tests.hostile.mutations import HOSTILE_TEXTS, damaged, damaged_json


def _read_images(reference: str) -> None:
    """Open a data set and decode its first images."""
    dataset = open_data(reference)
    load_images(dataset, range(min(4, len(dataset.ids))), (8, 8))


def npz(path: Path, random_: random.Random) -> Call:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {"images": rng.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8), "labels": np.arange(6) % 2}
    arrays["classes"] = np.array([random_.choice(HOSTILE_TEXTS) or "x", "dog"]).astype(object if random_.random() < 0.1 else str)
    arrays["test_images"], arrays["test_labels"] = arrays["images"], arrays["labels"]
    if random_.random() < 0.3:
        name = random_.choice(sorted(arrays))
        arrays[name] = random_.choice(
            [
                np.zeros(0),
                np.array(3),
                np.full((6, 4, 4, 3), np.nan),
                np.array([Canary()] * 6, dtype=object),
                np.zeros((6, 4, 4, 7)),
                -np.arange(6),
            ]
        )
    file = io.BytesIO()
    with suppress(UnicodeError):  # a lone surrogate
        np.savez(file, **arrays)
    content = file.getvalue()
    target = written(path, "data.npz", damaged(content, random_) if random_.random() < 0.6 else content)

    return lambda: _read_images(str(target))


def cifar(path: Path, random_: random.Random) -> Call:
    """Binary and pickled batches. Some pickles contain code."""
    rng = np.random.default_rng(0)
    folder = fresh(path)
    if random_.random() < 0.3:
        content, name = rng.integers(0, 10, (4, 3073), dtype=np.uint8).tobytes(), "data_batch_1.bin"
    else:
        batch: dict[Any, Any] = {
            b"data": rng.integers(0, 256, (4, 3072), dtype=np.uint8),
            b"labels": [0, 1, 2, 3],
            b"filenames": [b"a"] * 4,
        }
        if random_.random() < 0.3:
            batch[random_.choice(sorted(batch))] = random_.choice([Canary(), [Canary()], "x", None, np.zeros(3), {}, [10**30] * 4])
        content, name = pickle.dumps(batch, protocol=random_.choice((2, 3, 4, 5))), "data_batch_1"
    (folder / name).write_bytes(damaged(content, random_) if random_.random() < 0.8 else content)
    (folder / name.replace("data_batch_1", "test_batch")).write_bytes(content)

    return lambda: _read_images(f"cifar10:{folder}")


def table(path: Path, random_: random.Random) -> Call:
    """A table of images and labels; one of groups; and one of class embeddings."""
    folder = fresh(path)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["path", "label", "split", "group"])
    for number in range(4):
        writer.writerow(
            [
                f"{number}.png",
                random_.choice((*HOSTILE_TEXTS, "cat")) if number else "dog",
                "x" if random_.random() < 0.05 else random_.choice(("train", "test")),
                random_.choice(HOSTILE_TEXTS),
            ]
        )
        (folder / f"{number}.png").write_bytes(images()["PNG"][0])
    content = text.getvalue().encode("utf-8", "surrogatepass")
    (folder / "data.csv").write_bytes(damaged(content, random_) if random_.random() < 0.7 else content)
    embeddings = f"cat,{random_.random()},2\ndog,3,{random_.choice((4, 5, 6, 7, 'x', 'nan', '1e999', '9' * 400))}\n".encode()
    (folder / "classes.csv").write_bytes(damaged(embeddings, random_) if random_.random() < 0.7 else embeddings)

    def read() -> None:
        _read_by_all(
            lambda: open_data(str(folder / "data.csv")),
            lambda: read_column(folder / "data.csv", "group"),
            lambda: read_class_embeddings(folder / "classes.csv", ("cat", "dog")),
        )

    return read


def _read_by_all(*readers: Call) -> None:
    """Read an input with every reader, also after the KdxError of one, which is raised at the end."""
    refusal: KdxError | None = None
    for reader in readers:
        try:
            reader()
        except KdxError as error:
            if "\x1b" in str(error):
                raise ValueError("an escape in an error") from error
            refusal = error
    if refusal is not None:
        raise refusal


def parquet(path: Path, random_: random.Random) -> Call:
    """Rows of numbers with names of images or classes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = io.BytesIO()
    names = ["cat", "dog", random_.choice(HOSTILE_TEXTS[:10])]
    pq.write_table(pa.table({"name": names, "x": [1.0, 2.0, 3.0], "y": [3.0, 2.0, 2.0]}), content)
    file = written(path, "rows.parquet", damaged(content.getvalue(), random_))

    def read() -> None:
        _read_by_all(lambda: read_image_rows(file, ["cat", "dog"]), lambda: read_class_embeddings(file, ("cat", "dog")))

    return read


def annotation_file(path: Path, random_: random.Random) -> Call:
    coco = {
        "images": [{"id": 1, "file_name": "a/1.png", "height": 9, "width": 11}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 3, 3], "segmentation": [[1, 1, 5, 1, 5, 5]], "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 1, "segmentation": {"size": [9, 11], "counts": [5, 10, 84]}, "iscrowd": 1},
        ],
    }  # fmt: skip
    file = written(path, "instances.json", damaged_json(json.dumps(coco).encode(), random_))

    def read() -> None:
        masks = read_annotations(file)
        _read_by_all(*(functools.partial(mask, (9, 11), "a") for mask in masks.masks.values()))

    return read


def image_table(path: Path, random_: random.Random) -> Call:
    """A Parquet file of images, as Hugging Face writes it; in some files the table itself is hostile, and the file is whole."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    contents: list[Any] = [images()[random_.choice(("PNG", "JPEG", "GIF"))][0] for _ in range(4)]
    labels: list[Any] = [0, 1, 0, 1]
    info = {"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    metadata = json.dumps(info).encode()
    kind = random_.randrange(6)
    if kind == 0:
        contents[random_.randrange(4)] = random_.choice((None, b"", b"x", damaged(contents[0], random_)))
    elif kind == 1:
        labels[random_.randrange(4)] = random_.choice((-1, 2, None, 2**62))
    elif kind == 2:
        labels = [random_.choice(HOSTILE_TEXTS).encode("utf-8", "replace").decode() for _ in range(4)]
    elif kind == 3:
        metadata = damaged_json(metadata, random_)
    stored = pa.array([{"bytes": content, "path": random_.choice((None, "x.png"))} for content in contents])
    file = io.BytesIO()
    schema = pa.table({"image": stored, "label": labels}).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(schema, file, row_group_size=2, compression=random_.choice(("snappy", "zstd", "none")))
    content = file.getvalue()
    if kind > 3:  # the footer is at the end
        end = len(content) if random_.random() < 0.5 else random_.randrange(8, len(content))
        content = damaged(content[:end], random_) + content[end:]
    target = written(path, random_.choice(("rows.parquet", "train-0.parquet")), content)
    return lambda: _read_images(f"parquet:{random_.choice((target, target.parent))}")


def shards(path: Path, random_: random.Random) -> Call:
    """Tar files of images with labels, some of them compressed, with members that link or leave the folder."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=random_.choice(("w", "w", "w:gz", "w:xz")), format=random_.choice((0, 1, 2))) as archive:
        for number in range(4):
            entries = {"png": images()["PNG"][0], "cls": b"%d" % (number % 2), "json": json.dumps({"label": number % 2}).encode()}
            if random_.random() < 0.2:
                entries["cls"] = random_.choice(HOSTILE_TEXTS).encode("utf-8", "surrogatepass")
            if random_.random() < 0.2:
                entries["json"] = damaged_json(entries["json"], random_)
            if random_.random() < 0.1:
                entries["pyd"] = pickle.dumps(Canary())
            for extension, content in entries.items():
                stem = random_.choice(("../up", "/etc/x", "a/../../b", "\x1b[31m", "a" * 90)) if random_.random() < 0.05 else f"{number:04}"
                member = tarfile.TarInfo(f"{stem}.{extension}")
                member.size = len(content)
                if random_.random() < 0.05:
                    member.type, member.linkname, member.size = random_.choice((tarfile.SYMTYPE, tarfile.LNKTYPE)), "/etc/passwd", 0
                archive.addfile(member, io.BytesIO(content))
    content = file.getvalue()
    target = written(path, "data-0000.tar", damaged(content, random_) if random_.random() < 0.7 else content)
    options = random_.choice(("", "", ",label=json.label", ",label=cls"))
    return lambda: _read_images(f"wds:{target}{options}")


@functools.cache
def arrow_folder() -> Path:
    """A data set in the format of ``save_to_disk``, which is not changed."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": images()["PNG"][0], "path": None} for _ in range(4)], "label": [0, 1, 0, 1]}
    part = datasets.Dataset.from_dict(rows, features=features)
    folder = Path(tempfile.mkdtemp()) / "data"
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(folder)
    return folder


def arrow(path: Path, random_: random.Random) -> Call:
    """A data set of Hugging Face's library on disk with one damaged file."""
    folder = fresh(path) / "data"
    shutil.copytree(arrow_folder(), folder)
    file = random_.choice(sorted(file for file in folder.rglob("*") if file.is_file()))
    file.write_bytes((damaged_json if file.suffix == ".json" else damaged)(file.read_bytes(), random_))
    return lambda: _read_images(f"hfdata:{folder}")
