"""The table of methods, and method strings such as ``kd+at:0.5`` or ``package.module:loss``."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import inspect
import math
import re
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdx.distill.losses.attention import AttentionTransfer, ClassAttention
from kdx.distill.losses.base import LOSS_SETTINGS, Batch, DistillationLoss, LossSettings, Requirements, Shapes
from kdx.distill.losses.contrast import Contrast
from kdx.distill.losses.hints import FeatureOverhaul, Hints
from kdx.distill.losses.logits import DecoupledKd, Dist, SoftTargets, StandardisedSoftTargets
from kdx.distill.losses.relations import Relations
from kdx.distill.losses.review import Review
from kdx.errors import KdxError, first_line
from kdx.models.sources import search_current_folder


@dataclass(frozen=True)
class Method:
    """A distillation method: a description with its source, and the class of its loss."""

    description: str
    loss: type[DistillationLoss]

    @property
    def requirements(self) -> Requirements:
        """What the loss needs."""
        return self.loss.requirements


METHODS: dict[str, Method] = {
    "kd": Method("soft targets: (1 - alpha) cross entropy + alpha T^2 KL (Hinton et al. 2015)", SoftTargets),
    "fitnet": Method("hints: mean (S - T)^2 of features (Romero et al. 2015)", Hints),
    "at": Method("attention transfer: cross entropy + beta/2 mean (Q_S - Q_T)^2 (Zagoruyko & Komodakis 2017)", AttentionTransfer),
    "ofd": Method("feature overhaul: partial distance of features before the activation (Heo et al. 2019)", FeatureOverhaul),
    "rkd": Method("relations: distances and angles between images (Park et al. 2019)", Relations),
    "crd": Method("contrast: embeddings of the same image against those of other classes (Tian et al. 2020)", Contrast),
    "reviewkd": Method("knowledge review: fused features of deeper layers (Chen et al. 2021)", Review),
    "dkd": Method("decoupled soft targets: the true class and the others (Zhao et al. 2022)", DecoupledKd),
    "dist": Method("correlations of probabilities within images and within classes (Huang et al. 2022)", Dist),
    "catkd": Method("class attention transfer: class activation maps (Guo et al. 2023)", ClassAttention),
    "lskd": Method("soft targets of standardised logits (Sun et al. 2024)", StandardisedSoftTargets),
}
"""The methods by name."""

LossFunction = Callable[..., Tensor]
"""A user's own loss: ``Batch`` and options -> scalar. Its attribute ``requirements`` is optional."""

_TERM = re.compile(r"(?P<name>[\w.]+:[A-Za-z_]\w*|[\w-]+)(?P<options>(?:,\w+=[^,:]+)*)(?::(?P<weight>[\d.][\d.eE+-]*))?")


@dataclass(frozen=True)
class Term:
    """One loss of a method: its name, its options, and the factor of its weight."""

    name: str
    options: tuple[tuple[str, float], ...]
    factor: float
    loss: Callable[..., DistillationLoss]
    requirements: Requirements

    def build(self, shapes: Shapes, settings: LossSettings) -> DistillationLoss:
        """The loss for these shapes. Raises KdxError for layers that it cannot compare, and if a user's own class fails."""
        with own_code(self.name):
            return self.loss(shapes, settings, **dict(self.options))


@contextmanager
def own_code(name: str) -> Iterator[None]:
    """Turn an exception in the block into a KdxError with its place, if the loss ``name`` is a user's own."""
    try:
        yield
    except (KdxError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if ":" not in name:
            raise
        torch_folder = str(Path(torch.__file__).parent)
        *_, place = (frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(torch_folder))
        raise KdxError(
            f"The loss {name} fails with {type(error).__name__} in {Path(place.filename).name}, line {place.lineno}: {first_line(error)}.",
            "Correct it; its argument is a kdx.distill.Batch.",
        ) from error


@functools.cache
def parse_method(method: str) -> tuple[Term, ...]:
    """The terms of a method string: ``NAME[,OPTION=VALUE...][:FACTOR]``, joined by ``+``.

    NAME is one of `METHODS`, or ``package.module:name`` for a function ``loss(batch, **options)`` or a class derived from
    `DistillationLoss`. The factor multiplies the weight that the method has by default. Raises KdxError for a string of another form,
    a name that does not exist, and an option that the method does not have.
    """
    terms = tuple(_term(part, method) for part in re.split(r"\+(?=\s*[A-Za-z_])", method))
    names = [term.name for term in terms]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise KdxError(f"The method {method!r} contains {repeated} twice.", "Name each loss once and give it a weight: kd+at:0.5.")
    return terms


def method_requirements(method: str) -> Requirements:
    """What the terms of a method need together."""
    return functools.reduce(Requirements.__or__, (term.requirements for term in parse_method(method)))


def source_hashes(method: str) -> dict[str, str]:
    """By name, the hash of the source of the user's own losses: weights depend on it."""
    hashes = {}
    for term in parse_method(method):
        if ":" in term.name:
            hashes[term.name] = hashlib.sha256(_source(_imported(term.name)).encode()).hexdigest()[:16]
    return hashes


def _source(own: Any) -> str:
    """The source of a user's loss, or of its class if it is an object; "" for code without a source file."""
    own = inspect.unwrap(own)
    try:
        return inspect.getsource(own if isinstance(own, type) or inspect.isroutine(own) else type(own))
    except (OSError, TypeError):
        return ""


def _term(text: str, method: str) -> Term:
    match = _TERM.fullmatch(text.strip())
    factor = _number(match["weight"] or "1") if match else None
    if match is None or factor is None or factor < 0:
        raise KdxError(
            f"{text.strip()!r} is not a loss of the method {method!r}.",
            "Write NAME, NAME:WEIGHT or NAME,OPTION=VALUE:WEIGHT, joined by +, such as kd+at:0.5.",
        )
    name = match["name"]
    loss, requirements, defaults, ranges = _loss(name)
    options = {}
    for entry in match["options"].split(",")[1:]:
        key, _, text_value = entry.partition("=")
        value = _number(text_value)
        if key not in defaults:
            raise KdxError(f"The loss {name} has no option {key!r}.", _options_hint(key, defaults))
        low, high = ranges.get(key, (-math.inf, math.inf) if ":" in name else (0, math.inf))
        if value is None or (isinstance(defaults[key], int) and not value.is_integer()) or not low <= value <= high:
            kind = "whole number" if isinstance(defaults[key], int) else "number"
            limits = (f" from {low:g}" if low > -math.inf else "") + (f" to {high:g}" if high < math.inf else "")
            raise KdxError(f"The option {key} of {name} cannot be {text_value!r}.", f"Give a {kind}{limits}.")
        options[key] = type(defaults[key])(value)
    return Term(name, tuple(sorted(options.items())), factor, loss, requirements)


def _options_hint(key: str, options: Collection[str]) -> str:
    """What to give instead of the option ``key``, which a loss does not have."""
    if key in LOSS_SETTINGS:
        return f"Give it to the command: --{key}."
    if not options:
        return "Give its name alone."
    return f"{_suggestion(key, options)}Choose one of: {', '.join(options)}."


def _suggestion(name: str, names: Iterable[str]) -> str:
    """The beginning of a hint: the name that was probably meant, if there is one."""
    lower = {other.lower(): other for other in names}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    return f"Did you mean {lower[near[0]]}? " if near else ""


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _loss(name: str) -> tuple[Callable[..., DistillationLoss], Requirements, dict[str, Any], Mapping[str, tuple[float, float]]]:
    """The constructor of a loss, its requirements, and the defaults and the ranges of its options."""
    if ":" in name:
        own = _imported(name)
        if isinstance(own, type):
            owned: type[DistillationLoss] = own
            return owned, owned.requirements, _defaults(owned), owned.option_ranges
        return functools.partial(FunctionLoss, own), _function_requirements(own), _defaults(own), {}
    if name not in METHODS:
        raise KdxError(
            f"There is no distillation method {name!r}.",
            f"{_suggestion(name, METHODS)}Choose one of: {', '.join(METHODS)}, or your own as package.module:loss.",
        )
    loss = METHODS[name].loss
    return loss, loss.requirements, _defaults(loss), loss.option_ranges


def _defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters if isinstance(parameter.default, int | float)}


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    search_current_folder()
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # the user's own code runs here
        if module in METHODS and isinstance(error, ModuleNotFoundError):
            raise KdxError(f"The weight of {module} cannot be {attribute!r}.", "Give a number of 0 or more, such as kd+at:0.5.") from None
        raise KdxError(
            f"The loss {name} cannot be imported: {first_line(error)}.",
            "Name a loss of an installed package or of a file in the current folder.",
        ) from error
    own = getattr(imported, attribute, None)
    if own is None:
        losses = [entry for entry, value in vars(imported).items() if callable(value) and not entry.startswith("_")]
        raise KdxError(
            f"The module {module} has no loss {attribute!r}.",
            f"{_suggestion(attribute, losses)}Name a function loss(batch), or a class derived from DistillationLoss.",
        )
    if not callable(own) or (isinstance(own, type) and not issubclass(own, DistillationLoss)):
        raise KdxError(
            f"{name} is not a loss.", "Give a function loss(batch) that returns a scalar, or a class derived from DistillationLoss."
        )
    return own


def _function_requirements(function: LossFunction) -> Requirements:
    requirements = getattr(function, "requirements", Requirements(logits=True, pairs="all"))
    if not isinstance(requirements, Requirements):
        raise TypeError(f"the requirements of {function} must be kdx.distill.Requirements, not {type(requirements).__name__}")
    return requirements


class FunctionLoss(DistillationLoss):
    """A user's function as a loss."""

    def __init__(self, function: LossFunction, shapes: Shapes, settings: LossSettings, **options: float) -> None:
        super().__init__(shapes, settings)
        self.function = functools.partial(function, **options)

    def forward(self, batch: Batch) -> Tensor:
        loss: Tensor = self.function(batch)
        return loss
