"""The inputs of the fuzzer: for each kind, a function that writes a damaged input and returns a function with which kdx reads it."""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import pickle
import random
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from kdx.data.class_embeddings import read_class_embeddings, read_image_rows
from kdx.data.dataset import open_data
from kdx.data.images import load_images
from kdx.data.label_tables import read_column
from kdx.evaluate.annotations import read_annotations
from kdx.models import load
from kdx.models.models_file import read_models
from kdx.models.resnet import resnet
from kdx.study.design import design_of, read_design
from tests.hostile import fuzzed_images, fuzzed_runs
from tests.hostile.fuzzed_images import fresh, images
from tests.hostile.mutations import HOSTILE_TEXTS, changed_value, damaged, damaged_json

Call = Callable[[], object]
Target = Callable[[Path, random.Random], Call]

NETWORK = "kdx:resnet,width=2,depth=1,classes=2"


class _Canary:
    """An object whose pickle writes the file ``canary`` into the current folder if it is executed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("canary",)


def _file(path: Path, name: str, content: bytes) -> Path:
    file = fresh(path) / name
    file.write_bytes(content)
    return file


@functools.cache
def _weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(resnet(width=2, depth=1, classes=2).state_dict())


def safetensors(path: Path, random_: random.Random) -> Call:
    content = save(_weights(), metadata={"recipe": json.dumps({"seed": 1, "data": "x"})})
    if random_.random() < 0.5:
        length = int.from_bytes(content[:8], "little")
        header = json.dumps(changed_value(json.loads(content[8 : 8 + length]), random_)).encode("utf-8", "surrogatepass")
        content = (
            (len(header) if random_.random() < 0.9 else random_.getrandbits(64)).to_bytes(8, "little") + header + content[8 + length :]
        )
    else:
        content = damaged(content, random_)
    file = _file(path, "weights.safetensors", content)
    return lambda: load(f"{NETWORK}@{file}")


@functools.cache
def _checkpoints() -> tuple[bytes, ...]:
    contents = []
    for value in (_weights(), {"state_dict": _weights(), "epoch": 3}, {"model": _weights(), "extra": _Canary()}, _Canary()):
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(value, file, _use_new_zipfile_serialization=zipped)
            contents.append(file.getvalue())
    return (*contents, pickle.dumps(_Canary()), pickle.dumps({"state_dict": _Canary()}))


def pt(path: Path, random_: random.Random) -> Call:
    """A checkpoint, damaged in most cases. Half of the checkpoints contain code."""
    content = random_.choice(_checkpoints())
    if content[:2] == b"PK" and random_.random() < 0.5:
        content = _damaged_zip(content, random_, damaged)
    elif random_.random() < 0.75:
        content = damaged(content, random_, random_.choice(_checkpoints()))
    file = _file(path, random_.choice(("weights.pt", "weights.pth", "weights.bin")), content)
    return lambda: load(f"{NETWORK}@{file}")


def _damaged_zip(content: bytes, random_: random.Random, change: Callable[[bytes, random.Random], bytes]) -> bytes:
    """The archive with one changed record."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as archive, zipfile.ZipFile(file, "w") as copy:
        names = archive.namelist()
        chosen = random_.choice([name for name in names if name.endswith((".pkl", ".json"))] or names)
        for name in names:
            data = archive.read(name)
            copy.writestr(name, (change if random_.random() < 0.9 else damaged)(data, random_) if name == chosen else data)
    return file.getvalue()


@functools.cache
def _program() -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
        dimension = torch.export.Dim("batch")
        torch.export.save(torch.export.export(network, (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: dimension},)), file)
    return file.getvalue()


def pt2(path: Path, random_: random.Random) -> Call:
    content = _damaged_zip(_program(), random_, damaged_json) if random_.random() < 0.8 else damaged(_program(), random_)
    file = _file(path, "network.pt2", content)
    return lambda: load(str(file))


@functools.cache
def _onnx() -> bytes:
    from kdx.commands.export import ExportOptions, export

    with tempfile.TemporaryDirectory() as name:
        weights = Path(name, "w.safetensors")
        weights.write_bytes(save(_weights()))
        export({"network": f"{NETWORK}@{weights}"}, ["layer2"], "features", Path(name, "x.onnx"), ExportOptions(), announce=lambda _: None)
        return Path(name, "x.onnx").read_bytes()


def onnx(path: Path, random_: random.Random) -> Call:
    from kdx.export.description import describe
    from kdx.runtimes.onnx_runtime import OnnxRuntimeRunner

    file = _file(path, "x.onnx", damaged(_onnx(), random_))

    def read() -> None:
        describe(file)
        OnnxRuntimeRunner(file).close()

    return read


def _toml(value: Any) -> str:
    """A table as TOML, with inline tables."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {_toml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value) if value is not None else '""'


def _toml_file(content: dict[str, Any], random_: random.Random) -> bytes:
    for _ in range(random_.choice((1, 1, 2))):
        content = changed_value(content, random_)
        if not isinstance(content, dict):
            return _toml(content).encode("utf-8", "surrogatepass")
    if random_.random() < 0.01:
        return b"a = " + random_.choice((b"[", b"{a=")) * 100_000
    text = "\n".join(f"{json.dumps(str(key))} = {_toml(value)}" for key, value in content.items()).encode("utf-8", "surrogatepass")
    return damaged(text, random_) if random_.random() < 0.3 else text


def models_file(path: Path, random_: random.Random) -> Call:
    content = {
        "teacher": "kdx:resnet,width=3", "student": f"{NETWORK}", "base": f"{NETWORK}", "layers": ["layer2", "layer3=layer4"],
        "classes": ["cat", "dog"], "split_seed": 1,
        "preprocessing": {"size": [8, 8], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        "resize": {"mode": "cover", "interpolation": "bilinear"}, "training": {"method": "kd", "probe": "probe.csv", "probe_images": 3},
    }  # fmt: skip
    file = _file(path, "models.toml", _toml_file(content, random_))

    def read() -> None:
        models = read_models(file)
        models.load("student")

    return read


def study(path: Path, random_: random.Random) -> Call:
    content = {
        "data": {"digits": "sample:60:digits", "more": {"reference": "digits", "training": {"epochs": 2}, "explain": {"seed": 1}}},
        "teachers": {"large": "kdx:resnet,width=3"}, "students": ["kdx:resnet,width=2"],
        "methods": {"kd": "kd,temperature=2", "at": "kd+at:0.5"},
        "assistants": {"medium": "kdx:resnet,width=3"}, "seeds": [0, 1], "images": 100, "layers": ["layer2"],
        "training": {"epochs": 1, "image_size": 8, "batch": 8, "lr": 0.1}, "explain": {"permutations": 5, "gallery": 1, "batch": 8},
    }  # fmt: skip
    file = _file(path, "study.toml", _toml_file(content, random_))
    return lambda: design_of(read_design(file)).as_table()


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
                np.array([_Canary()] * 6, dtype=object),
                np.zeros((6, 4, 4, 7)),
                -np.arange(6),
            ]
        )
    file = io.BytesIO()
    with suppress(UnicodeError):  # a lone surrogate
        np.savez(file, **arrays)
    content = file.getvalue()
    target = _file(path, "data.npz", damaged(content, random_) if random_.random() < 0.6 else content)

    def read() -> None:
        dataset = open_data(str(target))
        load_images(dataset, range(min(4, len(dataset.ids))), (8, 8))

    return read


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
            batch[random_.choice(sorted(batch))] = random_.choice([_Canary(), [_Canary()], "x", None, np.zeros(3), {}, [10**30] * 4])
        content, name = pickle.dumps(batch, protocol=random_.choice((2, 3, 4, 5))), "data_batch_1"
    (folder / name).write_bytes(damaged(content, random_) if random_.random() < 0.8 else content)
    (folder / name.replace("data_batch_1", "test_batch")).write_bytes(content)

    def read() -> None:
        dataset = open_data(f"cifar10:{folder}")
        load_images(dataset, range(min(4, len(dataset.ids))), (8, 8))

    return read


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
                random_.choice((*HOSTILE_TEXTS, "cat")),
                "x" if random_.random() < 0.05 else random_.choice(("train", "test")),
                random_.choice(HOSTILE_TEXTS),
            ]
        )
        (folder / f"{number}.png").write_bytes(images()["PNG"][0])
    content = text.getvalue().encode("utf-8", "surrogatepass")
    (folder / "data.csv").write_bytes(damaged(content, random_) if random_.random() < 0.7 else content)
    embeddings = f"cat,{random_.random()},2\ndog,3,{random_.choice((4, 'x', 'nan', '1e999', '9' * 400))}\n".encode()
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
    from kdx.errors import KdxError

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
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = io.BytesIO()
    pq.write_table(
        pa.table({"id": ["a", "b", "c"], "x": [1.0, 2.0, 3.0], "class": ["cat", "dog", random_.choice(HOSTILE_TEXTS[:10])]}), content
    )
    file = _file(path, "rows.parquet", damaged(content.getvalue(), random_))

    def read() -> None:
        _read_by_all(lambda: read_image_rows(file, ["a", "b"]), lambda: read_class_embeddings(file, ("cat", "dog")))

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
    file = _file(path, "instances.json", damaged_json(json.dumps(coco).encode(), random_))

    def read() -> None:
        masks = read_annotations(file)
        _read_by_all(*(functools.partial(mask, (9, 11), "a") for mask in masks.masks.values()))

    return read


TARGETS: dict[str, Target] = {
    "image": fuzzed_images.image,
    "safetensors": safetensors,
    "pt": pt,
    "pt2": pt2,
    "onnx": onnx,
    "models file": models_file,
    "study file": study,
    "npz": npz,
    "cifar": cifar,
    "csv": table,
    "parquet": parquet,
    "annotations": annotation_file,
    "manifest": fuzzed_runs.of_run("manifest.json", damaged_json, page=False),
    "scores": fuzzed_runs.of_run("scores.json", damaged_json, page=False),
    "samples": fuzzed_runs.of_run("samples.parquet", damaged, page=False),
    "zarr": fuzzed_runs.of_run("maps.zarr/**/zarr.json", damaged_json, page=False),
    "map chunk": fuzzed_runs.of_run("maps.zarr/*/*/c/0/0/0", damaged, page=False),
    "page": fuzzed_runs.of_run("*.json", damaged_json, page=True),
    "names": fuzzed_runs.names,
}

COUNTS = {
    **{"image": 3000, "safetensors": 1000, "pt": 800, "pt2": 60, "onnx": 300, "models file": 1000, "study file": 1500, "npz": 600},
    **{"cifar": 800, "csv": 600, "parquet": 400, "annotations": 800, "manifest": 150, "scores": 150, "samples": 150, "zarr": 150},
    **{"map chunk": 100, "page": 30, "names": 20},
}
"""The number of inputs of each kind that the slow tests read, 11,610 in all."""


def prepare() -> None:
    """Make the originals of all inputs before processes are forked."""
    torch.set_num_threads(1)
    for make in (images, _weights, _checkpoints, _program, _onnx, fuzzed_runs.finished):
        make()
