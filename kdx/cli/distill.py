"""`kdx distill`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdx.choices import Interpolation, ResizeMode, Resizing
from kdx.cli.options import DataArgument, DeviceOption, InterpolationHelp, LayerOption, ResizeHelp, SeedOption, UnreadableOption


def distill(
    data: DataArgument,
    teacher: Annotated[
        str, typer.Option(help="Model reference of the teacher. With @weights it is used as it is; otherwise it is trained.")
    ],
    student: Annotated[str, typer.Option(help="Model reference of the student and the base.")],
    out: Annotated[Path, typer.Option(help="The folder for the checkpoints and the models file.")],
    method: Annotated[
        str,
        typer.Option(
            help="kd, fitnet, at, ofd, rkd, crd, reviewkd, dkd, dist, catkd or lskd; several with weights: kd+at:0.5; options:"
            " dkd,nontarget=4; your own loss: package.module:loss."
        ),
    ] = "kd",
    layer: LayerOption = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images, per network.")] = 30,
    batch: Annotated[int, typer.Option(min=2, help="Images per training step.")] = 64,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", help="The largest learning rate of the schedule.")] = 0.1,
    temperature: Annotated[float, typer.Option(help="kd, lskd, dkd, dist: divides the logits of both networks.")] = 4.0,
    alpha: Annotated[float, typer.Option(min=0, max=1, help="kd, lskd: the teacher's share of the loss.")] = 0.9,
    beta: Annotated[float, typer.Option(help="at: the weight of the attention loss.")] = 1000.0,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Resize images to a square of this side; by default the teacher's own size.")
    ] = None,
    resize: Annotated[ResizeMode, typer.Option(help=f"{ResizeHelp} The models file records it.")] = "cover",
    interpolation: Annotated[Interpolation, typer.Option(help=InterpolationHelp)] = "bicubic",
    augment: Annotated[bool, typer.Option("--augment", help="Shift the training images by a few pixels.")] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the training images.")] = False,
    student_images: Annotated[int | None, typer.Option(min=2, help="Train base and student on only this many images.")] = None,
    max_unreadable: UnreadableOption = 0.01,
    split_seed: Annotated[
        int, typer.Option(min=0, help="Seed of the split into training, validation and test images. The models file records it.")
    ] = 0,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Train a teacher (or use an existing one), a base and a student, and write a models file for kdx explain."""
    from kdx.distill import TrainingSettings
    from kdx.distill import distill as train

    settings = TrainingSettings(
        method=method,
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        seed=seed,
        split_seed=split_seed,
        augment=augment,
        flip=flip,
        student_images=student_images,
        image_size=None if image_size is None else (image_size, image_size),
        resizing=Resizing(resize, interpolation),
        max_unreadable=max_unreadable,
    )
    models = train(data, teacher=teacher, student=student, out=out, settings=settings, layers=layer, device=device)
    typer.echo(f"Models file: {models}\nNext: kdx explain {data} --models {models} --out RUN")
