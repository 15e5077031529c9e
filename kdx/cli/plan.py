"""`kdx plan`."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kdx import progress
from kdx.choices import DATA_KINDS
from kdx.cli.explain import explain
from kdx.cli.options import announce_line
from kdx.remote import as_path

_OPTIONS = {
    "batch": "batch",
    "chunk": "chunk",
    "geometry": "geometry",
    "runtime": "runtime",
    "device": "device",
    "precision": "precision",
    "base": "base",
    "objective": "objective",
    "weighting": "weighting",
    "pooled": "pooled",
    "features": "features",
    "reference": "reference_images",
    "store": "stored_precision",
    "project": "project",
    "max_disk": "max_disk",
    "max_minutes": "max_minutes",
    "random_baseline": "random_baseline",
    "target": "target",
    "resize": "resize",
    "interpolation": "interpolation",
    "split": "split",
    "permutations": "permutations",
    "workers": "workers",
    "decoder": "decoder",
    "seed": "seed",
}
"""The options of `kdx explain` that change its cost, by their names in Python there, with the fields of its `RunOptions`."""


def plan(
    data: Annotated[str, typer.Argument(help=f"The data set: {DATA_KINDS}.")],
    models: Annotated[Path, typer.Option(help="The models file, which names the student and optionally base and teacher.")],
    images: Annotated[
        int | None,
        typer.Option(min=4, help="Plan for this many images like those of DATA; by default for all of DATA.", show_default=False),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(help="A GPU by name, such as h100: estimate from its data sheet, without a trial here.", show_default=False),
    ] = None,
    machines: Annotated[int, typer.Option(min=1, help="With --on: the number of machines. The work is divided evenly.")] = 1,
    gpus: Annotated[int, typer.Option(min=1, help="With --on: the number of GPUs per machine.")] = 1,
    cores: Annotated[int, typer.Option(min=1, help="With --on: the number of cores per GPU, which decode images.")] = 12,
    out: Annotated[
        Path | None,
        typer.Option(
            parser=as_path,
            metavar="FOLDER",
            help="The folder of the run, or its URL, whose disk must have room; by default the current folder.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON: seconds, bytes and operations.")] = False,
    **values: Any,
) -> None:
    """Estimate the cost of kdx explain with the same options: time, operations, disk, memory. A short trial measures this machine."""
    from kdx.commands import plan as command
    from kdx.runs.hardware import cluster_of
    from kdx.runs.run import RunOptions

    cluster = cluster_of(on, machines, gpus, cores)
    layers = values.pop("layer") or ()
    options = RunOptions(**{_OPTIONS[name]: value for name, value in values.items()})
    announce = (lambda line: None) if as_json else announce_line
    estimate = command.run(data, models, layers, options, out=out, images=images, cluster=cluster, announce=announce)
    if as_json:
        typer.echo(json.dumps(estimate.as_json(), indent=2))
        return
    for part in command.tables(estimate):
        progress.console().print(part, soft_wrap=isinstance(part, str), markup=False)


def _with_options_of_explain() -> inspect.Signature:
    """The signature of `plan` with the parameters of `explain` that it accepts."""
    own = [parameter for parameter in inspect.signature(plan, eval_str=True).parameters.values() if parameter.name != "values"]
    shared = inspect.signature(explain, eval_str=True).parameters
    return inspect.Signature([*own, *(shared[name].replace(kind=own[0].kind) for name in ("layer", *_OPTIONS))])


plan.__signature__ = _with_options_of_explain()  # type: ignore[attr-defined]
