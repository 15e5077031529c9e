"""Programs that ``torch.export.save`` wrote (.pt2), read without executing code from the file.

``torch.export.load`` alone is not a safe reader: it unpickles example inputs and unusual tensors, evaluates symbolic sizes as Python,
resolves operators by any name under ``torch``, and writes names into source code that it compiles. Therefore the archive is copied in
memory, and the copy contains only what is checked here to be data: tensors as raw bytes, ATen operators, arithmetic on sizes, and plain
names.
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

from kdx.disk import parse_json
from kdx.errors import KdxError, first_line
from kdx.export.graphs import Preprocessing

_NAME = re.compile(r"(?!__)[\w@]*(\.(?!__)[\w@]*)*", re.ASCII)

_MODULE_STACK = re.compile(r"[\w.,;@\[\]()' ]*", re.ASCII)

_ATEN_OPERATOR = re.compile(r"torch\.ops\.aten\.((?!__)\w+)\.((?!__)\w+)", re.ASCII)

_FILE_OPERATORS = ("from_file",)

_SIZE_OPERATORS = {
    f"_operator.{name}" for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge")
}

_SIZE_FUNCTIONS = {"Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod", "floor", "ceiling"} | {
    *("FloorDiv", "CeilDiv", "CleanDiv", "PythonMod", "IntTrueDiv", "FloatTrueDiv", "FloorToInt", "CeilToInt", "ToFloat"),
    *("Eq", "Ne", "Equality", "Unequality", "LessThan", "GreaterThan", "StrictLessThan", "StrictGreaterThan"),
}

_SIZE_SYMBOL = re.compile(r"[a-z]{1,4}\d+", re.ASCII)

_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict")

_CODE_ARGUMENTS = ("as_graph", "as_custom_obj", "as_operator", "as_script_obj")

_TENSOR_RECORD = re.compile(r"(weight|tensor)_\d+", re.ASCII)


def load_program(path: Path) -> tuple[nn.Module, Preprocessing]:
    """The network of a .pt2 file, with its submodules under their original names, and a preprocessing of its image size only.

    It is for inference: batch normalisation and dropout stay as they were at export. Raises KdxError for a file that is missing or
    damaged, that contains more than data, or that was exported for a single batch size.
    """
    if not path.is_file():
        raise KdxError(f"There is no program {path}.", "Check the path; it is relative to the models file, or to the current folder.")
    try:
        archive, size = _checked_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns about its own deprecated calls
            program = torch.export.load(archive)
            return torch.export.unflatten(program), Preprocessing(size)
    except KdxError:
        raise
    except Exception as error:  # a damaged file raises many kinds of errors
        raise KdxError(
            f"{path} cannot be read as a program: {first_line(error)}.",
            f"Save it again: torch.export.save(torch.export.export(...), {path.name!r}), with the PyTorch that runs here.",
        ) from error


def _checked_archive(path: Path) -> tuple[io.BytesIO, tuple[int, int] | None]:
    """A copy of the archive that contains checked data only, and its image size, None if that is dynamic."""
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as file, zipfile.ZipFile(copy, "w") as archive:
        # All records are in one folder, which is named after the file.
        records = {name.partition("/")[2]: name for name in file.namelist()}
        if "models/model.json" not in records:
            raise _refusal("it contains no model.json", "Save one program with torch.export.save.")
        contents = {name: file.read(records[name]) for name in ("archive_format", "archive_version", "byteorder", ".data/version")}
        model = parse_json(file.read(records["models/model.json"]))
        size = _image_size(model)
        contents["models/model.json"] = json.dumps(_checked_model(model)).encode()
        contents["data/sample_inputs/model.pt"] = b""  # pickled, and not needed
        for folder, kind in (("weights", "weights"), ("constants", "constants")):
            name = f"data/{folder}/model_{kind}_config.json"
            config = parse_json(file.read(records[name]))
            _check(config)
            contents[name] = json.dumps(config).encode()
            for payload in config["config"].values():
                if payload["use_pickle"] or not _TENSOR_RECORD.fullmatch(payload["path_name"]):
                    raise _refusal("some of its tensors are pickled", "Export a network of plain tensors.")
                record = f"data/{folder}/{payload['path_name']}"
                contents[record] = file.read(records[record])
        for name, content in contents.items():
            archive.writestr(f"model/{name}", content)
    copy.seek(0)
    return copy, size


def _refusal(reason: str, hint: str = "Export the network with plain layers; kdx executes no code from a file.") -> KdxError:
    return KdxError(f"The program is not read, because {reason}.", hint)


def _image_size(model: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of the only input, None if they are dynamic; KdxError if the batch size is fixed."""
    graph = model["graph_module"]["graph"]
    names = [
        spec["user_input"]["arg"]["as_tensor"]["name"] for spec in model["graph_module"]["signature"]["input_specs"] if "user_input" in spec
    ]
    sizes = graph["tensor_values"][names[0]]["sizes"] if len(names) == 1 else []
    if len(sizes) != 4:
        raise _refusal("its input is not one batch of images [n, 3, H, W]", "Export the network with images as its only input.")
    batch, _, height, width = sizes
    if "as_int" in batch:
        raise _refusal(
            f"it takes only batches of {batch['as_int']} images",
            "Export it from two images or more with dynamic_shapes=({0: torch.export.Dim('n', min=1)},).",
        )
    return (height["as_int"], width["as_int"]) if "as_int" in height and "as_int" in width else None


def _checked_model(model: dict[str, Any]) -> dict[str, Any]:
    module = model["graph_module"]
    model = {**model, "guards_code": [], "torch_version": ""}  # the guards are Python code that tests inputs
    _check(model)
    if not all(_SIZE_SYMBOL.fullmatch(name) for name in model["range_constraints"]) or module.get("treespec_namedtuple_fields"):
        raise _refusal("its sizes or outputs have types or names that kdx does not know")
    return {**model, "graph_module": {**module, "metadata": {}}}


def _check(value: Any, key: str = "") -> None:
    """Raise KdxError for JSON that contains more than data. A node's metadata is reduced in place to its module stack."""
    if isinstance(value, dict):
        if "nn_module_stack" in value.get("metadata", {}) or "target" in value:
            value["metadata"] = {name: text for name, text in value.get("metadata", {}).items() if name == "nn_module_stack"}
        for name, item in value.items():
            if name in _CODE_ARGUMENTS and item:
                raise _refusal(f"it contains {name.removeprefix('as_')} arguments")
            if not _NAME.fullmatch(name):
                raise _refusal(f"{name!r} is not a plain name")
            if key != "graph_module" or name != "metadata":
                _check(item, name)
    elif isinstance(value, list):
        for item in value:
            _check(item, key)
    elif isinstance(value, str) and key != "as_string":  # as_string is an operator's argument, as in padding="same"
        _check_text(value, key)


def _check_text(text: str, key: str) -> None:
    if key == "target":
        _check_operator(text)
    elif key in ("in_spec", "out_spec"):
        _check_structure(parse_json(text)[1])
    elif key == "expr_str":
        if not _is_arithmetic(ast.parse(text, mode="eval").body):
            raise _refusal(f"a size in it is not arithmetic: {text!r}")
    elif not (_MODULE_STACK if key == "nn_module_stack" else _NAME).fullmatch(text):
        raise _refusal(f"{text!r} is not a plain name")


def _is_arithmetic(node: ast.AST) -> bool:
    """Whether an expression has only numbers, symbols and functions of them. SymPy evaluates its input as Python."""
    if isinstance(node, ast.Call):
        booleans = all(isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, bool) for keyword in node.keywords)
        return booleans and isinstance(node.func, ast.Name) and node.func.id in _SIZE_FUNCTIONS and all(map(_is_arithmetic, node.args))
    if isinstance(node, ast.BinOp):
        return _is_arithmetic(node.left) and _is_arithmetic(node.right)
    if isinstance(node, ast.UnaryOp):
        return _is_arithmetic(node.operand)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return bool(_SIZE_SYMBOL.fullmatch(node.value) or re.fullmatch(r"[\d.e+-]+", node.value))  # Symbol('s0'), Float('0.5')
    return isinstance(node, ast.Constant) or (isinstance(node, ast.Name) and bool(_SIZE_SYMBOL.fullmatch(node.id)))


def _check_operator(target: str) -> None:
    match = _ATEN_OPERATOR.fullmatch(target)
    if match and match[1] not in _FILE_OPERATORS:
        packet = getattr(torch.ops.aten, match[1], None)
        if isinstance(getattr(packet, match[2], None), torch._ops.OpOverload):
            return
    if target not in _SIZE_OPERATORS:
        raise _refusal(f"it calls {target!r}, which is not one of PyTorch's operators on tensors")


def _check_structure(spec: Mapping[str, Any]) -> None:
    """Allow only nested tuples, lists and dicts, because PyTorch would import any other type by its name."""
    if spec["type"] not in _CONTAINERS:
        raise _refusal(f"it takes or returns a {spec['type']}", "Export a module that takes images and returns a tensor of logits.")
    for child in spec["children_spec"]:
        _check_structure(child)
