"""What a study checks before it trains: the devices and runtimes of its jobs, and a first batch of each kind of training."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from kdx.data.dataset import open_data
from kdx.distill.rehearsal import rehearse_chain
from kdx.distill.train import training_device
from kdx.errors import about
from kdx.runs.plan import gpu_decoder
from kdx.runtimes.choice import choose
from kdx.study.design import Design
from kdx.study.grid import Job
from kdx.study.table import Cell


def rehearse(design: Design, cells: Sequence[Cell], jobs: Sequence[Job], complete: Collection[str]) -> None:
    """KdxError for a device, a runtime or a training, among those of the jobs that are not complete, that does not work here.

    complete: the keys of the jobs that are. A training is rehearsed with the first seed of a study.
    """
    todo = [job for job in jobs if job.key not in complete]
    for device in {job.extras.device for job in todo}:
        training_device(device)
    for options in {job.options for job in todo}:
        choose(options.runtime, options.device, precision=options.precision)
        gpu_decoder(options)
    chains = {(cell.data, cell.teacher, cell.assistants, cell.student, cell.method) for cell in cells if cell.key not in complete}
    datasets = {data: open_data(design.reference_of(data)) for data, *_ in chains}
    for data, teacher, assistants, student, method in sorted(chains):
        settings, extras = design.training_of(data, method, design.seeds[0])
        references = design.teachers[teacher], *(design.assistants[name] for name in assistants), design.students[student]
        with about(f"the method {method}"):
            rehearse_chain(datasets[data], references, settings, design.layers or None, training_device(extras.device))
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the processes of the study need the memory
