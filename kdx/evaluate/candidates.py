"""The maps that are evaluated: those of the run, those of other methods, and baselines."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdx.errors import KdxError
from kdx.evaluate.subject import MapSource
from kdx.maps.scaling import resized
from kdx.roles import MAPS, SCORE_MAPS
from kdx.runs.evaluation import CandidateRecord
from kdx.runs.record import RunRecord

Maps = NDArray[np.float32]

ALL = "all"
"""The name that stands for every candidate."""

UNIFORM, CENTRE = "uniform", "centre"
"""The baselines: a map that is 1 everywhere, and one that falls off from the centre of the image."""


@dataclass(frozen=True)
class Candidate:
    """A map that is evaluated.

    name: in files and on the command line. title: in tables. meaning: one sentence. uses_networks: whether it is computed from networks,
    and so also from the pixels of the images. has_layer: false for a baseline, which is the same at every layer. signed: whether it has
    negative values, which metrics of the positive part ignore (`positive`). maps: from a source and the student's layer to maps [n, h, w].
    """

    name: str
    title: str
    meaning: str
    maps: Callable[[MapSource, str], Maps]
    uses_networks: bool = False
    has_layer: bool = True
    signed: bool = False

    @property
    def record(self) -> CandidateRecord:
        """The map as results describe it."""
        kind = "baseline" if not self.has_layer else "other" if self.uses_networks else "run"
        return CandidateRecord(self.title, self.meaning, kind)


def _stored(kind: str) -> Candidate:
    def maps(source: MapSource, layer: str) -> Maps:
        return source.stored_maps(layer, kind)

    if kind in SCORE_MAPS:
        known = SCORE_MAPS[kind]
        return Candidate(kind, known.symbol.replace(" - ", " − "), known.meaning, maps, signed=True)
    return Candidate(kind, f"UniCAM {kind} ({MAPS[kind].symbol})", MAPS[kind].meaning, maps)


def _class_map(role: str, place: int, method: str) -> Candidate:
    return Candidate(
        f"{('grad_cam', 'hires_cam')[place]}_{role}",
        f"{method}({role[0].upper()})",
        f"Where the {role}'s features raise the logit of the image's label, by {method}.",
        lambda source, layer: source.class_maps(role, layer)[place],
        uses_networks=True,
    )


def _difference(source: MapSource, layer: str) -> Maps:
    student, base = (source.class_maps(role, layer)[0] for role in ("student", "base"))
    return _shares(student) - _shares(resized(base, (student.shape[1], student.shape[2])))


def _shares(maps: Maps) -> Maps:
    """Maps divided by their sums, one by one; an empty map stays empty."""
    total = maps.sum((1, 2), keepdims=True)
    return np.asarray(np.divide(maps, total, out=np.zeros_like(maps), where=total > 0))


def _uniform(source: MapSource, _layer: str) -> Maps:
    return np.ones((len(source), 1, 1), np.float32)


def _centre(source: MapSource, _layer: str) -> Maps:
    height, width = source.size
    y, x = ((np.arange(side) + 0.5) / side * 2 - 1 for side in (height, width))
    one = np.exp(-2 * (y[:, None] ** 2 + x**2)).astype(np.float32)
    return np.broadcast_to(one, (len(source), height, width))


_BASELINES = (
    Candidate(UNIFORM, "uniform", "The same value at every position. A useful map is better.", _uniform, has_layer=False),
    Candidate(
        CENTRE,
        "centre",
        "A bell around the centre of the image, with a standard deviation of a quarter of its sides: photographs have their objects there.",
        _centre,
        has_layer=False,
    ),
)

_DIFFERENCE = Candidate(
    "grad_cam_student_minus_base",
    "Grad-CAM(S) − Grad-CAM(B)",
    "The difference of the two networks' Grad-CAMs, each divided by its sum, because the two have no common scale.",
    _difference,
    uses_networks=True,
    signed=True,
)

DEFAULT = (
    *("rs_student_minus_base", "rs_student_given_base", "rs_student", "fss_student", "distilled", "residual", "missed", "new", "alone"),
    *("grad_cam_student", "hires_cam_student", _DIFFERENCE.name, UNIFORM, CENTRE),
)
"""The candidates that are evaluated by default, as far as the run has them."""


def candidates(run: RunRecord) -> dict[str, Candidate]:
    """Every candidate that a run has, by name: its stored maps, those computed from its networks, and the baselines."""
    every = [*map(_stored, (*(kind for kind in run.map_kinds if kind in SCORE_MAPS), *(k for k in run.map_kinds if k in MAPS)))]
    return {candidate.name: candidate for candidate in every} | computed("base" in run.roles)


def computed(has_base: bool) -> dict[str, Candidate]:
    """The candidates that need no stored map, by name: those computed from networks, and the baselines."""
    of_base = [_class_map("base", 0, "Grad-CAM"), _DIFFERENCE] if has_base else []
    every = [_class_map("student", 0, "Grad-CAM"), _class_map("student", 1, "HiResCAM"), *of_base, *_BASELINES]
    return {candidate.name: candidate for candidate in every}


def chosen(run: RunRecord, names: Sequence[str]) -> list[Candidate]:
    """The candidates of these names or symbols, such as ``RS(S) - RS(B)``; `DEFAULT` for none, and every one for ``all``.

    Raises KdxError for a name that the run does not have.
    """
    known = candidates(run)
    if not names:
        return [known[name] for name in DEFAULT if name in known]
    if list(names) == [ALL]:
        return list(known.values())
    symbols = {SCORE_MAPS[name].symbol: name for name in known if name in SCORE_MAPS}
    result = {}
    for name in names:
        own = symbols.get(name, name)
        if own not in known:
            near = difflib.get_close_matches(name, [*known, *symbols], n=4, cutoff=0.4) or list(known)[:4]
            raise KdxError(f"The run has no map {name!r} to evaluate.", f"Give names such as {', '.join(near)}.")
        result[own] = known[own]
    return list(result.values())


# ---------------------------------------------------------------- the maps that metrics see


def positive(maps: Maps) -> Maps:
    """The positive part of maps [n, h, w], each divided by its largest value: in [0, 1].

    Negative values, where a score is lowered, count as 0. A map without a positive value states no position; it becomes 1 everywhere, as
    the uniform map, so that every metric is defined for every image.
    """
    values = np.maximum(maps, 0)
    peak = values.max((1, 2), keepdims=True)
    return np.where(peak > 0, np.divide(values, peak, out=np.ones_like(values), where=peak > 0), np.float32(1))


def at_image_size(maps: Maps, size: tuple[int, int]) -> Maps:
    """`positive` maps [n, h, w] resized (`kdx.maps.scaling.resized`: bilinear) to the size of the images, each with the peak 1 again."""
    return positive(resized(positive(maps), size))


def empty_share(maps: Maps) -> float:
    """The share of maps [n, h, w] without a positive value."""
    return float((maps <= 0).all((1, 2)).mean())
