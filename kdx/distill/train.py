"""Distillation from end to end: trains teacher, base and student, and writes them with a models file.

Base and student start from the same weights and see the same batches, so the teacher is the only difference between them. A training
that is interrupted and resumed ends with the same weights as one that is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kdx import models, patience, progress
from kdx.choices import NO_BASE
from kdx.distill import checkpoints, loop
from kdx.distill.display import console_reports
from kdx.distill.losses import LABELS, LOSS_SETTINGS, Batch, source_hashes
from kdx.distill.models_record import write_models_file
from kdx.distill.monitoring import check_logs, open_logs, validation_probe
from kdx.distill.networks import Distillation, check_networks
from kdx.distill.number_formats import check_settings
from kdx.distill.pairing import Pair, layer_pairs
from kdx.distill.processes import Processes
from kdx.distill.settings import EpochCallback, EpochResult, StepCallback, TrainingSettings
from kdx.distill.student_loss import StudentLoss, label_loss, rehearse
from kdx.distill.teacher_outputs import check_cache, teacher_outputs
from kdx.errors import KdxError, printable, resumable
from kdx.export.graphs import FeatureGraph


def distill(
    data: str,
    *,
    teacher: str,
    student: str,
    out: Path | str,
    assistants: Sequence[str] = (),
    settings: TrainingSettings = TrainingSettings(),
    layers: Sequence[str] | None = None,
    base: Path | str | None = None,
    teacher_cache: Path | str | None = None,
    log: Sequence[str] = (),
    probe: int | None = None,
    device: str = "auto",
    report: EpochCallback | None = None,
) -> Path:
    """Train teacher, base (the student's architecture, labels only) and student, and return the path of OUT/models.toml.

    A teacher whose reference has ``@weights``, or is a trained network by itself (``hf:``, ``.pt2``), is not trained. ``base`` is a
    base checkpoint of another run, which must have the same recipe, or ``none``: then no base is trained, and the models file has none,
    so that the student is compared with the teacher alone. The weights with the best validation accuracy are kept. The
    accuracy on the test split is measured at the end and recorded. ``layers`` are the pairs that feature losses match and that the
    models file names: ``layer3``, or ``student_layer=teacher_layer``; by default the layers that both networks have by name, or
    else pairs by resolution. Images are resized for all three networks to the size of the teacher's preprocessing, or to
    ``settings.image_size``. ``teacher_cache`` is a folder that stores the teacher's outputs for the training images, for this and later
    students; it excludes augmentation. ``assistants`` are networks between teacher and student (Mirzadeh et al., "Improved Knowledge
    Distillation via Teacher Assistant", AAAI 2020, arXiv:1902.03393): each is distilled, as a student with a base of its own, into
    OUT/assistant-N from the network before it, with the same settings and default pairs of layers, and the last one is the student's
    teacher. ``log`` names logs
    of every epoch: ``csv`` (OUT/ROLE.csv), ``tensorboard`` or ``wandb``. ``probe`` is a number of validation images whose scores are
    computed after every epoch of the student and stored in OUT/student.csv (`kdx.Probe`). ``report`` is called after
    every epoch. By default, bars show the progress in a terminal, and lines the epochs elsewhere.

    OUT/ROLE.state.pt contains everything needed to resume, also within an epoch: the same call after an interruption, even a killed
    process, gives the weights that an uninterrupted one gives. Finished networks are kept.

    In the processes that ``accelerate launch`` or ``torchrun`` started, all train together (`kdx.distill.processes`), and the first one
    writes the files and reports.

    Raises KdxError for references, layers and devices that do not work, for networks that do not have the data's classes or contain
    numbers that are not finite, for a loss that cannot train the student, for too many unreadable images, for an OUT that another process
    writes or that contains networks of another configuration, and if training diverges.
    """
    cache = None if teacher_cache is None else Path(teacher_cache)
    check_cache(settings, cache)
    check_logs(log)
    if assistants:
        _check_exists(base, Path(out))
        _check_chain(data, (teacher, *assistants, student), Path(out), settings, layers, device)
        teacher = _train_assistants(data, teacher, assistants, Path(out), settings, base, teacher_cache, device, report)
    with _prepared(data, Path(out), settings, device, teacher, student, report, [*log, *(["csv"] if probe else [])]) as (
        distillation,
        on_epoch,
    ):
        distillation = replace(distillation, has_base=base != NO_BASE)
        pairs = _rehearsed(distillation, layers)
        if distillation.has_base:
            _check_base(distillation, base)
        _train_teacher(distillation, on_epoch)
        if distillation.has_base:
            _train_base(distillation, base, on_epoch)
        _train_student(distillation, pairs, cache, probe, on_epoch)
        distillation.merge_unreadable()
        path = distillation.folder / "models.toml"
        if distillation.processes.is_main:
            write_models_file(path, distillation, pairs, probe)
        distillation.processes.wait()
    return path


def train_alone(
    role: Literal["teacher", "base"],
    data: str,
    *,
    teacher: str,
    student: str,
    out: Path | str,
    settings: TrainingSettings,
    log: Sequence[str] = (),
    device: str = "auto",
    report: EpochCallback | None = None,
) -> Path:
    """Train the teacher or the base of a distillation, and nothing else; return the path of OUT/ROLE.safetensors.

    The weights are those that `distill` trains with the same arguments, so that several distillations can share them: as
    ``teacher="REFERENCE@OUT/teacher.safetensors"`` and ``base="OUT/base.safetensors"``. A base depends on the teacher through the
    preprocessing, and on the student through the architecture. An interrupted training resumes. Raises KdxError as `distill` does.
    """
    with _prepared(data, Path(out), settings, device, teacher, student, report, log) as (distillation, on_epoch):
        check_networks(distillation)
        if role == "teacher":
            _train_teacher(distillation, on_epoch)
        else:
            _train_base(distillation, None, on_epoch)
        distillation.merge_unreadable()
    return distillation.weights_path(role)


@contextmanager
def _prepared(
    data: str,
    out: Path,
    settings: TrainingSettings,
    device: str,
    teacher: str,
    student: str,
    report: EpochCallback | None,
    log: Sequence[str],
) -> Iterator[tuple[Distillation, EpochCallback]]:
    """What the trainings of a folder share, and the callback after an epoch. Inside the block, no other process writes to the folder.

    The notes are printed at the beginning. So are the images that are known to be unreadable; if there are none, those that the block
    discovers are printed at its end, unless the caller reports the epochs itself.
    """
    processes, device = Processes.of_environment(device)
    chosen_device = training_device(device)
    check_settings(settings, chosen_device, processes)
    with ExitStack() as stack, resumable(lambda: any(any(out.glob(f"**/*.{kind}")) for kind in ("state.pt", "safetensors"))):
        stack.enter_context(patience.patient(torch.get_num_threads()))
        row_log = stack.enter_context(open_logs(log, out)) if processes.is_main else None
        distillation = Distillation.prepare(data, out, settings, chosen_device, teacher, student, processes, row_log)
        stack.enter_context(processes.alone_in(distillation.folder))
        announced = report is not None or not processes.is_main
        on_epoch: EpochCallback = _ignore
        on_step: StepCallback | None = None
        if processes.is_main:
            _print_notes(distillation)
            announced = announced or _print_unreadable(distillation)
            on_epoch, on_step = (report, None) if report is not None else stack.enter_context(console_reports())
        distillation = replace(distillation, on_step=on_step)
        yield distillation, on_epoch
    if not announced:  # images that are decoded again in every epoch are discovered to be unreadable during training
        _print_unreadable(distillation)


def _rehearsed(distillation: Distillation, layers: Sequence[str] | None) -> list[Pair]:
    """The pairs of layers. Raises KdxError for networks, layers and losses with which training would end in an error."""
    pairs = layer_pairs(
        distillation.initial_network("student"), distillation.initial_network("teacher"), distillation.preprocessing, layers
    )
    check_networks(distillation)
    rehearse(distillation, pairs)
    return pairs


def _check_chain(data: str, chain: Sequence[str], out: Path, settings: TrainingSettings, layers: Sequence[str] | None, device: str) -> None:
    """Raise KdxError if a distillation after the first one of a chain would end in an error. The first one checks itself."""
    processes, device = Processes.of_environment(device)
    chosen_device = training_device(device)
    check_settings(settings, chosen_device, processes)
    links = list(pairwise(chain))[1:]
    for number, (teacher, student) in enumerate(links, 1):
        distillation = Distillation.prepare(data, out, settings, chosen_device, teacher, student, processes)
        _rehearsed(distillation, layers if number == len(links) else None)


def _train_assistants(
    data: str,
    teacher: str,
    assistants: Sequence[str],
    out: Path,
    settings: TrainingSettings,
    base: Path | str | None,
    teacher_cache: Path | str | None,
    device: str,
    report: EpochCallback | None,
) -> str:
    """Distil each assistant from the network before it; the reference of the last one, with its weights."""
    for number, assistant in enumerate(assistants, 1):
        folder = out.absolute() / f"assistant-{number}"
        named = None if report is None else partial(_report_as, report, folder.name)
        if named is None and Processes.of_environment(device)[0].is_main:
            progress.print_line(f"Assistant {number} of {len(assistants)}: {assistant}")
        distill(
            data,
            teacher=teacher,
            student=assistant,
            out=folder,
            settings=settings,
            base=base if base == NO_BASE else None,
            teacher_cache=teacher_cache,
            device=device,
            report=named,
        )
        teacher = str(models.parse_reference(assistant).with_weights(str(folder / "student.safetensors")))
    return teacher


def _report_as(report: EpochCallback, folder: str, result: EpochResult) -> None:
    """Report the epoch of a network of an assistant's distillation under the name of its folder."""
    report(replace(result, network=f"{folder}/{result.network}"))


def _ignore(_result: EpochResult) -> None:
    """The callback of processes other than the first."""


def _print_notes(distillation: Distillation) -> None:
    for line in distillation.notes:
        if line:
            progress.print_line(line, "bold yellow" if line.startswith("Warning: ") else None)


def training_device(name: str) -> torch.device:
    """The device on which networks are trained. Raises KdxError for one that this machine does not have."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise KdxError(f"The device {name!r} cannot be used here.", "Give cpu, or auto; kdx doctor shows what this machine has.") from error
    return device


def _train_teacher(distillation: Distillation, on_epoch: EpochCallback) -> None:
    if not distillation.teacher_is_trained:
        loop.train(_label_training(distillation, "teacher"), distillation.folder, on_epoch)
        return
    network, path = distillation.initial_network("teacher"), distillation.weights_path("teacher")
    trained_on = {} if distillation.teacher_data is None else {checkpoints.TRAINED_ON: asdict(distillation.teacher_data)}
    recipe = checkpoints.Recipe({"given": models.weights_hash(network), **trained_on})
    if not checkpoints.is_finished(path, recipe) and distillation.processes.is_main:
        checkpoints.save_weights(path, network.state_dict(), recipe)
    distillation.processes.wait()
    on_epoch(EpochResult("teacher", 1, 1))


def _check_base(distillation: Distillation, checkpoint: Path | str | None) -> None:
    """Raise KdxError for a base checkpoint that is needed and is missing or has another recipe."""
    recipe = distillation.recipe("base")
    if checkpoint is None or checkpoints.is_finished(distillation.weights_path("base"), recipe):
        return
    if not checkpoints.is_finished(Path(checkpoint), recipe):
        raise _missing_base(checkpoint)


def _check_exists(checkpoint: Path | str | None, out: Path) -> None:
    """Raise KdxError for a base checkpoint that is needed at the end of a chain and is missing."""
    if checkpoint in (None, NO_BASE) or (out / "base.safetensors").exists():
        return
    if not Path(str(checkpoint)).exists():
        raise _missing_base(checkpoint)


def _missing_base(checkpoint: Path | str | None) -> KdxError:
    return KdxError(f"There is no base checkpoint {checkpoint}.", "Give the base.safetensors that another run of kdx distill wrote.")


def _train_base(distillation: Distillation, checkpoint: Path | str | None, on_epoch: EpochCallback) -> None:
    training, path = _label_training(distillation, "base"), distillation.weights_path("base")
    if checkpoint is not None and not checkpoints.is_finished(path, training.recipe):
        module = distillation.initial_network("base")
        models.load_weights(module, Path(checkpoint))
        if distillation.processes.is_main:
            checkpoints.save_weights(path, module.state_dict(), training.recipe)
        distillation.processes.wait()
    loop.train(training, distillation.folder, on_epoch)


def _label_training(distillation: Distillation, role: str) -> loop.Training:
    """The training of a network from labels alone."""
    graph, cross_entropy = distillation.training_graph(distillation.network_to_train(role)), label_loss(distillation)

    def loss(images: Tensor, labels: Tensor, _positions: Tensor) -> dict[str, Tensor]:
        return {LABELS: cross_entropy(graph(images)[0], labels)}

    return _training(distillation, role, graph, loss, distillation.recipe(role))


def _train_student(
    distillation: Distillation, pairs: Sequence[Pair], teacher_cache: Path | None, probe: int | None, on_epoch: EpochCallback
) -> None:
    settings, teacher = distillation.settings, distillation.trained_network("teacher")
    weights_hash = models.weights_hash(teacher)
    student_loss = StudentLoss.of_networks(
        distillation, distillation.network_to_train("student"), teacher, pairs, distillation.training_graph
    )
    recipe = distillation.recipe("base").with_entries(
        {
            "teacher": weights_hash,
            "method": settings.method,
            "layers": [list(pair) for pair in student_loss.pairs],
            **{key: getattr(settings, key) for key in LOSS_SETTINGS},
            **({"sources": sources} if (sources := source_hashes(settings.method)) else {}),
        }
    )
    from_teacher = teacher_outputs(distillation, student_loss.teacher, weights_hash, teacher_cache)
    objective, observed_student = student_loss.objective, student_loss.student

    def loss(images: Tensor, labels: Tensor, positions: Tensor) -> dict[str, Tensor]:
        teacher_batch = from_teacher(images, positions)
        parts: dict[str, Tensor] = objective(Batch(observed_student(images), teacher_batch, labels, positions))
        return parts

    training = _training(distillation, "student", observed_student.graph, loss, recipe)
    scores = validation_probe(distillation, pairs, probe) if probe and distillation.processes.is_main else None
    loop.train(replace(training, objective=objective, probe=scores), distillation.folder, on_epoch)


def _training(
    distillation: Distillation, role: str, graph: FeatureGraph, loss: loop.BatchLoss, recipe: checkpoints.Recipe
) -> loop.Training:
    return loop.Training(
        role,
        graph,
        loss,
        images=distillation.images["train" if role == "teacher" else "student"],
        validation=distillation.images["validation"],
        epochs=distillation.epochs(role),
        recipe=recipe,
        settings=distillation.settings,
        device=distillation.device,
        augmentation=distillation.augmentation,
        processes=distillation.processes,
        log=distillation.log,
        on_step=distillation.on_step,
    )


def _print_unreadable(distillation: Distillation) -> bool:
    """Print one line about the images that are left out, if there are any; returns whether there are."""
    unreadable = distillation.unreadable
    if unreadable:
        name, reason = next(iter(unreadable.items()))
        count = "1 image is" if len(unreadable) == 1 else f"{len(unreadable)} images are"
        progress.print_line(f"{count} left out because unreadable, first {printable(name)}: {reason}")
    return bool(unreadable)
