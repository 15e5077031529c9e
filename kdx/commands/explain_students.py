"""`kdx explain` with several students: one run per student, with one pass of teacher and base, and a page that compares the students."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from kdx.choices import NO_BASE
from kdx.commands import explain
from kdx.disk import check_folder
from kdx.errors import KdxError, resumable
from kdx.explain.shared_features import SharedFeatures
from kdx.models.models_file import ModelsFile, read_models, write_models
from kdx.models.reference import parse_reference
from kdx.remote import is_url
from kdx.report.comparison_page import write_comparison
from kdx.runs import schema
from kdx.runs.run import RunOptions
from kdx.runtimes.choice import is_file

NETWORKS = "networks"
"""The folder of exported networks, which all runs share."""

SHARED = ".shared-features"
"""The folder of the outputs of teacher and base, while the runs are computed."""

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}"


def run(
    data: str,
    students: Mapping[str, Path],
    out: Path,
    layers: Sequence[str] = (),
    options: RunOptions = RunOptions(),
    *,
    command: Sequence[str] = (),
    announce: Callable[[str], None] = print,
) -> Path:
    """Explain a data set with several students, each in its own run, and write the page that compares them. Returns the page's path.

    students: a models file per name. The run of a student is in the folder out/NAME, and its numbers are those of a single run. Students
    whose models files name the same teacher and base at the same layers share their passes. layers: for every student, or, after
    ``NAME:``, for one. The outputs of teacher and base are deleted when all runs are complete, unless ``options.keep_features``. A stopped
    call resumes.

    Raises KdxError for names that cannot be folders, and for anything that `kdx.commands.explain.run` refuses.
    """
    check_names(students)
    _check_folder(out, students)
    for models in students.values():
        if not is_file(models):
            read_models(models)  # a file that is missing is an error now, and not after the other students
    own_layers = {name: layers_of(name, students, layers) for name in students}
    shared = out / SHARED
    with resumable(lambda: any((out / name / schema.SCORES_FILE).exists() for name in students)):
        for place, (name, models) in enumerate(students.items(), 1):
            announce(f"Student {name} ({place} of {len(students)}).")
            explain.run(
                data,
                models,
                out / name,
                own_layers[name],
                options,
                networks=out / NETWORKS,
                command=command,
                shared_features=shared,
                announce=announce,
            )
        page = write_comparison({name: out / name for name in students}, out / schema.PAGE)
    if not options.keep_features:
        SharedFeatures(shared).remove()
    return page


def _check_folder(out: Path, students: Collection[str]) -> None:
    """KdxError if the folder contains anything other than runs of students, of these or of others, and their models files."""
    own = {NETWORKS, SHARED, schema.PAGE, *students}

    def is_own(path: Path) -> bool:
        name = path.name
        return name in own or name.endswith(".toml") or name.startswith(".") or (path / schema.MANIFEST).exists()

    check_folder(out, "a comparison of students", is_own)


def check_options(
    data: Sequence[str],
    models: Path | None,
    students: Sequence[str] | None,
    teacher: str | None,
    among: str | None,
    labels: Sequence[str] | None,
) -> None:
    """KdxError where neither a models file nor students are named, and for options that do not apply to them."""
    if models is None and not students:
        raise KdxError("No network is named.", "Name the models file with --models, or several students with --student NAME=REFERENCE.")
    if not students and teacher is not None:
        raise KdxError("--teacher has an effect only with --student.", "Name the teacher in the models file, or give --student.")
    if not students:
        return
    if models is not None:
        raise KdxError("--models and --student both name students.", "Give one of them; a student may also be NAME=MODELS.toml.")
    if among is not None:
        raise KdxError("--data explains a few images with a single student.", "Give --models in place of --student.")
    explain.check_data_set(data, labels)


def check_names(names: Collection[str]) -> None:
    """KdxError for fewer than two students, and for names that are no names of folders or differ only in case."""
    if len(names) < 2:
        raise KdxError("Only one student is named.", "Give --student twice or more, or the models file of one student with --models.")
    for name in names:
        if not re.fullmatch(_NAME, name) or name == NETWORKS:
            raise KdxError(
                f"A student cannot be named {name!r}.",
                f"Use up to 60 letters, digits, dots, hyphens and underscores, and not {NETWORKS}, for example --student kd=REFERENCE.",
            )
    twice = next((name for name, count in Counter(name.lower() for name in names).items() if count > 1), None)
    if twice is not None:
        raise KdxError(f"Two students are named {twice}.", "Give each student another name; case does not count.")


def layers_of(name: str, students: Collection[str], layers: Sequence[str]) -> tuple[str, ...]:
    """The layers of one student, from layers of all students and from ``STUDENT:LAYER``."""
    own = []
    for layer in layers:
        head, colon, rest = layer.partition(":")
        if not colon or head not in students:
            own.append(layer)
        elif head == name:
            own.append(rest)
    return tuple(own)


def parse_students(texts: Sequence[str]) -> dict[str, str]:
    """The reference of each student by its name, from ``NAME=REFERENCE``. Raises KdxError for other text and names given twice."""
    pairs = []
    for text in texts:
        name, equals, reference = text.partition("=")
        if not equals or ":" in name or not reference:
            raise KdxError(f"{text!r} does not name a student.", "Write NAME=REFERENCE, for example kd=timm:resnet18@kd.safetensors.")
        pairs.append((name, reference))
    students = dict(pairs)
    check_names([name for name, _ in pairs])
    return students


def student_files(students: Mapping[str, str], teacher: str | None, base: str | None, out: Path) -> dict[str, Path]:
    """A models file per student, which is out/NAME.toml unless ``students`` names the file itself.

    students: each a model reference, an exported file, or a models file, whose student is used with its teacher, base and layers. teacher,
    base: model references or exported files for all students, in place of those of a models file. ``none`` as the base leaves it out. A
    relative path starts at the current folder.
    """
    if is_url(out):
        raise KdxError("The runs of several students need a local folder.", "Give a local --out, or explain each student by itself.")
    _check_folder(out, students)
    files = {}
    for name, reference in students.items():
        if not reference.endswith(".toml"):
            known = ModelsFile(out / f"{name}.toml", base=None, student=_absolute(reference, Path()))
        elif teacher is None and base is None:
            files[name] = Path(reference)
            continue
        else:
            known = _located(read_models(reference))
        if teacher is not None:
            known = replace(known, teacher=_absolute(teacher, Path()))
        if base is not None:
            known = replace(known, base=None if base == NO_BASE else _absolute(base, Path()))
        files[name] = _write(known, out / f"{name}.toml")
    return files


def _located(models: ModelsFile) -> ModelsFile:
    """The models file with absolute paths, so that it can be written elsewhere, and without the scores during training, which belong to its
    own teacher and base."""
    folder = models.path.parent
    student, base, teacher = (None if text is None else _absolute(text, folder) for text in (models.student, models.base, models.teacher))
    used, targets = (
        str((folder / text).resolve()) if text is not None and (folder / text).exists() else text for text in (models.used, models.targets)
    )
    training = {key: value for key, value in models.training.items() if key != "probe"}
    return replace(models, student=student or models.student, base=base, teacher=teacher, used=used, targets=targets, training=training)


def _absolute(reference: str, folder: Path) -> str:
    if is_file(reference):
        return str((folder / Path(reference).expanduser()).resolve())
    parsed = parse_reference(reference).located(folder)
    return str(parsed if parsed.weights is None else replace(parsed, weights=str((folder / Path(parsed.weights).expanduser()).resolve())))


def _write(models: ModelsFile, path: Path) -> Path:
    return write_models(
        path,
        base=models.base,
        student=models.student,
        teacher=models.teacher,
        layers=models.layers,
        classes=models.classes,
        targets=models.targets,
        preprocessing=models.preprocessing,
        data=models.data,
        fingerprint=models.fingerprint,
        split_seed=models.split_seed,
        used=models.used,
        training=models.training,
        resizing=models.resizing,
    ).path
