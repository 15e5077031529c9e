"""Runs of several students side by side: which of them can be compared, at which layers, and on which images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kdx.errors import KdxError
from kdx.kernels.moments import Influences
from kdx.remote import as_path
from kdx.roles import CONTRASTS, SCORES, contrast_name
from kdx.runs.influences import RunInfluences, read_influences
from kdx.runs.measured import Entry
from kdx.runs.record import RunRecord, read_run
from kdx.scores.paired import contrast_influences, paired_difference
from kdx.scores.score import Contrast

_SETTINGS = (
    "geometry",
    "reference images",
    "batch",
    "objective",
    "weighting",
    "pooled",
    "features",
    "ratios",
    "project",
    "stored_precision",
    "precision",
    "image_size",
    "resize",
    "confidence",
    "seed",
)
"""The settings that affect a run's numbers. Runs that differ in one of them are compared, and the page states the difference."""


_CONTRASTS = {contrast_name(more, less): (more, less) for more, less in CONTRASTS}


@dataclass(frozen=True)
class Comparison:
    """Runs of several students on the same data, by the student's name.

    layers: the runs' own names of each layer by its common name; None where a run does not have the layer. images: the names of the images
    that all runs explain, in the order of the first run. notes: what a reader must know about the comparison, as sentences.
    """

    runs: dict[str, RunRecord]
    layers: dict[str, tuple[str | None, ...]]
    images: list[str]
    notes: list[str]

    @property
    def first(self) -> RunRecord:
        return next(iter(self.runs.values()))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.runs)

    @property
    def same_teacher(self) -> bool:
        """Whether all runs have a teacher with the same weights."""
        return len(self._weights("teacher")) == 1

    @property
    def same_base(self) -> bool:
        """Whether all runs have a base with the same weights."""
        return len(self._weights("base")) == 1

    def _weights(self, role: str) -> set[str | None]:
        weights = {_weights(run, role) for run in self.runs.values()}
        return weights if None not in weights else set()

    @property
    def numbers(self) -> tuple[str, ...]:
        """The names of the scores and differences that at least one run has, in the order of a run."""
        named = [(*run.score_names, *run.contrast_names) for run in self.runs.values()]
        longest = max(named, key=len)
        return tuple(dict.fromkeys((*longest, *(name for names in named for name in names))))

    @cached_property
    def _influences(self) -> dict[str, RunInfluences]:
        """By run, the contributions of the parts of its images to its scores, for runs with the same parts as the first run."""
        first = read_influences(self.first.folder)
        if first is None:
            return {}
        known = {name: read_influences(run.folder) for name, run in self.runs.items()}
        return {
            name: own
            for name, own in known.items()
            if own is not None and self.runs[name].samples.ids == self.first.samples.ids and np.array_equal(own.parts, first.parts)
        }

    @property
    def paired(self) -> tuple[str, ...]:
        """The students for which differences from the first student can have intervals."""
        return tuple(name for name in self.names if name in self._influences and name != self.names[0])

    def difference(self, student: str, layer: str, number: str) -> Contrast | None:
        """A score or a difference of a student minus that of the first student at a layer of ``layers``, with its interval over images
        (`kdx.scores.paired`); None if a run does not have the score, or not the same parts of the images as the first run."""
        both = [(name, self.entry(name, layer, number)) for name in (student, self.names[0])]
        known = [self._influence(name, layer, number) for name, _ in both]
        if student not in self.paired or None in known or any(entry is None or not entry.known for _, entry in both):
            return None
        value, other_value = (entry.value for _, entry in both if entry is not None)
        own, other = (influences for influences in known if influences is not None)
        limit, run = 2.0 if number in SCORES else 4.0, self.first
        return paired_difference((value, other_value), (own, other), n=run.explained, confidence=run.confidence, limit=limit)

    def _influence(self, student: str, layer: str, number: str) -> Influences | None:
        own = self.layers[layer][self.names.index(student)]
        known = self._influences[student].layers.get(own or "", {}) if student in self._influences else {}
        return ({**known} | contrast_influences(known, _CONTRASTS)).get(number)

    def entry(self, student: str, layer: str, number: str) -> Entry | None:
        """A score or a difference of a student at a layer of ``layers``; None where its run does not have it."""
        run = self.runs[student]
        own = self.layers[layer][self.names.index(student)]
        return None if own is None else (run.scores[own] | run.contrasts[own]).get(number)


def compare_runs(folders: Mapping[str, Path]) -> Comparison:
    """Read the runs of several students, by the student's name.

    Layers are those with the same names in all runs; where names differ and all runs have a teacher, they are matched by the teacher's
    layer. Raises KdxError for fewer than two runs, for runs of other data or other classes, for runs whose scores have other targets or are
    of other kinds (raw or salient), and for runs without a common image or layer.
    """
    if len(folders) < 2:
        raise KdxError("A comparison needs at least two runs.", "Name another run.")
    runs = {name: read_run(as_path(folder)) for name, folder in folders.items()}
    for name, run in runs.items():
        _check_same_data(next(iter(runs)), next(iter(runs.values())), name, run)
    layers = _common_layers(list(runs.values()))
    explained = [set(run.samples.ids) for run in runs.values()]
    shared = set.intersection(*explained)
    first = next(iter(runs.values()))
    images = [name for name in first.samples.ids if name in shared]
    if not images:
        raise KdxError("The runs have no image in common.", "Explain the same split of the same data with every student.")
    return Comparison(runs, layers, images, _notes(runs, len(images)))


def run_names(folders: Sequence[Path]) -> dict[str, Path]:
    """A name per run folder: the part of the path that differs, without what all paths have in common at their start and end.

    ``demo/kd/run`` and ``demo/at/run`` are kd and at. Raises KdxError if a folder is given twice.
    """
    paths = [folder.resolve() for folder in folders]
    twice = next((path for path, count in Counter(paths).items() if count > 1), None)
    if twice is not None:
        raise KdxError(f"The run {twice} is given twice.", "Name each run once.")
    parts = [list(path.parts) for path in paths]
    while len(parts) > 1 and all(len(own) > 1 for own in parts) and len({own[-1] for own in parts}) == 1:
        parts = [own[:-1] for own in parts]
    names = ["/".join(own[-1:]) for own in parts]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        names = ["/".join(own[-depth:]) for own in parts]
    return dict(zip(names, folders, strict=True))


def _weights(run: RunRecord, role: str) -> str | None:
    model = run.manifest["configuration"]["models"].get(role)
    return None if model is None else str(model["sha256"])


def _check_same_data(first_name: str, first: RunRecord, name: str, run: RunRecord) -> None:
    both = f"The runs {first_name} and {name}"
    mine, theirs = first.manifest["configuration"], run.manifest["configuration"]
    if first.classes != run.classes:
        raise KdxError(f"{both} have different classes.", "Compare runs on the same data, with the classes in the same order.")
    if mine["fingerprint"] != theirs["fingerprint"]:
        raise KdxError(f"{both} explain different data.", "Explain the same data with both students.")
    if first.salient != run.salient:
        raise KdxError(
            f"The scores of the runs {first_name} and {name} describe different features.", "Compare runs with the same --features."
        )
    if mine.get("target") != theirs.get("target"):
        raise KdxError(f"{both} measure relevance against different targets.", "Explain both students with the same --target.")


def _common_layers(runs: Sequence[RunRecord]) -> dict[str, tuple[str | None, ...]]:
    """The runs' own names of each layer, by its common name."""
    own_names = [{layer: layer for layer in run.layers} for run in runs]
    by_teacher = [{teacher: layer for layer, teacher in run.layers.items()} for run in runs]
    paired = all("teacher" in run.roles for run in runs) and all(
        len(known) == len(run.layers) for known, run in zip(by_teacher, runs, strict=True)
    )
    same = all(list(run.layers) == list(runs[0].layers) for run in runs)
    known = by_teacher if paired and not same else own_names
    layers = {name: tuple(names.get(name) for names in known) for name in dict.fromkeys(name for names in known for name in names)}
    if not any(None not in own for own in layers.values()):
        raise KdxError(
            "The runs have no layer in common.", "Explain the students at the same layers, or pair their layers with those of one teacher."
        )
    return layers


def _settings(run: RunRecord) -> dict[str, object]:
    configuration: Mapping[str, object] = run.manifest["configuration"]
    known = {**configuration, "geometry": run.geometry, "reference images": run.reference_images}
    settings = {name: known.get(name) for name in _SETTINGS}
    if run.geometry == "whole":  # the batch does not change its results
        settings["batch"] = None
    return settings


def _notes(runs: Mapping[str, RunRecord], common: int) -> list[str]:
    notes = []
    settings = [_settings(run) for run in runs.values()]
    different = [name for name in _SETTINGS if any(own[name] != settings[0][name] for own in settings)]
    if different:
        notes.append(f"The runs differ in {_listed(different)}, which affects their numbers.")
    counts = {run.explained for run in runs.values()}
    if counts != {common}:
        sizes = ", ".join(f"{name} {run.explained:,}" for name, run in runs.items())
        notes.append(
            f"The runs do not explain the same images: {common:,} images are common to all of them ({sizes}). Each score describes the "
            "images of its run; the gallery and the accuracies are those of the common images."
        )
    for role in ("teacher", "base"):
        weights = [_weights(run, role) for run in runs.values()]
        if len(set(weights)) > 1:
            without = [name for name, own in zip(runs, weights, strict=True) if own is None]
            also = f", and {_listed(without)} {'has' if len(without) == 1 else 'have'} none" if without else ""
            known = {own for own in weights if own is not None}
            notes.append(f"The students have {'different ' + role + 's' if len(known) > 1 else 'one ' + role}{also}.")
    return notes


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def correct_among(run: RunRecord, images: Sequence[str], role: str = "student") -> NDArray[np.bool_]:
    """Whether a network of the run classifies each of the images correctly [n]."""
    places = [run.samples.places[name] for name in images]
    return np.asarray(run.samples.correct(role)[places])
