"""Checkpoints as training programs write them: entries, prefixes, averaged weights, foreign objects, and files that are not weights."""

from __future__ import annotations

import argparse
import collections
import io
import pathlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kdx import models
from kdx.errors import KdxError
from kdx.models.weights import load_weights, split_key

pytestmark = pytest.mark.usefixtures("no_gpu")

RAN: list[str] = []
"""What code of a pickled object did. It must stay empty."""


class Loud:
    """An object whose class leaves a trace whenever any of its code runs."""

    def __new__(cls, *_: object) -> Loud:
        RAN.append("new")
        return super().__new__(cls)

    def __init__(self) -> None:
        self.value = 1

    def __setstate__(self, state: object) -> None:
        RAN.append("setstate")

    def __reduce__(self) -> Any:
        return (Loud, (), {"value": 1})


class Caller:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class Items(list[int]):
    """A list of a type of its own."""


def network(seed: int = 0, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    body = nn.Sequential(collections.OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), pool=nn.AdaptiveAvgPool2d(1)))
    return nn.Sequential(collections.OrderedDict(body=body, flat=nn.Flatten(), head=nn.Linear(4, classes)))


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def loaded(content: object, path: Path, key: str = "", *, legacy: bool = False) -> tuple[int, str]:
    """The seed of the network whose weights are taken from a file with this content, and the note."""
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    module = network(99)
    note = load_weights(module, f"{path}{key}")
    for seed in range(5):
        if all(torch.equal(tensor, module.state_dict()[name]) for name, tensor in network(seed).state_dict().items()):
            return seed, note
    raise AssertionError("the weights are those of no network")


RAW, OTHER = network(0).state_dict(), network(1).state_dict()


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (RAW, ""),
        ({"state_dict": RAW, "epoch": torch.tensor(3)}, ""),
        ({"state_dict": {"model": RAW}, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}, ""),
        ({"net": RAW}, "the entry net"),
        ({"weights": RAW, "acc": 0.5}, "the entry weights"),
        ({"what_we_trained": RAW, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}}, "the entry what_we_trained"),
        ({"state_dict": OTHER, "state_dict_ema": RAW}, r"the averaged weights (EMA) state_dict_ema instead of state_dict"),
        ({"model": OTHER, "model_ema": {"module": RAW}}, r"the averaged weights (EMA) model_ema/module instead of model"),
        ({"state_dict": OTHER, "state_dict_ema": None}, None),
        (prefixed("module._orig_mod.", RAW), "names without '_orig_mod.' and 'module.'"),
        (prefixed("_orig_mod.module.", RAW), "names without '_orig_mod.' and 'module.'"),
        (prefixed("encoder_q.", RAW) | {"queue": torch.ones(2)}, "names without 'encoder_q.'; not used: queue"),
        ({"state_dict": prefixed("model.", RAW) | {"loss.weight": torch.ones(3)}}, "names without 'model.'; not used: loss.weight"),
        ({"state_dict": prefixed("net.", OTHER) | prefixed("net_ema.module.", RAW)}, "names without 'net_ema.module.' (EMA)"),
        ({name.replace("body.", "body._orig_mod."): tensor for name, tensor in RAW.items()}, "names without '_orig_mod.'"),
        (RAW | {"n_averaged": torch.tensor(5), "head.total_ops": torch.ones(1)}, "not used: n_averaged, head.total_ops"),
        (RAW | {"head._extra_state": {"scale": 1}, "_metadata": None}, "not used: head._extra_state, _metadata"),
    ],
)  # fmt: skip
def test_weights_are_recognised_in_what_programs_write(tmp_path: Path, content: Any, note: str | None) -> None:
    seed, line = loaded(content, tmp_path / "w.ckpt")
    assert seed == (1 if note is None else 0)
    assert note in line if note else not line
    if note:
        assert line.startswith("Weights of w.ckpt: ") and line.endswith(".") and "\n" not in line


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_wrappers_of_pytorch_write_files_that_load(tmp_path: Path) -> None:
    """Names as PyTorch itself makes them, not as this test imagines them."""
    averaged = AveragedModel(network(0), multi_avg_fn=get_ema_multi_avg_fn(0.9))
    averaged.update_parameters(network(0))
    seed, note = loaded({"model": OTHER, "model_ema": averaged.state_dict(), "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pth")
    assert seed == 0 and "instead of model; names without 'module.'; not used: n_averaged" in note
    compiled = torch.compile(nn.DataParallel(network(2)))
    assert loaded(compiled.state_dict(), tmp_path / "b.pth")[0] == 2  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_network_inside_a_module_takes_the_weights_of_the_inner_one(tmp_path: Path) -> None:
    torch.save(RAW, tmp_path / "w.pt")
    for outer in (nn.DataParallel(network(9)), torch.compile(network(9))):
        load_weights(outer, tmp_path / "w.pt")  # type: ignore[arg-type]
        inner = list(outer.state_dict().values())  # type: ignore[attr-defined]
        assert all(torch.equal(tensor, other) for tensor, other in zip(inner, RAW.values(), strict=True))


def test_a_key_names_an_entry_or_the_beginning_of_the_names(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    pair = {"student": prefixed("module.backbone.", RAW), "teacher": prefixed("backbone.", OTHER)}
    for key, seed in (("student", 0), ("teacher", 1)):
        assert loaded(pair, path, f"#{key}")[0] == seed
        flat = {"state_dict": {f"{key}.{name}": tensor for key, part in pair.items() for name, tensor in part.items()}}
        assert loaded(flat, path, f"#{key}")[0] == seed and loaded(flat, path, f"#state_dict/{key}")[0] == seed
        for content in (pair, flat):
            torch.save(content, path)
            with pytest.raises(KdxError, match=r"several networks: .*student.*teacher.*\n.*@w.pth#student"):
                load_weights(network(), path)
            with pytest.raises(KdxError, match=r"no entry 'pupil'\.\n.*student, teacher"):
                load_weights(network(), f"{path}#pupil")
    averaged = {"state_dict": OTHER, "state_dict_ema": RAW}
    assert loaded(averaged, path, "#state_dict") == (1, "") and loaded(averaged, path, "#state_dict_ema")[0] == 0
    save_file(prefixed("b.", RAW) | prefixed("a.", OTHER), tmp_path / "w.safetensors")
    module = network(9)
    load_weights(module, f"{tmp_path}/w.safetensors#b")
    assert torch.equal(module.state_dict()["head.weight"], RAW["head.weight"])


def test_a_file_that_exists_is_not_a_key(tmp_path: Path) -> None:
    assert split_key("a.pth#state_dict_ema") == (Path("a.pth"), "state_dict_ema")
    assert split_key("x#1/a.pth") == (Path("x#1/a.pth"), None)
    assert split_key("x#1/a.ckpt#b#c") == (Path("x#1/a.ckpt"), "b#c")
    torch.save({"model": OTHER}, tmp_path / "w.pth")
    torch.save(RAW, tmp_path / "w.pth#model.pth")
    module = network(9)
    load_weights(module, f"{tmp_path}/w.pth#model.pth")
    assert torch.equal(module.state_dict()["head.weight"], RAW["head.weight"])


@pytest.mark.parametrize("legacy", [False, True])
def test_foreign_objects_beside_weights_are_left_out_and_run_no_code(tmp_path: Path, legacy: bool) -> None:
    foreign = {
        "args": argparse.Namespace(lr=np.float32(0.1), out=pathlib.PurePosixPath("a"), inner=argparse.Namespace(x=np.arange(3))),
        "best": np.float64(0.9),
        "time": np.datetime64("2020-01-01"),
        "kind": np.dtype("float32"),
        "loud": Loud(),
        "calls": [Caller(eval, "RAN.append('evaluated')"), Caller(print, "printed")],
        "classes": (Loud, print, argparse.Namespace),
        "metrics": collections.defaultdict(list, {"a": [1, 2]}),
        "last": collections.deque([1, 2, 3]),
        "count": collections.Counter("abc"),
    }
    RAN.clear()
    assert loaded({**foreign, "model": RAW}, tmp_path / "w.pth", legacy=legacy) == (0, "")
    assert RAN == []
    assert not any(isinstance(entry, tuple) for entry in torch.serialization.get_safe_globals()), "nothing stays allowed"


def test_types_that_the_user_has_allowed_stay_allowed(tmp_path: Path) -> None:
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        loaded({"args": argparse.Namespace(a=1), "model": RAW}, tmp_path / "w.pth")
        assert argparse.Namespace in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()


class _Colour(str):
    """Text of a type of its own."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear objects, and no tensors"),
        ({"model": nn.Conv2d(1, 1, 1), "epoch": 1}, r"torch\.nn\.modules\.conv\.Conv2d objects"),
        ({"model": RAW, "x": Items([1, 2])}, r"of the types tests\.models\.test_checkpoints\.Items"),
        (Caller(exec, "1"), r"builtins\.exec"),
        ({"model": RAW, "x": Caller(pathlib.os.system, "true")}, r"posix\.system"),  # type: ignore[attr-defined]
        ({"model": RAW, "x": Caller(RAN.append, "ran")}, r"builtins\.getattr"),
        ({"epoch": 3}, "does not contain a state dict"),
        ([1, 2], "does not contain a state dict"),
    ],
)
def test_the_error_names_the_types_and_never_advises_to_run_code(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(KdxError, match=message) as raised:
        load_weights(network(), tmp_path / "w.pth")
    check_text(raised.value)


def check_text(error: KdxError) -> None:
    text = str(error)
    assert "weights_only" not in text and "safe_globals" not in text and text.count("\n") == 1
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "state_dict()" in error.hint


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_files_that_are_not_checkpoints_are_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(RAW, buffer)
    whole = buffer.getvalue()
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("a/readme.txt", "no weights")
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    contents = {
        "text.pth": b"<html>404 \x1b[31mNot found</html>",
        "empty.ckpt": b"",
        "zeros.bin": bytes(5000),
        "cut.pt": whole[: len(whole) // 2],
        "damaged.pt": whole[:300] + bytes(200) + whole[500:],
        "length.pt": pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2) + b"\x80\x04\x8e" + (2**62).to_bytes(8, "little"),
        "pickle.bin": pickle.dumps({"a": 1}),
        "protocol.tar": pickle.dumps(0x1950A86A20F9469CFC6C) * 3 + pickle.dumps({"a": 1}, protocol=5),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in (*contents, "other.pt", "script.pt"):
        with pytest.raises(KdxError, match=name) as raised:
            load_weights(network(), tmp_path / name)
        check_text(raised.value)


def test_a_new_head_keeps_the_other_weights(tmp_path: Path) -> None:
    reference, path = "kdx:resnet,width=4,depth=1", tmp_path / "w.ckpt"
    before = models.load(f"{reference},classes=7").module.state_dict()
    for absent in (False, True):
        torch.save({"state_dict": prefixed("net.", {n: t for n, t in before.items() if not (absent and n.startswith("fc."))})}, path)
        network = models.load(f"{reference},classes=3,new_head=true@{path}")
        assert not network.trained and network.note.endswith("a new head: fc.bias, fc.weight.")
        for name, tensor in network.module.state_dict().items():
            assert torch.equal(tensor, before[name]) != name.startswith("fc.")
    parsed = models.parse_reference(f"{reference},new_head=true@{path}")
    assert str(parsed.with_weights("b.pt")) == f"{reference}@b.pt"
    with pytest.raises(KdxError, match=r"lacks fc\.weight, fc\.bias"):
        models.load(f"{reference},classes=7@{path}")
    with pytest.raises(KdxError, match="names no weights file"):
        models.load(f"{reference},new_head=true")
    torch.save({n: t for n, t in before.items() if not n.startswith("layer2.")}, path)
    with pytest.raises(KdxError, match="lacks layer2"):
        models.load(f"{reference},classes=3,new_head=true@{path}")


def test_a_reference_with_a_key_loads_and_names_files(tmp_path: Path) -> None:
    small = "kdx:resnet,width=4,depth=1,classes=3"
    parts = {name: models.load(small).module.state_dict() for name in ("student", "teacher")}
    torch.save(parts, tmp_path / "both.pt")
    for name, state in parts.items():
        network = models.load(f"{small}@both.pt#{name}", folder=tmp_path)
        assert torch.equal(network.module.state_dict()["fc.weight"], state["fc.weight"]) and name in network.note
        assert network.reference == f"{small}@both.pt#{name}"
        assert models.file_name(network.reference) == f"resnet-both-{name}"
