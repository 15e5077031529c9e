"""`kdx distill`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdx.choices import Interpolation, OptimizerName, ResizeMode, Resizing, ScheduleName, Selection, TrainingPrecision, TrainingPresetName
from kdx.cli.interruption import is_first_process
from kdx.cli.options import (
    DataArgument,
    DeviceOption,
    InterpolationHelp,
    LayerOption,
    ResizeHelp,
    SeedOption,
    UnreadableOption,
    with_preset,
)
from kdx.remote import local_path

if TYPE_CHECKING:
    from kdx.distill import TrainingSettings

_TRAINING, _LOSS, _IMAGES, _SPEED = "Training", "Method", "Images", "Speed and machine"
"""The groups of options in the help page."""


def _option(group: str, help_text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=help_text, rich_help_panel=group, **limits)


def distill(
    context: typer.Context,
    data: DataArgument,
    teacher: Annotated[
        str, typer.Option(help="Model reference of the teacher. A teacher with @weights is used as it is; otherwise kdx trains it first.")
    ],
    student: Annotated[str, typer.Option(help="Model reference of the student. The base has the same architecture.")],
    out: Annotated[Path, typer.Option(callback=local_path, help="The folder for the checkpoints and the models file.")],
    assistant: Annotated[
        list[str] | None,
        typer.Option(
            help="Model reference of a network that learns from the teacher and then teaches the student. Repeat the option for a chain.",
            show_default=False,
        ),
    ] = None,
    preset: Annotated[
        TrainingPresetName | None,
        typer.Option(
            help="Use the known settings of the paper's experiment (docs/data.md). Options that are given take precedence.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="none: train no base, which saves the time of one training. FILE: use base.safetensors of another run with the same "
            "settings. By default, kdx trains a base.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        str,
        _option(
            _LOSS,
            "The distillation loss: kd, fitnet, at, ofd, rkd, crd, reviewkd, dkd, dist, catkd or lskd. Several with weights: kd+at:0.5."
            " Options follow commas: dkd,nontarget=4. Your own loss: package.module:loss.",
        ),
    ] = "kd",
    layer: LayerOption = None,
    temperature: Annotated[float, _option(_LOSS, "For kd, lskd, dkd and dist: the number that divides the logits of both networks.")] = 4.0,
    alpha: Annotated[
        float, _option(_LOSS, "For kd and lskd: the weight of the teacher's loss; the labels have the weight 1 - alpha.", min=0, max=1)
    ] = 0.9,
    beta: Annotated[float, _option(_LOSS, "For at: the weight of the attention loss is half of this number.")] = 1000.0,
    label_smoothing: Annotated[float, _option(_LOSS, "The share of each label that is spread evenly over all classes.")] = 0.0,
    epochs: Annotated[int, _option(_TRAINING, "Passes over the training images, for each network.", min=1)] = 30,
    teacher_epochs: Annotated[int | None, _option(_TRAINING, "Epochs of the teacher; by default as --epochs.", min=1)] = None,
    batch: Annotated[int, _option(_TRAINING, "Images per training step, over all processes.", min=2)] = 64,
    accumulate: Annotated[int, _option(_TRAINING, "Compute the gradient of a batch in this many parts, to save memory.", min=1)] = 1,
    optimizer: Annotated[OptimizerName, _option(_TRAINING, "The optimizer of all networks.")] = "sgd",
    learning_rate: Annotated[float, _option(_TRAINING, "The largest learning rate of the schedule.", "--learning-rate", "--lr")] = 0.1,
    momentum: Annotated[float, _option(_TRAINING, "For sgd: the momentum.", min=0)] = 0.9,
    nesterov: Annotated[bool, _option(_TRAINING, "For sgd: use Nesterov momentum.")] = True,
    weight_decay: Annotated[float, _option(_TRAINING, "The weight decay. It applies to all weights.", min=0)] = 5e-4,
    clip: Annotated[
        float | None, _option(_TRAINING, "Scale the gradient down where its L2 norm over all weights is larger than this number.")
    ] = None,
    schedule: Annotated[ScheduleName, _option(_TRAINING, "How the learning rate changes after the warm-up.")] = "cosine",
    warm_up: Annotated[float, _option(_TRAINING, "The share of the training steps in which the learning rate rises from 0.")] = 0.1,
    milestone: Annotated[
        list[int] | None,
        _option(
            _TRAINING,
            "For step: an epoch after which the rate falls. Repeat the option. Default: 1/2 and 3/4 of the epochs.",
            show_default=False,
        ),
    ] = None,
    gamma: Annotated[float, _option(_TRAINING, "For step: the factor by which the learning rate changes at each milestone.")] = 0.1,
    ema: Annotated[
        float | None, _option(_TRAINING, "Validate and keep a moving average of the weights with this decay per step, such as 0.999.")
    ] = None,
    select: Annotated[
        Selection, _option(_TRAINING, "Keep the weights of the epoch with the best validation accuracy or loss, or of the last epoch.")
    ] = "accuracy",
    patience: Annotated[
        int | None,
        _option(_TRAINING, "Stop a training after this many epochs without a better one, as --select measures it.", min=1),
    ] = None,
    save_minutes: Annotated[
        float,
        _option(_TRAINING, "Minutes between two saved states from which a run can resume. A state is also saved after every epoch.", min=0),
    ] = 5.0,
    log: Annotated[
        list[str] | None,
        _option(
            _TRAINING,
            "Log every epoch to csv (OUT/ROLE.csv), tensorboard or wandb. Repeat the option for several logs.",
            show_default=False,
        ),
    ] = None,
    probe: Annotated[
        int | None,
        _option(_TRAINING, "After every epoch of the student, compute FSS and RS of this many validation images (OUT/student.csv).", min=4),
    ] = None,
    image_size: Annotated[
        int | None, _option(_IMAGES, "The side of the square to which images are resized; by default the teacher's own size.", min=1)
    ] = None,
    resize: Annotated[ResizeMode, _option(_IMAGES, f"{ResizeHelp} The models file records it.")] = "cover",
    interpolation: Annotated[Interpolation, _option(_IMAGES, InterpolationHelp)] = "bicubic",
    augment: Annotated[bool, _option(_IMAGES, "Shift the training images by a few pixels.", "--augment")] = False,
    flip: Annotated[bool, _option(_IMAGES, "Mirror half of the training images.", "--flip")] = False,
    random_crop: Annotated[
        float | None,
        _option(_IMAGES, "Train on random crops of the images, resized. The number is the smallest share of the area, such as 0.3."),
    ] = None,
    colour_jitter: Annotated[
        float, _option(_IMAGES, "Change brightness, contrast and saturation by up to this share, and the hue by up to a quarter of it.")
    ] = 0.0,
    rand_augment: Annotated[int | None, _option(_IMAGES, "Apply RandAugment at this magnitude from 0 to 30, such as 9.")] = None,
    mixup: Annotated[float, _option(_IMAGES, "Blend images, and their labels, in pairs (mixup) with this parameter, such as 0.2.")] = 0.0,
    cutmix: Annotated[
        float,
        _option(
            _IMAGES, "Replace a rectangle of an image by that of another, and mix the labels (cutmix), with this parameter, such as 1."
        ),
    ] = 0.0,
    student_images: Annotated[
        int | None, _option(_IMAGES, "Train base and student on only this many images, balanced over the classes.", min=2)
    ] = None,
    max_unreadable: UnreadableOption = 0.01,
    split_seed: Annotated[
        int,
        typer.Option(min=0, help="Seed of the split of the data into training, validation and test images. The models file records it."),
    ] = 0,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    precision: Annotated[
        TrainingPrecision, _option(_SPEED, "The number format in which networks compute in training. Weights and losses are float32.")
    ] = "float32",
    channels_last: Annotated[
        bool, _option(_SPEED, "Store features with channels last, which often makes convolutions faster on a GPU.", "--channels-last")
    ] = False,
    teacher_cache: Annotated[
        Path | None,
        _option(_SPEED, "A folder that stores the teacher's outputs for other students on the same images. It excludes augmentation."),
    ] = None,
    compile_networks: Annotated[bool, _option(_SPEED, "Compile the networks with torch.compile.", "--compile")] = False,
) -> None:
    """Train a teacher (or use an existing one), a base and a student, and write a models file for kdx explain."""
    from kdx.distill import distill as train

    settings = _settings(
        context,
        preset,
        method=method,
        epochs=epochs,
        teacher_epochs=teacher_epochs,
        batch=batch,
        optimizer=optimizer,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
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
        momentum=momentum,
        nesterov=nesterov and momentum > 0,
        schedule=schedule,
        warm_up=warm_up,
        milestones=tuple(milestone or ()),
        gamma=gamma,
        label_smoothing=label_smoothing,
        clip=clip,
        accumulate=accumulate,
        ema=ema,
        select=select,
        patience=patience,
        random_crop=random_crop,
        colour_jitter=colour_jitter,
        rand_augment=rand_augment,
        mixup=mixup,
        cutmix=cutmix,
        precision=precision,
        channels_last=channels_last,
        compile=compile_networks,
        save_minutes=save_minutes,
    )
    models = train(
        data,
        teacher=teacher,
        student=student,
        out=out,
        assistants=assistant or (),
        settings=settings,
        layers=layer,
        base=base,
        teacher_cache=teacher_cache,
        log=log or (),
        probe=probe,
        device=device,
    )
    if is_first_process():
        typer.echo(f"Models file: {models}\nNext: {shlex.join(['kdx', 'explain', data, '--models', str(models), '--out', 'RUN'])}")


def _settings(context: typer.Context, preset: TrainingPresetName | None, **values: Any) -> TrainingSettings:
    """The settings of the command line, and those of the preset where the command line gives none."""
    from kdx.distill import TrainingSettings
    from kdx.distill.presets import PRESETS

    return TrainingSettings(**with_preset(context, {} if preset is None else PRESETS[preset], values))
