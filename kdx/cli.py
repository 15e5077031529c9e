"""The command line: one thin function per command. Everything heavy is imported inside the functions, so that help and errors are quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from kdx.choices import (
    Features,
    FileFormat,
    FileKind,
    FilePrecision,
    GeometryName,
    ObjectiveName,
    Precision,
    RuntimeName,
    StoredPrecision,
    Weighting,
)
from kdx.errors import KdxError
from kdx.progress import console

_RESUMABLE = ("demo", "distill", "explain")
"""The commands that continue a stopped run when they are called again."""


class _Commands(typer.core.TyperGroup):
    """Handles Ctrl-C before typer does, which would exit without a message."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _print_error("Stopped. Run the same command again to resume." if ctx.invoked_subcommand in _RESUMABLE else "Stopped.")
            sys.exit(130)


app = typer.Typer(
    cls=_Commands,
    help="Shows what a student network learned from its teacher, and measures it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


DataArgument = Annotated[str, typer.Argument(help="A folder with one folder per class, cifar10:FOLDER, or digits.")]
LayerOption = Annotated[
    list[str] | None,
    typer.Option("--layer", "-l", help="A layer, or STUDENT_LAYER=TEACHER_LAYER. Repeat the option for more layers.", show_default=False),
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of every random choice except the split of the data. It is recorded.")]
UnreadableOption = Annotated[
    float,
    typer.Option(
        min=0, max=1, help="The share of corrupt images above which the command fails. One image always may be, unless this is 0."
    ),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, a GPU by number such as cuda:1, or auto, which prefers a GPU.")]


def _print_version(requested: bool) -> None:
    if requested:
        import kdx

        typer.echo(f"kdx {kdx.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None: ...


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("kdx-demo"),
    seed: SeedOption = 0,
) -> None:
    """Distil, export and explain networks on handwritten digits, and write the reports. This takes about a minute on two cores."""
    from kdx.commands.demo import run, table

    runs = run(out, seed=seed, announce=typer.echo)
    console().print(table(runs))
    for method, folder in runs.items():
        typer.echo(f"The page of the student distilled with {method}: {folder / 'report.html'}")


@app.command()
def distill(
    data: DataArgument,
    teacher: Annotated[
        str, typer.Option(help="Model reference of the teacher. With @weights it is used as it is; otherwise it is trained.")
    ],
    student: Annotated[str, typer.Option(help="Model reference of the student and the base.")],
    out: Annotated[Path, typer.Option(help="The folder for the checkpoints and the models file.")],
    method: Annotated[str, typer.Option(help="kd (Hinton 2015) or at (attention transfer).")] = "kd",
    layer: LayerOption = None,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images, per network.")] = 30,
    batch: Annotated[int, typer.Option(min=2, help="Images per training step.")] = 64,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr", help="The largest learning rate of the schedule.")] = 0.1,
    temperature: Annotated[float, typer.Option(help="kd: divides the logits of both networks.")] = 4.0,
    alpha: Annotated[float, typer.Option(min=0, max=1, help="kd: the teacher's share of the loss.")] = 0.9,
    beta: Annotated[float, typer.Option(help="at: the weight of the attention loss.")] = 1000.0,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Resize images to a square of this side; by default the teacher's own size.")
    ] = None,
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
        max_unreadable=max_unreadable,
    )
    models = train(data, teacher=teacher, student=student, out=out, settings=settings, layers=layer, device=device)
    typer.echo(f"Models file: {models}\nNext: kdx explain {data} --models {models} --out RUN")


@app.command()
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
            help="features: logits and features; gradients: also the gradients at the layers; explainer: two networks and their maps."
        ),
    ] = "features",
    explainer: Annotated[bool, typer.Option("--explainer", help="The same as --kind explainer.")] = False,
    student: Annotated[str | None, typer.Option(help="explainer: the student.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option(help="explainer: the base.", show_default=False)] = None,
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
        bool, typer.Option("--tf32", help="tensorrt: allow TensorFloat-32, which is faster but has three digits fewer.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The folder, or the .onnx file, to write.")] = Path(),
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Resize images to a square of this side; by default the model's own size.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="explainer: seed of the choice of the reference images.")] = 0,
) -> None:
    """Export networks to a file for other runtimes, optionally with their gradients or maps inside, and check it against PyTorch."""
    from kdx.commands import export as command

    references = {"network": model, "student": student, "base": base, "teacher": teacher}
    batches = None if batch is None else command.parse_batch(batch)
    options = command.ExportOptions(at, precision, image_size, to, batches, arch, tf32, reference, data, seed)
    with console().status("") as status:

        def announce(step: str) -> None:
            status.update(step)
            if not console().is_terminal:
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
        console().print(command.file_table(file))


@app.command()
def explain(
    data: DataArgument,
    models: Annotated[
        Path, typer.Option(help="The models file, which names the student, the base and optionally the teacher; or an explainer file.")
    ],
    out: Annotated[Path, typer.Option(help="The folder of the run. A stopped run there is resumed.")],
    layer: LayerOption = None,
    batch: Annotated[
        int,
        typer.Option(
            min=4, help="Images that go through the networks at once. It changes results only with --geometry batch or reference."
        ),
    ] = 64,
    chunk: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images per pass of a network, to save memory. The geometry whole rounds it up to a multiple of 16. It changes no result.",
        ),
    ] = None,
    geometry: Annotated[
        GeometryName,
        typer.Option(
            help="The images that an image is compared with. whole: all of them; reference: in UniCAM's maps a fixed set, else its batch; "
            "batch: its batch, as published. auto: whole if it is within --max-disk and --max-minutes, else reference."
        ),
    ] = "auto",
    runtime: Annotated[RuntimeName, typer.Option(help="What executes the networks.")] = "auto",
    device: DeviceOption = "auto",
    precision: Annotated[
        Precision, typer.Option(help="Number format of the networks. bfloat16 needs the runtime openvino and a CPU that supports it.")
    ] = "float32",
    objective: Annotated[
        ObjectiveName, typer.Option(help="What the maps explain: relevance to the target, or uniqueness of the explained network.")
    ] = "relevance",
    weighting: Annotated[
        Weighting, typer.Option(help="gap: one weight per channel; elementwise: one weight per position (HiRes).")
    ] = "gap",
    features: Annotated[
        Features, typer.Option(help="What the scores compare: whole images, or the pixels that matter most to each network.")
    ] = "raw",
    keep: Annotated[float, typer.Option(help="salient: the share of pixels to keep. The other pixels are imputed.")] = 0.5,
    noise: Annotated[float, typer.Option(help="salient: the standard deviation of the noise on imputed pixels.")] = 0.0,
    reference: Annotated[
        int, typer.Option(min=0, help="The size of the reference set, by default 256. A size above 0 selects --geometry reference.")
    ] = 0,
    store: Annotated[
        StoredPrecision, typer.Option(help="whole: the number format of the features on disk. float16 takes half the space.")
    ] = "float32",
    keep_features: Annotated[
        bool, typer.Option("--keep-features", help="whole: keep the features after the run, in RUN/features.")
    ] = False,
    project: Annotated[
        int,
        typer.Option(
            min=0, help="whole: project the features to this many random channels before they are stored. Results become approximate."
        ),
    ] = 0,
    max_disk: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="whole: gigabytes that features and distances may take; by default half of the free space. "
            "Beyond it, auto selects reference.",
            show_default=False,
        ),
    ] = None,
    max_minutes: Annotated[
        float, typer.Option(min=0, help="whole: the time that the geometry may take, by estimate. Beyond it, auto selects reference.")
    ] = 60.0,
    split: Annotated[
        str | None,
        typer.Option(help="test, validation, train or all. By default test for the data that the networks were trained on, else all."),
    ] = None,
    permutations: Annotated[int, typer.Option(min=0, help="Permutations per p-value.")] = 999,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Confidence level of the intervals.")] = 0.95,
    max_unreadable: UnreadableOption = 0.01,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Threads that decode images while the networks run; by default one per core. It does not change the results.",
            show_default=False,
        ),
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Explain a data set: store maps of every image at every layer, scores with intervals, and a page that shows them."""
    from kdx.commands.explain import run
    from kdx.report.terminal import scores_table
    from kdx.runs.run import RunOptions

    options = RunOptions(
        batch=batch,
        chunk=chunk,
        runtime=runtime,
        device=device,
        precision=precision,
        geometry=geometry,
        objective=objective,
        weighting=weighting,
        features=features,
        keep=keep,
        noise=noise,
        reference_images=reference,
        stored_precision=store,
        keep_features=keep_features,
        project=project,
        max_disk=max_disk,
        max_minutes=max_minutes,
        split=split,
        permutations=permutations,
        confidence=confidence,
        max_unreadable=max_unreadable,
        workers=workers,
        seed=seed,
    )
    page = run(data, models, out, layer or (), options, command=["kdx", *sys.argv[1:]], announce=_announce)
    console().print(scores_table(out))
    typer.echo(f"The page: {page}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="The folder of a run.")]) -> None:
    """Write the page of a run again, from the stored results."""
    from kdx.report.page import write_page

    typer.echo(f"The page: {write_page(run)}")


@app.command()
def doctor() -> None:
    """List what this machine can run, and what to install for the rest."""
    from rich.markup import escape
    from rich.table import Table

    from kdx.commands.doctor import probe

    table = Table("", "", "result", "hint", box=None, pad_edge=False)
    for finding in probe():
        mark = "[green]yes[/]" if finding.works else "[yellow]no[/]"
        table.add_row(mark, finding.name, escape(finding.result), "" if finding.works else escape(finding.hint))
    console().print(table)


def _announce(line: str) -> None:
    """Print a line; a warning is bold and yellow in a terminal."""
    warning = line.startswith("Warning: ")
    typer.secho(line, bold=warning, fg="yellow" if warning else None)


def _print_error(line: str, style: str | None = None) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False).print(line, style=style, markup=False, soft_wrap=True)


def main() -> None:
    """The entry point. For a KdxError it prints two sentences and exits with 2; Ctrl-C exits with 130. Any other exception is a bug."""
    try:
        app()
    except KdxError as error:
        _print_error(f"Error: {error.problem}", style="bold red")
        _print_error(error.hint)
        sys.exit(2)


if __name__ == "__main__":
    main()
