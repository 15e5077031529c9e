"""`kdx study`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from kdx import progress
from kdx.choices import DATA_KINDS, StudyPresetName
from kdx.cli.options import ClusterOption, CpusPerWorkerOption, WorkersPerGpuOption, announce_line
from kdx.cluster.options import cluster_options
from kdx.remote import local_path

_GRID, _SCALE = "Grid", "Training and explaining"
"""The groups of options in the help page."""


def _axis(help_text: str, *names: str) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=_GRID, show_default=False)


def study(
    file: Annotated[Path | None, typer.Argument(help="The study file (TOML). Options take precedence over it.", show_default=False)] = None,
    out: Annotated[
        Path, typer.Option(callback=local_path, help="The folder of the study. A study that was stopped there is resumed.")
    ] = Path("kdx-study"),
    preset: Annotated[
        StudyPresetName | None,
        typer.Option(
            help="paper: the design of the paper; name its data sets with --data. digits: small networks on handwritten digits, the "
            "default for --data digits without networks.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[list[str] | None, _axis(f"A data set, or NAME=DATA: {DATA_KINDS}. Repeat the option for more.")] = None,
    teacher: Annotated[
        list[str] | None,
        _axis("A teacher, NAME=REFERENCE. A teacher with @weights is used as it is; others are trained. Repeat the option for more."),
    ] = None,
    assistant: Annotated[
        list[str] | None,
        _axis(
            "A network, NAME=REFERENCE, that learns from a larger teacher and teaches a smaller student. Students are trained with and "
            "without it. Repeat the option for more."
        ),
    ] = None,
    student: Annotated[list[str] | None, _axis("A student, NAME=REFERENCE. Repeat the option for more.")] = None,
    method: Annotated[
        list[str] | None, _axis("A distillation method, as in kdx distill --method, or NAME=METHOD. Repeat the option for more.")
    ] = None,
    seeds: Annotated[
        str | None, _axis("The number of seeds, or the seeds themselves, such as 3,4,5. The default is 1, or 3 with a preset.")
    ] = None,
    layer: Annotated[
        list[str] | None, _axis("A pair of layers, as in kdx distill --layer. Repeat the option for more.", "--layer", "-l")
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Use only this many images of each data set, balanced over the classes.",
            rich_help_panel=_SCALE,
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Passes over the training images, for every network.", rich_help_panel=_SCALE, show_default=False),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="An entry of the study file, such as training.learning_rate=0.05 or explain.geometry=batch. Repeat the option for more.",
            rich_help_panel=_SCALE,
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes. By default one per core if all networks have fewer than 2 million parameters and no GPU is used, else 1.",
            show_default=False,
        ),
    ] = None,
    cluster: ClusterOption = None,
    workers_per_gpu: WorkersPerGpuOption = 1,
    cpus_per_worker: CpusPerWorkerOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells, the trainings and their cost, and train nothing.")] = False,
) -> None:
    """Train and explain a grid of teachers, students, methods, seeds and data sets, and write one page, one CSV and one LaTeX table."""
    from kdx.commands import study as command
    from kdx.study.flags import Flags, design_from
    from kdx.study.table import LATEX_FILE, TABLE_FILE

    options = cluster_options(cluster, workers_per_gpu, cpus_per_worker)
    flags = Flags(
        data=data or (),
        teachers=teacher or (),
        assistants=assistant or (),
        students=student or (),
        methods=method or (),
        seeds=seeds,
        layers=layer or (),
        images=images,
        epochs=epochs,
        settings=setting or (),
    )
    design = design_from(file, preset, flags)
    if dry_run:
        progress.console().print(command.dry_run(design, out, workers=workers))
        return
    page = command.run(design, out, workers=workers, cluster=options, command=["kdx", *sys.argv[1:]], announce=announce_line)
    announce_line(f"The tables: {out / TABLE_FILE} and {out / LATEX_FILE}")
    announce_line(f"The page: {page}")
