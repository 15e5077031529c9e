"""The logits in what a network returns: a tensor, or a tuple, a dict or an object that contains them."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor, nn

from kdx.errors import KdxError

LOGITS_OUTPUT = "logits_output"
"""The attribute of a module that states which of its outputs is the logits: a place in a tuple, or a key or attribute by name."""

CLASS_COUNT = "_kdx_class_count"
"""The attribute of a module with the number of its classes, where a models file or data state it."""

_NAMES = ("logits", "pred", "preds", "prediction", "predictions", "output", "out")
"""The names under which networks return logits, first to last."""


def logits_of(output: object, network: nn.Module, *, any_rank: bool = False) -> Tensor:
    """The logits [n, classes] in ``output``, which ``network`` returned.

    1. A tensor is the logits. 2. What the module's attribute ``logits_output`` names. 3. The entry or attribute of a dict or an object that
    is called logits, pred, preds, prediction, predictions, output or out. 4. The only floating-point matrix among the entries themselves;
    lists inside a tuple are features. 5. Of several, the only one with as many columns as there are classes, where their number is known.
    any_rank: also accept one tensor of another rank, such as the map of a segmentation, if there is no matrix.

    Raises KdxError for an output without logits, and for one in which several matrices may be the logits.
    """
    if isinstance(output, Tensor):
        entries: dict[str, Any] = {"": output}
    else:
        stated = getattr(network, LOGITS_OUTPUT, None)
        entries = _entries(output, stated)
        if stated is not None:
            if str(stated) not in entries:
                raise KdxError(f"The network returns no output {stated!r}.", f"It returns {_described(entries)}.")
            entries = {str(stated): entries[str(stated)]}
    matrices = _tensors(entries, {2})
    if not matrices and any_rank:
        if isinstance(output, Tensor):
            return output
        matrices = _tensors(entries, set(range(1, 9)))
    if not matrices:
        raise KdxError(
            f"The network does not return logits [n, classes]: it returns {_described(entries)}.",
            "Return a tensor of logits, or a tuple, dict or object that contains it.",
        )
    named = [matrices[name] for name in _NAMES if name in matrices]
    return named[0] if named else _only(matrices, getattr(network, CLASS_COUNT, None))


def _only(matrices: Mapping[str, Tensor], classes: int | None) -> Tensor:
    """The only matrix, or the only one with as many columns as classes; else a KdxError."""
    fitting = [value for value in matrices.values() if len(matrices) == 1 or value.shape[1] == classes]
    if len(fitting) == 1:
        return fitting[0]
    raise KdxError(
        f"Several outputs of the network may be the logits: {_described(matrices)}.",
        f"State which: SOURCE:NAME,logits={next(iter(matrices))} in a model reference, or module.{LOGITS_OUTPUT}.",
    )


def _entries(output: Any, stated: object) -> dict[str, Any]:
    """The parts of an output, by name or place. stated: the name of one, which may be a property of an object."""
    if isinstance(output, Mapping):
        return {str(name): value for name, value in output.items()}
    if isinstance(output, tuple) and hasattr(output, "_asdict"):
        return dict(output._asdict())
    if isinstance(output, tuple | list):
        return {str(place): value for place, value in enumerate(output)}
    if dataclasses.is_dataclass(output):
        return dict(vars(output))
    names = dict.fromkeys((*getattr(output, "__dict__", {}), *_NAMES, *([] if stated is None else [str(stated)])))
    attributes = {name: getattr(output, name, None) for name in names}  # properties too
    return {name: value for name, value in attributes.items() if value is not None}


def _tensors(entries: Mapping[str, Any], ranks: Container[int]) -> dict[str, Tensor]:
    """The floating-point tensors of these ranks."""
    return {
        name: value for name, value in entries.items() if isinstance(value, Tensor) and value.is_floating_point() and value.ndim in ranks
    }


def _described(entries: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {_shape(value)}".strip() for name, value in entries.items()) or "nothing"


def _shape(value: object) -> str:
    return str([int(size) for size in value.shape]) if isinstance(value, Tensor) else type(value).__name__
