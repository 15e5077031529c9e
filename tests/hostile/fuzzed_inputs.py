"""The inputs of the fuzzer: for each kind, a function that writes a damaged input and returns a function with which kdx reads it."""

from __future__ import annotations

import functools
import io
import json
import pickle
import random
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from kdx.models import load
from kdx.models.models_file import read_models
from kdx.models.resnet import resnet
from kdx.study.checks import check_runs
from kdx.study.design import design_of, read_design
from kdx.study.grid import grid_of
from tests.hostile import fuzzed_data, fuzzed_images, fuzzed_runs
from tests.hostile.input_files import Call, Canary, Target, written
from tests.hostile.mutations import changed_value, damaged, damaged_json

NETWORK = "kdx:resnet,width=2,depth=1,classes=2"


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
    file = written(path, "weights.safetensors", content)
    return lambda: load(f"{NETWORK}@{file}")


@functools.cache
def _checkpoints() -> tuple[bytes, ...]:
    contents = []
    for value in (_weights(), {"state_dict": _weights(), "epoch": 3}, {"model": _weights(), "extra": Canary()}, Canary()):
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(value, file, _use_new_zipfile_serialization=zipped)
            contents.append(file.getvalue())
    return (*contents, pickle.dumps(Canary()), pickle.dumps({"state_dict": Canary()}))


def pt(path: Path, random_: random.Random) -> Call:
    """A checkpoint, damaged in most cases. Half of the checkpoints contain code."""
    content = random_.choice(_checkpoints())
    if content[:2] == b"PK" and random_.random() < 0.5:
        content = _damaged_zip(content, random_, damaged)
    elif random_.random() < 0.75:
        content = damaged(content, random_, random_.choice(_checkpoints()))
    file = written(path, random_.choice(("weights.pt", "weights.pth", "weights.bin")), content)
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
    file = written(path, "network.pt2", content)
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

    file = written(path, "x.onnx", damaged(_onnx(), random_))

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
        "classes": ["cat", "dog"],
        "preprocessing": {"size": [8, 8], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize": "cover", "interpolation": "bilinear"},
        "data": {"reference": "digits", "fingerprint": "0123", "split_seed": 1, "used": "used.npy"},
        "training": {"method": "kd", "probe": "probe.csv", "probe_images": 3},
    }  # fmt: skip
    file = written(path, "models.toml", _toml_file(content, random_))

    def read() -> None:
        models = read_models(file)
        models.load("student")

    return read


def study(path: Path, random_: random.Random) -> Call:
    content = {
        "data": {"digits": "sample:60:digits", "more": {"reference": "digits", "training": {"epochs": 2}, "explain": {"seed": 1}}},
        "teachers": {"large": "kdx:resnet,width=3"}, "students": ["kdx:resnet,width=2"],
        "methods": {"soft": "kd", "both": "kd+at:0.5"},
        "assistants": {"medium": "kdx:resnet,width=3"}, "seeds": [0, 1], "images": 100, "layers": ["layer2"],
        "training": {"epochs": 1, "image_size": 8, "batch": 8, "learning_rate": 0.1},
        "explain": {"permutations": 5, "gallery": 1, "batch": 8},
    }  # fmt: skip
    file = written(path, "study.toml", _toml_file(content, random_))

    def read() -> None:
        design = design_of(read_design(file))
        design.as_table()
        check_runs(grid_of(design).jobs)

    return read


TARGETS: dict[str, Target] = {
    "image": fuzzed_images.image,
    "safetensors": safetensors,
    "pt": pt,
    "pt2": pt2,
    "onnx": onnx,
    "models file": models_file,
    "study file": study,
    "npz": fuzzed_data.npz,
    "cifar": fuzzed_data.cifar,
    "parquet images": fuzzed_data.image_table,
    "tar shards": fuzzed_data.shards,
    "arrow": fuzzed_data.arrow,
    "csv": fuzzed_data.table,
    "parquet": fuzzed_data.parquet,
    "annotations": fuzzed_data.annotation_file,
    "manifest": fuzzed_runs.of_run("manifest.json", damaged_json, page=False),
    "scores": fuzzed_runs.of_run("scores.json", damaged_json, page=False),
    "samples": fuzzed_runs.of_run("samples.parquet", damaged, page=False),
    "zarr": fuzzed_runs.of_run("maps.zarr/**/zarr.json", damaged_json, page=False),
    "map chunk": fuzzed_runs.of_run("maps.zarr/*/*/c/0/0/0", damaged, page=False),
    "page": fuzzed_runs.of_run("*.json", damaged_json, page=True),
    "names": fuzzed_runs.names,
    "distillation": fuzzed_runs.distillation,
}

COUNTS = {
    **{"image": 2000, "safetensors": 800, "pt": 800, "pt2": 60, "onnx": 300, "models file": 1000, "study file": 800, "npz": 600},
    **{"cifar": 800, "csv": 600, "parquet": 400, "annotations": 800, "manifest": 70, "scores": 70, "samples": 70, "zarr": 70},
    **{"parquet images": 600, "tar shards": 600, "arrow": 300, "map chunk": 50, "page": 20, "names": 12, "distillation": 24},
}
"""The number of inputs of each kind that the slow tests read, 10,846 in all."""


def prepare() -> None:
    """Make the originals of all inputs before processes are forked."""
    torch.set_num_threads(1)
    originals = (_weights, _checkpoints, _program, _onnx, fuzzed_images.images, fuzzed_data.arrow_folder)
    for make in (*originals, fuzzed_runs.finished, fuzzed_runs.stopped):
        make()
