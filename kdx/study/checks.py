"""Checks of the jobs of a study before anything is trained, so that an error does not appear hours later in the first job that it stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kdx import models
from kdx.data.dataset import Dataset, open_data
from kdx.distill.monitoring import check_logs
from kdx.distill.number_formats import check_channels_last, check_settings
from kdx.distill.pairing import layer_pairs
from kdx.distill.processes import SINGLE
from kdx.distill.teacher_outputs import check_cache
from kdx.distill.train import training_device
from kdx.errors import about
from kdx.models.layer_pairs import LayerNames
from kdx.models.models_file import ModelsFile
from kdx.runs.geometry import geometry_within, requested_geometry
from kdx.runs.plan import Plan, RunOptions, gpu_decoder
from kdx.runs.trial import opened
from kdx.runs.whole import feature_shapes
from kdx.runtimes.choice import choose
from kdx.study.grid import Job


def check_machine(jobs: Sequence[Job]) -> None:
    """Raise KdxError for a device, a number format, a log or a folder of teachers' outputs of [training], and for a runtime, a device or a
    decoder of [explain], that cannot be used here."""
    for settings, extras in {(job.settings, job.extras) for job in jobs}:
        check_settings(settings, training_device(extras.device), SINGLE)
        check_logs(extras.log)
        check_cache(settings, None if extras.teacher_cache is None else Path(extras.teacher_cache))
    for data, network, device in {(job.data, _trained(job), job.extras.device) for job in jobs if job.settings.channels_last}:
        module = models.load(str(models.parse_reference(network).located().with_classes(len(open_data(data).classes)))).module
        check_channels_last(module, training_device(device))
    for options in {job.options for job in jobs}:
        choose(options.runtime, options.device, precision=options.precision)
        gpu_decoder(options)


def _trained(job: Job) -> str:
    """The network that a job trains."""
    return job.teacher if job.kind == "teacher" else job.student


def check_runs(jobs: Sequence[Job]) -> None:
    """Raise KdxError for an option of [explain] with which these cells cannot be explained. Their runs are planned with networks that are
    not trained.

    Devices are not opened, and the disk is not measured, because other machines may explain the cells.
    """
    datasets: dict[str, Dataset] = {}
    checked = set()
    for job in (job for job in jobs if job.kind == "cell"):
        options = replace(job.options, decoder="pillow")
        # Only a target, or a limit of the disk, can depend on the networks.
        networks = (job.teacher, job.student, job.preprocessing) if options.target is not None or options.max_disk is not None else None
        key = job.data, options, job.layers, job.settings.split_seed, networks
        if key in checked:
            continue
        checked.add(key)
        if job.data not in datasets:
            datasets[job.data] = open_data(job.data)
        with about(f"the runs of the data set {job.key.split('/')[0]}"):
            _check_run(job, options, datasets[job.data])


def _check_run(job: Job, options: RunOptions, dataset: Dataset) -> None:
    file = ModelsFile(
        Path("models.toml"),
        job.student,
        job.student,
        job.teacher,
        classes=dataset.classes,
        preprocessing=job.preprocessing,
        data=dataset.reference,
        split_seed=job.settings.split_seed,
    )
    # Without layers in the design, training chooses them, and an order of images may name any.
    layers = job.layers or ((options.gallery_order.rsplit("/", 2)[0],) if "/" in options.gallery_order else ())
    plan = Plan.with_models(dataset.reference, file.with_base(options.base), layers, options, dataset)
    if requested_geometry(plan) is None and options.geometry == "whole" and options.max_disk is not None:
        _check_size(plan, job)


def _check_size(plan: Plan, job: Job) -> None:
    """Raise KdxError if the features and distances of a run exceed the limit of its options."""
    if not job.layers:
        pairs = layer_pairs(plan.models.load("student").module, plan.models.load("teacher").module, job.preprocessing)
        plan = replace(plan, layers={student: LayerNames(student, student, teacher) for student, teacher in pairs})
    plan = replace(plan, options=replace(plan.options, runtime="eager", device="cpu", precision="float32"))
    with opened(plan, None, lambda line: None) as (explainer, size):
        shapes = feature_shapes(explainer, size, plan.options.project)
    geometry_within(plan, shapes, len(plan.indices), float("inf"), None, lambda: float("inf"))
