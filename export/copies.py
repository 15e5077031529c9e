"""Copies of networks. Unlike copy.deepcopy, they survive attributes that cannot be copied."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_COMPILED_CALL = "_compiled_call_impl"
"""Where `torch.nn.Module.compile` stores compiled code. copy.deepcopy leaves it out too."""


def copied(module: ModuleT) -> ModuleT:
    """A copy of ``module`` that shares no parameter, buffer, module or container with it, and runs without torch.compile.

    Tensors with a history, such as a stored activation or the weight of the old ``weight_norm`` after a training step, are copied
    without their history. Objects that cannot be copied, such as locks and open files, are shared. A compiled module inside is
    replaced by the module that was compiled, because compiled code ignores hooks that are registered later.
    """
    memo: dict[int, Any] = {}
    for inner in module.modules():
        if hasattr(inner, "_orig_mod"):
            memo[id(inner)] = _copied_module(original(inner), memo)
    copy_of_module: ModuleT = _copied_module(module, memo)
    for inner in copy_of_module.modules():
        _remove_compiled_code(inner)
    return copy_of_module


def to_eval_mode(module: nn.Module) -> None:
    """Eval mode, also of modules whose own ``eval`` or ``train`` raises an exception."""
    try:
        module.eval()  # its result is not used: a user's train() may return nothing
    except Exception:  # the user's code, such as a guard that forbids another mode
        for inner in module.modules():
            inner.training = False


def original(module: nn.Module) -> nn.Module:
    """The module that torch.compile has wrapped, or the module itself."""
    while isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
        module = inner
    return module


def _copied_module(module: Any, memo: dict[int, Any]) -> Any:
    trial = dict(memo)
    try:
        duplicate = copy.deepcopy(module, trial)
    except Exception:  # any attribute of a user's module may refuse; a refused copy leaves half-filled objects in the memo
        return _copied_by_attribute(module, memo)
    memo |= trial
    return duplicate


def _copied_by_attribute(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy whose modules are created empty first, so that references between them are kept, and then receive one attribute at a time."""
    new = [inner for inner in module.modules() if id(inner) not in memo]
    for inner in new:
        memo[id(inner)] = type(inner).__new__(type(inner))
    for inner in new:
        attributes = {name: _copied_value(value, memo) for name, value in vars(inner).items() if name != _COMPILED_CALL}
        vars(memo[id(inner)]).update(attributes)
    duplicate: nn.Module = memo[id(module)]
    return duplicate


def _copied_value(value: Any, memo: dict[int, Any]) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    trial = dict(memo)
    try:
        duplicate = copy.deepcopy(value, trial)
    except Exception:
        duplicate = _without_history(value, memo)
        memo[id(value)] = duplicate
        return duplicate
    memo |= trial
    return duplicate


def _without_history(value: Any, memo: dict[int, Any]) -> Any:
    """A copy of something that copy.deepcopy refuses: tensors lose their history, containers are copied, and other objects are shared."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        items = {key: _copied_value(item, memo) for key, item in value.items()}
        return type(value)(items) if type(value) is not dict else items  # type: ignore[call-arg]
    if type(value) in (list, tuple, set):
        return type(value)(_copied_value(item, memo) for item in value)
    return value


def _remove_compiled_code(module: nn.Module) -> None:
    """Replace every compiled method of ``module`` by the method that was compiled."""
    for name, value in list(vars(module).items()):
        method = _compiled_from(value)
        if method is not None:
            function = method.__func__ if isinstance(method, types.MethodType) else method
            is_own = isinstance(method, types.MethodType) and type(method.__self__) is type(module)
            setattr(module, name, types.MethodType(function, module) if is_own else method)
    for cls in reversed(type(module).__mro__):
        for name, value in vars(cls).items():
            method = _compiled_from(value) if isinstance(value, types.FunctionType) else None
            if method is not None and getattr(type(module), name) is value and name not in vars(module):
                setattr(module, name, types.MethodType(method, module))


def _compiled_from(value: object) -> Callable[..., Any] | None:
    method: Callable[..., Any] | None = getattr(value, "_torchdynamo_orig_callable", None) if callable(value) else None
    if method is None or isinstance(value, nn.Module | torch._ops.OpOverload):
        return None
    return method
