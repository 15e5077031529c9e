"""Programs (.pt2): loading returns the exported network and executes no code from the file."""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdx import models
from kdx.errors import KdxError
from kdx.export.graphs import FeatureGraph, Preprocessing
from kdx.models.resnet import resnet


def saved(network: nn.Module, path: Path, images: Tensor, dynamic: bool = True) -> Path:
    shapes = ({0: torch.export.Dim("n", min=1)},) if dynamic else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(network.eval(), (images,), dynamic_shapes=shapes), path)
    return path


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return resnet(4, 1, 3).eval()


@pytest.fixture(scope="module")
def program(network: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(network, tmp_path_factory.mktemp("programs") / "net.pt2", torch.rand(2, 3, 24, 16))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_program_is_the_network_that_was_exported(network: nn.Module, program: Path, count: int) -> None:
    loaded = models.load(str(program))
    assert loaded.trained and loaded.preprocessing == Preprocessing((24, 16)) and loaded.weights_hash == models.weights_hash(network)
    layers = models.layers(loaded)
    assert layers == models.layers(network, (24, 16)) == ["layer1", "layer2", "layer3"]
    images = torch.rand(count, 3, 24, 16)
    with torch.no_grad():
        for ours, theirs in zip(FeatureGraph(loaded.module, layers)(images), FeatureGraph(network, layers)(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_tokens_and_functions_of_the_batch_size(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=2, num_classes=3)
    loaded = models.load(str(saved(network, tmp_path / "vit.pt2", torch.rand(2, 3, 48, 48))))
    images = torch.rand(3, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(images), network(images), rtol=1e-6, atol=1e-6)
    assert models.layers(loaded) == models.layers(network, (48, 48))


def test_paths_weights_and_names(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.load("net.pt2", folder=program.parent, classes=7).reference == "net.pt2"
    monkeypatch.chdir(program.parent)
    assert str(models.parse_reference("./net.pt2@w.pt").located()) == f"{program.resolve()}@w.pt"
    other = resnet(4, 1, 3)
    torch.save(other.state_dict(), tmp_path / "w.pt")
    assert models.load(f"net.pt2@{tmp_path / 'w.pt'}").weights_hash == models.weights_hash(other)
    assert models.file_name("runs/a b.pt2") == "a-b" and models.file_name("runs/net.pt2@w.pt") == "net-w"


def test_a_program_of_one_batch_size_is_refused_with_a_hint(network: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(KdxError, match=r"only batches of 2 images.*\n.*dynamic_shapes"):
        models.load(str(saved(network, tmp_path / "net.pt2", torch.rand(2, 3, 16, 16), dynamic=False)))


def test_files_that_are_not_programs_are_refused(program: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.pt2").write_bytes(program.read_bytes()[:3000])
    torch.save({}, tmp_path / "weights.pt2")
    (tmp_path / "empty.pt2").touch()
    for name, message in (
        ("cut", "cannot be read"),
        ("weights", "contains no model.json"),
        ("empty", "cannot be read"),
        ("none", "There is no"),
    ):
        with pytest.raises(KdxError, match=message):
            models.load(str(tmp_path / f"{name}.pt2"))


# ---- hostile files ----


def edited(program: Path, out: Path, change: Callable[[dict[str, Any]], None], record: str = "models/model.json") -> str:
    """The program with one JSON record changed."""
    with zipfile.ZipFile(program) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith(record):
                value = json.loads(content)
                change(value)
                content = json.dumps(value).encode()
            target.writestr(name, content)
    return str(out)


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_example_inputs_are_not_unpickled(program: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    out = tmp_path / "net.pt2"
    content = io.BytesIO()
    torch.save((Bomb(trace),), content)
    with zipfile.ZipFile(program) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            target.writestr(name, content.getvalue() if name.endswith("sample_inputs/model.pt") else source.read(name))
    assert models.load(str(out)).parameters > 0 and not trace.exists()
    pickle.loads(pickle.dumps(Bomb(trace)))
    assert trace.exists()  # the bomb works


def first_node(value: dict[str, Any]) -> dict[str, Any]:
    node: dict[str, Any] = value["graph_module"]["graph"]["nodes"][0]
    return node


def call(target: str) -> Callable[[dict[str, Any]], None]:
    return lambda value: first_node(value).update(target=target)


def rename(value: dict[str, Any]) -> None:
    graph = value["graph_module"]["graph"]
    graph["nodes"][0]["outputs"][0]["as_tensor"]["name"] = "x; __import__('os')"


def size(text: str) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        meta = value["graph_module"]["graph"]["tensor_values"]["images"]
        meta["sizes"][0]["as_expr"]["expr_str"] = text

    return change


def structure(name: str) -> Callable[[dict[str, Any]], None]:
    def change(value: dict[str, Any]) -> None:
        value["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps(
            [1, {"type": name, "context": "null", "children_spec": []}]
        )

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (call("torch.os.system"), "calls 'torch.os.system'"),
        (call("_operator.methodcaller"), "calls '_operator.methodcaller'"),
        (call("torch.ops.aten.from_file.default"), "from_file"),
        (call("torch.ops.aten.add.__class__"), "__class__"),
        (call("torch.ops.aten.no_such.default"), "no_such"),
        (call("#own.thing"), "#own.thing"),
        (rename, "is not a plain name"),
        (size("__import__('os').system('true')"), "not arithmetic"),
        (size("Symbol('s0', positive=print(1))"), "not arithmetic"),
        (size("Mul('open(1)', 2)"), "not arithmetic"),
        (size("[s0 for s0 in (1,)]"), "not arithmetic"),
        (structure("collections.defaultdict"), "takes or returns a collections.defaultdict"),
    ],
)
def test_a_graph_with_more_than_data_is_refused(
    program: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    with pytest.raises(KdxError, match=message):
        models.load(edited(program, tmp_path / "net.pt2", change))


def test_guards_are_not_run_and_pickled_tensors_are_refused(program: Path, tmp_path: Path) -> None:
    def guard(value: dict[str, Any]) -> None:
        value["guards_code"] = ["1/0"]

    def pickled(value: dict[str, Any]) -> None:
        next(iter(value["config"].values()))["use_pickle"] = True

    def elsewhere(value: dict[str, Any]) -> None:
        next(iter(value["config"].values()))["path_name"] = "custom_obj_0"

    loaded = models.load(edited(program, tmp_path / "guard.pt2", guard))
    with torch.no_grad():
        assert loaded.module(torch.rand(2, 3, 24, 16)).shape == (2, 3)
    for number, change in enumerate((pickled, elsewhere)):
        with pytest.raises(KdxError, match="tensors are pickled"):
            models.load(edited(program, tmp_path / f"{number}.pt2", change, "weights_config.json"))
