"""Programs that ``torch.export.save`` wrote (.pt2), read without running anything that the file brings.

``torch.export.load`` alone is no safe reader: it unpickles example inputs and odd tensors, evaluates symbolic sizes as Python, resolves
operators by any name under ``torch``, and writes names into source code that it compiles. So the archive is written anew in memory from
what is checked here to be data: tensors as raw bytes, ATen operators, arithmetic on sizes, and names that are only names.
"""

from __future__ import annotations

import ast
import io
import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kdx.errors import KdxError, first_line
from kdx.export.graphs import Preprocessing

_NAME = re.compile(r"(?!__)[\w@]*(\.(?!__)[\w@]*)*", re.ASCII)

_STACK = re.compile(r"[\w.,;@\[\]()' ]*", re.ASCII)

_ATEN = re.compile(r"torch\.ops\.aten\.((?!__)\w+)\.((?!__)\w+)", re.ASCII)

_TOUCHES_FILES = ("from_file",)

_ON_SIZES = {
    f"_operator.{name}" for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge")
}

_SIZE_FUNCTIONS = {"Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod", "floor", "ceiling"} | {
    *("FloorDiv", "CeilDiv", "CleanDiv", "PythonMod", "IntTrueDiv", "FloatTrueDiv", "FloorToInt", "CeilToInt", "ToFloat"),
    *("Eq", "Ne", "Equality", "Unequality", "LessThan", "GreaterThan", "StrictLessThan", "StrictGreaterThan"),
}

_SYMBOL = re.compile(r"[a-z]{1,4}\d+", re.ASCII)

_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict")

_NOT_DATA = ("as_graph", "as_custom_obj", "as_operator", "as_script_obj")

_RECORD = re.compile(r"(weight|tensor)_\d+", re.ASCII)


def load_program(path: Path) -> tuple[nn.Module, Preprocessing]:
    """The network of a .pt2 file, its submodules under their own names, and the size its images have.

    It is for inference: batch normalisation and dropout are as they were when it was exported. Raises KdxError for a file that is
    missing or damaged, that holds more than data, or that was exported for one batch size alone.
    """
    if not path.is_file():
        raise KdxError(f"There is no program {path}.", "Check the path; it is relative to the models file, or to the current folder.")
    try:
        archive, size = _checked(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's own, of its own deprecated calls
            program = torch.export.load(archive)
            return torch.export.unflatten(program), Preprocessing(size)
    except KdxError:
        raise
    except Exception as error:  # a damaged file fails in any of a dozen ways
        raise KdxError(
            f"{path} cannot be read as a program: {first_line(error)}.",
            f"Save it again: torch.export.save(torch.export.export(...), {path.name!r}), with the PyTorch that runs here.",
        ) from error


def _checked(path: Path) -> tuple[io.BytesIO, tuple[int, int] | None]:
    """The archive again with nothing but checked data, and the size of its images where it is fixed."""
    written = io.BytesIO()
    with zipfile.ZipFile(path) as file, zipfile.ZipFile(written, "w") as archive:
        # Every record is in one folder, which is named after the file.
        records = {name.partition("/")[2]: name for name in file.namelist()}
        if "models/model.json" not in records:
            raise _refused("it holds no model.json", "Save one program with torch.export.save.")
        kept = {name: file.read(records[name]) for name in ("archive_format", "archive_version", "byteorder", ".data/version")}
        model = json.loads(file.read(records["models/model.json"]))
        size = _image_size(model)
        kept["models/model.json"] = json.dumps(_checked_model(model)).encode()
        kept["data/sample_inputs/model.pt"] = b""  # pickled, and of no use here
        for folder, kind in (("weights", "weights"), ("constants", "constants")):
            name = f"data/{folder}/model_{kind}_config.json"
            config = json.loads(file.read(records[name]))
            _check(config)
            kept[name] = json.dumps(config).encode()
            for payload in config["config"].values():
                if payload["use_pickle"] or not _RECORD.fullmatch(payload["path_name"]):
                    raise _refused("some of its tensors are pickled", "Export a network of plain tensors.")
                record = f"data/{folder}/{payload['path_name']}"
                kept[record] = file.read(records[record])
        for name, content in kept.items():
            archive.writestr(f"model/{name}", content)
    written.seek(0)
    return written, size


def _refused(what: str, hint: str = "Export the network with plain layers; kdx runs nothing that a file brings.") -> KdxError:
    return KdxError(f"The program is not read, because {what}.", hint)


def _image_size(model: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of the one input, None where they are dynamic; KdxError where the batch is not."""
    graph = model["graph_module"]["graph"]
    names = [
        spec["user_input"]["arg"]["as_tensor"]["name"] for spec in model["graph_module"]["signature"]["input_specs"] if "user_input" in spec
    ]
    sizes = graph["tensor_values"][names[0]]["sizes"] if len(names) == 1 else []
    if len(sizes) != 4:
        raise _refused("its input is not one batch of images [n, 3, H, W]", "Export the network as it takes images.")
    batch, _, height, width = sizes
    if "as_int" in batch:
        raise _refused(
            f"it takes a batch of {batch['as_int']} images alone",
            "Export it from two images or more with dynamic_shapes=({0: torch.export.Dim('n', min=1)},).",
        )
    return (height["as_int"], width["as_int"]) if "as_int" in height and "as_int" in width else None


def _checked_model(model: dict[str, Any]) -> dict[str, Any]:
    module = model["graph_module"]
    model = {**model, "guards_code": [], "torch_version": ""}  # Python code that tests inputs, and a note
    _check(model)
    if not all(_SYMBOL.fullmatch(name) for name in model["range_constraints"]) or module.get("treespec_namedtuple_fields"):
        raise _refused("its sizes or outputs have names of their own kind")
    return {**model, "graph_module": {**module, "metadata": {}}}


def _check(value: Any, key: str = "") -> None:
    """KdxError where JSON holds more than data; a node's metadata is reduced, in place, to the modules it stands in."""
    if isinstance(value, dict):
        if "nn_module_stack" in value.get("metadata", {}) or "target" in value:
            value["metadata"] = {name: text for name, text in value.get("metadata", {}).items() if name == "nn_module_stack"}
        for name, item in value.items():
            if name in _NOT_DATA and item:
                raise _refused(f"it holds {name.removeprefix('as_')} arguments")
            if not _NAME.fullmatch(name):
                raise _refused(f"{name!r} is no name")
            if key != "graph_module" or name != "metadata":
                _check(item, name)
    elif isinstance(value, list):
        for item in value:
            _check(item, key)
    elif isinstance(value, str) and key != "as_string":  # text that an operator takes, as in padding="same", is written as text
        _check_text(value, key)


def _check_text(text: str, key: str) -> None:
    if key == "target":
        _check_operator(text)
    elif key in ("in_spec", "out_spec"):
        _check_structure(json.loads(text)[1])
    elif key == "expr_str":
        if not _is_arithmetic(ast.parse(text, mode="eval").body):
            raise _refused(f"a size in it is no arithmetic: {text!r}")
    elif not (_STACK if key == "nn_module_stack" else _NAME).fullmatch(text):
        raise _refused(f"{text!r} is no name")


def _is_arithmetic(node: ast.AST) -> bool:
    """Whether an expression has numbers, symbols and functions of them only; SymPy evaluates what it is given as Python."""
    if isinstance(node, ast.Call):
        named = all(isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, bool) for keyword in node.keywords)
        return named and isinstance(node.func, ast.Name) and node.func.id in _SIZE_FUNCTIONS and all(map(_is_arithmetic, node.args))
    if isinstance(node, ast.BinOp):
        return _is_arithmetic(node.left) and _is_arithmetic(node.right)
    if isinstance(node, ast.UnaryOp):
        return _is_arithmetic(node.operand)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return bool(_SYMBOL.fullmatch(node.value) or re.fullmatch(r"[\d.e+-]+", node.value))  # Symbol('s0'), Float('0.5')
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and bool(_SYMBOL.fullmatch(node.id)))


def _check_operator(target: str) -> None:
    match = _ATEN.fullmatch(target)
    if match and match[1] not in _TOUCHES_FILES:
        packet = getattr(torch.ops.aten, match[1], None)
        if isinstance(getattr(packet, match[2], None), torch._ops.OpOverload):
            return
    if target not in _ON_SIZES:
        raise _refused(f"it calls {target!r}, which is none of PyTorch's own operators on tensors")


def _check_structure(spec: Mapping[str, Any]) -> None:
    """Only nested tuples, lists and dicts: another type's name would be imported."""
    if spec["type"] not in _CONTAINERS:
        raise _refused(f"it takes or gives a {spec['type']}", "Export a module that takes images and returns a tensor of logits.")
    for child in spec["children_spec"]:
        _check_structure(child)
