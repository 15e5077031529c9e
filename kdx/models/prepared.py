"""The entry point for modules that users pass: it unwraps them, refuses what cannot be explained, and copies the rest."""

from __future__ import annotations

import inspect

from torch import nn

from kdx.errors import KdxError
from kdx.export import dependence, layouts
from kdx.export.copies import copied, original, to_eval_mode
from kdx.kernels import ambient

_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "ModelEma": "ema",
    "ModelEmaV2": "module",
    "ModelEmaV3": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}
"""The classes of PyTorch and timm that only run, replicate or average another module, and the attribute that is that module."""


@ambient.neutral()  # parameters that are copied in inference mode could not be used outside of it
def prepared(module: nn.Module) -> nn.Module:
    """A copy of a user's module in eval mode, for passes, gradients and exports. The user's module stays as it is.

    The copy is made of the module inside DataParallel, DistributedDataParallel, torch.compile, AveragedModel and timm's EMA wrappers.
    `kdx.export.copies.copied` describes what it shares with the original.

    Raises KdxError, with the name of the module, for scripted, uninitialised, quantised and sharded modules, and for parameters without
    data.
    """
    module = unwrapped(module)
    check_kind(module)
    copy_of_module = copied(module)
    to_eval_mode(copy_of_module)
    for inner in copy_of_module.modules():
        if isinstance(inner, nn.DataParallel):
            inner.device_ids = []  # it then calls its module in this thread, so that hooks work
    dependence.share_record(module, copy_of_module)
    layouts.share_decisions(module, copy_of_module)
    return copy_of_module


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside any number of wrappers."""
    while True:
        inner = original(module)
        names = [_WRAPPERS[cls.__name__] for cls in type(inner).__mro__ if cls.__name__ in _WRAPPERS]
        if names and isinstance(getattr(inner, names[0], None), nn.Module):
            inner = getattr(inner, names[0])
        if inner is module:
            return module
        module = inner


def check_kind(module: nn.Module) -> None:
    """Raise KdxError for a module, or one inside it, whose layers cannot be observed or differentiated."""
    if getattr(module, "main_input_name", None) == "input_ids":  # transformers' name for the first input
        raise KdxError(
            f"The network ({type(module).__name__}) takes integers, such as tokens of a text or indices of colours, and no image.",
            "Give a network whose first input is a batch of images [n, 3, H, W].",
        )
    for path, inner in module.named_modules():
        reason = _reason_against(inner)
        if reason is not None:
            problem, hint = reason
            name = f"The module {path!r}" if path else "The network"
            raise KdxError(f"{name} ({type(inner).__name__}) {problem}.", hint)
    if "spatial_shapes" in inspect.signature(module.forward).parameters:  # transformers' name for the grid of the patches of each image
        raise KdxError(
            f"The network ({type(module).__name__}) takes patches of images with the size of their grid, and no image.",
            "Wrap it in a module that takes images [n, 3, H, W], cuts them into patches, and passes these on.",
        )


def _reason_against(module: nn.Module) -> tuple[str, str] | None:
    """Why a module cannot be explained, as the end of a sentence, and the hint; None if it can."""
    home = type(module).__module__
    sharded = any(type(parameter).__name__ == "DTensor" for parameter in module.parameters(recurse=False))
    if sharded or type(module).__name__ == "FullyShardedDataParallel" or home.startswith("torch.distributed.fsdp"):
        return "is sharded over processes", "Load its full state_dict into the module that it was built from, and give that module."
    if home.startswith("torch.jit"):
        return "is scripted or traced: its layers cannot be observed", "Give the Python module that it was made from."
    if home.startswith(("torch.ao.nn", "torch.nn")) and "quantized" in home.split("."):
        return "is quantised: it has no gradients and no ONNX form", "Give the network before quantisation."
    if _has_lazy_parameters(module):
        return "has parameters that are not initialised yet", "Run the network once on images of its size first."
    if any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))):
        return "has parameters without data (on the device meta)", "Load its weights first."
    return None


def _has_lazy_parameters(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params()
