"""`kdx export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdx import progress
from kdx.choices import NO_BASE, FileFormat, FileKind, FilePrecision
from kdx.remote import local_path


def export(
    model: Annotated[
        str | None,
        typer.Argument(help="A model reference, MODELS.toml:ROLE, or an .onnx file from which to build an engine.", show_default=False),
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", "-l", help="A layer whose features the file outputs. Repeat the option for more.", show_default=False),
    ] = None,
    kind: Annotated[
        FileKind,
        typer.Option(
            help="features: logits and features; gradients: also the gradients at the layers; explainer: one to three networks and maps."
        ),
    ] = "features",
    explainer: Annotated[bool, typer.Option("--explainer", help="The same as --kind explainer.")] = False,
    student: Annotated[str | None, typer.Option(help="explainer: the student.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option(help="explainer: the base, which may be none or left out.", show_default=False)] = None,
    teacher: Annotated[str | None, typer.Option(help="explainer: the teacher, which may be left out.", show_default=False)] = None,
    reference: Annotated[
        int,
        typer.Option(
            min=0, help="explainer: compare each image with this many fixed images of --data. 0: with the other images of its batch."
        ),
    ] = 0,
    data: Annotated[
        str | None,
        typer.Option(help="explainer: the data whose train split the reference images are from; see kdx explain.", show_default=False),
    ] = None,
    pooled: Annotated[bool, typer.Option("--pooled", help="explainer: measure distances between the spatial means of features.")] = False,
    at: Annotated[
        str | None,
        typer.Option(help="gradients: differentiate the feature of this layer instead of the logits.", show_default=False),
    ] = None,
    to: Annotated[FileFormat, typer.Option(help="tensorrt: also build an engine from the ONNX file.")] = "onnx",
    precision: Annotated[
        FilePrecision, typer.Option(help="Number format of the networks. Inputs, outputs and the geometry are float32.")
    ] = "fp32",
    batch: Annotated[
        str | None,
        typer.Option(
            help="tensorrt: images per batch as MIN:BEST:MAX; by default 1:32:64, or 4:32:64 for an explainer without reference images.",
            show_default=False,
        ),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option("--for", help="tensorrt: the GPU to build for, such as sm_86; by default this machine's.", show_default=False),
    ] = None,
    tf32: Annotated[
        bool,
        typer.Option("--tf32", help="tensorrt: allow TensorFloat-32, which is faster but has three decimal digits instead of seven."),
    ] = False,
    out: Annotated[Path, typer.Option(callback=local_path, help="The folder, or the .onnx file, to write.")] = Path(),
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Resize images to a square of this side; by default the model's own size.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="explainer: seed of the choice of the reference images; by default 0.", show_default=False)
    ] = None,
) -> None:
    """Export networks to a file for other runtimes, optionally with their gradients or maps inside, and check it against PyTorch."""
    from kdx.commands import export as command

    references = {"network": model, "student": student, "base": None if base == NO_BASE else base, "teacher": teacher}
    batches = None if batch is None else command.parse_batch(batch)
    options = command.ExportOptions(at, precision, image_size, to, batches, arch, tf32, reference, data, seed, pooled)
    with progress.console().status("") as status:

        def announce(step: str) -> None:
            status.update(step)
            if not progress.console().is_terminal:
                typer.echo(step)

        files = command.export(
            {role: reference for role, reference in references.items() if reference is not None},
            layer or (),
            "explainer" if explainer else kind,
            out,
            options,
            announce=announce,
        )
    for file in files:
        progress.console().print(command.file_table(file))
