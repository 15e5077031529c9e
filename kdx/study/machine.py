"""Checks what a study needs from the machine before anything is trained, not hours later in the first job that uses it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kdx.distill.monitoring import check_logs
from kdx.distill.number_formats import check_settings
from kdx.distill.processes import SINGLE
from kdx.distill.teacher_outputs import check_cache
from kdx.distill.train import training_device
from kdx.runs.plan import gpu_decoder
from kdx.runtimes.choice import choose
from kdx.study.grid import Job


def check_machine(jobs: Sequence[Job]) -> None:
    """Raise KdxError for a device, a number format, a log or a folder of teachers' outputs of [training], and for a runtime, a device or a
    decoder of [explain], that cannot be used here."""
    for settings, extras in {(job.settings, job.extras) for job in jobs}:
        check_settings(settings, training_device(extras.device), SINGLE)
        check_logs(extras.log)
        check_cache(settings, None if extras.teacher_cache is None else Path(extras.teacher_cache))
    for options in {job.options for job in jobs}:
        choose(options.runtime, options.device, precision=options.precision)
        gpu_decoder(options)
