"""The grid of a study: its cells, and the jobs that compute them. Networks that several cells share are trained by one job."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from typing import Any, Literal

from kdx import models
from kdx.choices import NO_BASE
from kdx.data.dataset import open_data
from kdx.data.splits import stratified_splits
from kdx.distill import TrainingSettings
from kdx.distill.networks import check_sizes, check_trainable, is_trained_teacher, training_preprocessing
from kdx.errors import KdxError, about
from kdx.export.graphs import Preprocessing
from kdx.export.layer_names import find_layer
from kdx.models.layer_pairs import parse_layers
from kdx.models.network import Network
from kdx.models.reference import ModelReference
from kdx.models.source_code import code_hash
from kdx.models.weights import split_key
from kdx.runs.plan import RunOptions
from kdx.study.design import Design, slug
from kdx.study.options import TrainingExtras
from kdx.study.table import Cell

JobKind = Literal["teacher", "base", "assistant", "cell"]
"""teacher, base, assistant: the training of a network that cells share. cell: the training of a student, and its explanation."""

TRAININGS, CELLS = "trainings", "cells"
"""The folders of the jobs in a study's folder."""

MODELS, RUN = "models", "run"
"""The folders of a cell: what `kdx distill` writes, and what `kdx explain` writes."""


@dataclass(frozen=True)
class Job:
    """One unit of work of a study, which a process does as a whole.

    folder: where it writes, relative to the study's folder, as are teacher_weights and base. preprocessing: that of its training. needs:
    the keys of the jobs that must be complete before. teacher, student: model references; of a job that trains a single network,
    ``teacher`` is the network, or the teacher whose preprocessing it shares. teacher_weights: the weights of the teacher, if a job of the
    study trains them. base: the base's weights, ``none``, or None where no student is trained. identity: everything that the results
    depend on, in the types of JSON.
    """

    key: str
    kind: JobKind
    folder: str
    data: str
    teacher: str
    student: str
    settings: TrainingSettings
    extras: TrainingExtras
    options: RunOptions
    preprocessing: Preprocessing
    needs: tuple[str, ...] = ()
    teacher_weights: str | None = None
    base: str | None = None
    layers: tuple[str, ...] = ()
    identity: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Grid:
    """The cells of a study in the order of its table, and the jobs, each after those that it needs.

    fingerprints: of the data sets, by name. parameters: of each network, by name (teachers, assistants, students) on the first data set.
    """

    cells: tuple[Cell, ...]
    jobs: tuple[Job, ...]
    fingerprints: Mapping[str, str]
    parameters: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class _Fact:
    """The properties of a network that a grid depends on.

    given: the hash of the weights, if the network is used as it is. start: the hash of the weights with which a training starts, if the
    reference names a file or a folder with some. code: the hash of the source files of a user's own network.
    """

    reference: str
    parameters: int
    given: str | None
    start: str | None
    code: str | None


def grid_of(design: Design) -> Grid:
    """The cells and the jobs of a design. Raises KdxError for data and networks that cannot be opened, and for cells with equal keys."""
    parts = [_DataGrid.of(design, data) for data in design.data]
    by_seed = (job for part in parts for seed in design.seeds for job in part.jobs(seed))
    jobs = tuple({job.key: job for job in by_seed}.values())
    cells = tuple(cell for part in parts for cell in part.cells())
    keys = [cell.key for cell in cells]
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise KdxError(f"Two cells of the study have the key {twice}.", "Give the methods names that differ in more than punctuation.")
    parameters = {group: {name: fact.parameters for name, fact in facts.items()} for group, facts in parts[0].facts.items()}
    return Grid(cells, jobs, {part.data: part.fingerprint for part in parts}, parameters)


@dataclass(frozen=True)
class _DataGrid:
    """The part of a grid on one data set. preprocessing: that of all trainings under a teacher, by its name."""

    design: Design
    data: str
    fingerprint: str
    facts: Mapping[str, Mapping[str, _Fact]]
    preprocessing: Mapping[str, Preprocessing]

    @classmethod
    def of(cls, design: Design, data: str) -> _DataGrid:
        dataset = open_data(design.reference_of(data))
        settings, _ = design.training_of(data, None, design.seeds[0])
        sizes = {split: len(indices) for split, indices in stratified_splits(dataset, settings.split_seed).items()}
        sizes["student"] = min(sizes["train"], settings.student_images or sizes["train"])
        check_sizes(sizes, dataset.reference, settings)
        layers = parse_layers(design.layers).values()
        known: dict[str, _Fact] = {}
        preprocessing: dict[str, Preprocessing] = {}

        def fact(group: str, name: str, reference: str) -> _Fact:
            with about(f"the network {name}"):
                parsed = models.parse_reference(reference).located().with_classes(len(dataset.classes))
                if group != "teachers":
                    check_trainable(parsed)
                network = models.load(str(parsed), classes=len(dataset.classes))
                for layer in layers:  # an assistant is the teacher of the student below it
                    find_layer(network.module, layer.student if group == "students" else layer.teacher)
                if group == "teachers":
                    preprocessing[name] = training_preprocessing(network, settings)
                if reference not in known:
                    known[reference] = _fact(reference, parsed, network)
                return known[reference]

        groups = {"teachers": design.teachers, "assistants": design.assistants, "students": design.students}
        facts = {group: {name: fact(group, name, reference) for name, reference in names.items()} for group, names in groups.items()}
        return cls(design, data, dataset.fingerprint, facts, preprocessing)

    def chains(self) -> Iterator[tuple[str, tuple[str, ...], str]]:
        """Every teacher, the assistants below it, and the student."""
        for teacher, student in product(self.design.teachers, self.design.students):
            yield teacher, (), student
            for assistant, fact in self.facts["assistants"].items():
                if self.facts["students"][student].parameters < fact.parameters < self.facts["teachers"][teacher].parameters:
                    yield teacher, (assistant,), student

    def cells(self) -> Iterator[Cell]:
        for (teacher, assistants, student), method, seed in product(self.chains(), self.design.methods, self.design.seeds):
            yield self._cell(teacher, assistants, student, method, seed)

    def _cell(self, teacher: str, assistants: tuple[str, ...], student: str, method: str, seed: int) -> Cell:
        key = "/".join((self.data, "+".join((teacher, *assistants)), student, slug(method), f"seed{seed}"))
        return Cell(self.data, teacher, assistants, student, method, seed, f"{CELLS}/{key}/{RUN}", key)

    def jobs(self, seed: int) -> Iterator[Job]:
        """The jobs of a seed, those that others need first. A job that several cells need occurs several times."""
        has_base = self.design.training_of(self.data, None, seed)[1].has_base
        shared = {
            chain: (self._teacher(chain[0], seed), self._base(chain[0], chain[2], seed) if has_base else None) for chain in self.chains()
        }
        for teacher, _ in shared.values():
            if teacher is not None:
                yield teacher
        for _, base in shared.values():
            if base is not None:
                yield base
        cells = []
        for chain, method in product(shared, self.design.methods):
            teacher, base = shared[chain]
            above = [] if teacher is None else [teacher]
            reference = self.facts["teachers"][chain[0]].reference
            for place, name in enumerate(chain[1], 1):
                above = [self._assistant(reference, above, chain[0], chain[1][:place], method, seed)]
                yield above[0]
                reference = self.facts["assistants"][name].reference
            cells.append(self._cell_job(self._cell(*chain, method, seed), reference, above, base))
        yield from cells  # after the assistants, so that no worker waits for one at the end

    def _teacher(self, name: str, seed: int) -> Job | None:
        """The training of a teacher; None for one that is used as it is."""
        fact = self.facts["teachers"][name]
        return (
            None
            if fact.given
            else self._job("teacher", f"{self.data}/seed{seed}/teacher-{name}", name, fact.reference, fact.reference, None, seed)
        )

    def _base(self, teacher: str, student: str, seed: int) -> Job:
        """The training of a base. Teachers with the same preprocessing share it."""
        fact, reference = self.facts["teachers"][teacher], self.facts["students"][student].reference
        preprocessing = hashlib.sha256(json.dumps(asdict(self.preprocessing[teacher]), sort_keys=True).encode()).hexdigest()
        key = f"{self.data}/seed{seed}/base-{student}-{preprocessing[:6]}"
        identity = {"teacher": None, "preprocessing": preprocessing}
        return self._job("base", key, teacher, fact.reference, reference, None, seed, identity=identity)

    def _assistant(self, teacher: str, above: list[Job], top: str, assistants: tuple[str, ...], method: str, seed: int) -> Job:
        """The training of an assistant by its teacher, which ``above`` trains if it contains a job."""
        reference = self.facts["assistants"][assistants[-1]].reference
        key = f"{self.data}/seed{seed}/assistant-{'+'.join((top, *assistants))}-{slug(method)}"
        return self._job("assistant", key, top, teacher, reference, method, seed, above=above, base=NO_BASE)

    def _cell_job(self, cell: Cell, teacher: str, above: list[Job], base: Job | None) -> Job:
        reference, weights = self.facts["students"][cell.student].reference, NO_BASE if base is None else f"{base.folder}/base.safetensors"
        needs = (*above, *(() if base is None else (base,)))
        return self._job("cell", cell.key, cell.teacher, teacher, reference, cell.method, cell.seed, above=above, needs=needs, base=weights)

    def _job(
        self,
        kind: JobKind,
        key: str,
        top: str,
        teacher: str,
        student: str,
        method: str | None,
        seed: int,
        *,
        above: list[Job] | None = None,
        needs: tuple[Job, ...] | None = None,
        base: str | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> Job:
        settings, extras = self.design.training_of(self.data, method, seed)
        above = above or []
        role = {"teacher": "teacher"}.get(above[0].kind, "student") if above else None
        options, layers = self.design.run_options_of(self.data), self.design.layers if kind == "cell" else ()
        facts = [fact for group in self.facts.values() for fact in group.values()]
        code = {fact.reference: fact.code for fact in facts if fact.code is not None and fact.reference in (teacher, student)}
        entries = {
            "data": self.fingerprint,
            "teacher": teacher,
            "student": student,
            "given": next((fact.given for fact in self.facts["teachers"].values() if fact.reference == teacher), None)
            if not above
            else None,
            "weights_file": next(fact.start for fact in facts if fact.reference == student),
            "base": base is not None and base != NO_BASE,
            "training": _jsonable({**asdict(settings), **asdict(extras), "save_minutes": None, "log": None}),
            **({"explain": _jsonable(asdict(options)), "layers": list(layers)} if kind == "cell" else {}),
            "above": above[0].identity if above else None,
            **({"code": code} if code else {}),
            **(identity or {}),
        }
        return Job(
            key,
            kind,
            f"{CELLS if kind == 'cell' else TRAININGS}/{key}",
            self.design.reference_of(self.data),
            teacher,
            student,
            settings,
            extras,
            options,
            self.preprocessing[top],
            needs=tuple(job.key for job in (above if needs is None else needs)),
            teacher_weights=None if role is None else f"{above[0].folder}/{role}.safetensors",
            base=base,
            layers=layers,
            identity=entries,
        )


def _fact(reference: str, parsed: ModelReference, network: Network) -> _Fact:
    given = network.weights_hash if is_trained_teacher(parsed, network) else None
    file = None if parsed.weights is None else split_key(parsed.weights)[0]
    start = hashlib.sha256(file.read_bytes()).hexdigest() if file is not None and file.is_file() else None
    if parsed.source == "hf":
        start = network.weights_hash
    return _Fact(reference, network.parameters, given, start, code_hash(reference, network.module))


def _jsonable(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values after a round trip through JSON."""
    result: dict[str, Any] = json.loads(json.dumps(values, default=str, sort_keys=True))
    return result
