"""The command line: one thin function a command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from kdx.choices import Features, FileFormat, FileKind, FilePrecision, ObjectiveName, Precision, RuntimeName, Weighting
from kdx.errors import KdxError
from kdx.progress import console


class _Commands(typer.core.TyperGroup):
    """Meets Ctrl-C before typer does, which would exit without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _complain("Stopped. The same command takes up where this one was.")
            sys.exit(130)


app = typer.Typer(
    cls=_Commands,
    help="Shows what a student network learned from its teacher, and measures it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


LayerOption = Annotated[
    list[str] | None, typer.Option("--layer", "-l", help="A layer, or STUDENT_LAYER=TEACHER_LAYER; repeat for more.", show_default=False)
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seeds every random choice; the manifest records it.")]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1; auto takes a GPU where there is one.")]


def _version(asked: bool) -> None:
    if asked:
        import kdx

        _say(f"kdx {kdx.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version and stop.")] = False,
) -> None: ...


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder to write to.")] = Path("kdx-demo"),
    seed: SeedOption = 0,
) -> None:
    """Handwritten digits: distil, export, explain, report. About a minute on two cores."""
    from kdx.commands.demo import run, table

    runs = run(out, seed=seed, announce=_say)
    console.print(table(runs))
    for method, folder in runs.items():
        _say(f"The page of the student distilled with {method}: {folder / 'report.html'}")


@app.command()
def distill(
    data: Annotated[str, typer.Argument(help="A folder of class folders, cifar10:FOLDER, or digits.")],
    teacher: Annotated[str, typer.Option(help="Model reference; with @weights it is taken as it is, else trained first.")],
    student: Annotated[str, typer.Option(help="Model reference of the student, and of the base.")],
    out: Annotated[Path, typer.Option(help="The folder for checkpoints and the models file.")],
    method: Annotated[str, typer.Option(help="kd (Hinton 2015) or at (attention transfer).")] = "kd",
    layer: LayerOption = None,
    epochs: Annotated[int, typer.Option(min=1)] = 30,
    batch: Annotated[int, typer.Option(min=2)] = 64,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr")] = 0.1,
    temperature: Annotated[float, typer.Option(help="kd: softens both networks' logits.")] = 4.0,
    alpha: Annotated[float, typer.Option(min=0, max=1, help="kd: the teacher's share of the loss.")] = 0.9,
    beta: Annotated[float, typer.Option(help="at: the weight of the attention loss.")] = 1000.0,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Images are resized to a square of this side; the teacher's own by default.")
    ] = None,
    augment: Annotated[bool, typer.Option("--augment", help="Shift the training images a little.")] = False,
    flip: Annotated[bool, typer.Option("--flip", help="Mirror half of the training images.")] = False,
    student_images: Annotated[int | None, typer.Option(min=2, help="Train base and student on this many images only.")] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Train a teacher (or take one), a base and a student, and write a models file for kdx explain."""
    from kdx.distill import Settings
    from kdx.distill import distill as train

    settings = Settings(
        method=method,
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        temperature=temperature,
        alpha=alpha,
        beta=beta,
        seed=seed,
        augment=augment,
        flip=flip,
        student_images=student_images,
        image_size=None if image_size is None else (image_size, image_size),
    )
    models = train(data, teacher=teacher, student=student, out=out, settings=settings, layers=layer, device=device)
    _say(f"Models file: {models}\nNext: kdx explain {data} --models {models} --out RUN")


@app.command()
def export(
    model: Annotated[
        str | None, typer.Argument(help="A model reference, MODELS.toml:ROLE, or an .onnx file to build an engine of.", show_default=False)
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", "-l", help="A layer whose features the file gives; repeat for more.", show_default=False),
    ] = None,
    kind: Annotated[
        FileKind,
        typer.Option(
            help="features: logits and features; gradients: the gradients at the layers too; explainer: two networks and their maps."
        ),
    ] = "features",
    explainer: Annotated[bool, typer.Option("--explainer", help="The same as --kind explainer.")] = False,
    student: Annotated[str | None, typer.Option(help="explainer: the student.", show_default=False)] = None,
    base: Annotated[str | None, typer.Option(help="explainer: the base.", show_default=False)] = None,
    teacher: Annotated[str | None, typer.Option(help="explainer: the teacher, if it is to be in the file.", show_default=False)] = None,
    at: Annotated[
        str | None, typer.Option(help="gradients: the layer whose gradient goes in, in place of the logits'.", show_default=False)
    ] = None,
    to: Annotated[FileFormat, typer.Option(help="tensorrt: an engine of the ONNX file as well.")] = "onnx",
    precision: Annotated[
        FilePrecision, typer.Option(help="Of the networks; what goes in and out, and the geometry, are float32.")
    ] = "fp32",
    batch: Annotated[
        str | None,
        typer.Option(help="tensorrt: MIN:BEST:MAX images at once; 1:32:64 by default, 4:32:64 for an explainer.", show_default=False),
    ] = None,
    arch: Annotated[
        str | None,
        typer.Option("--for", help="tensorrt: the GPU to build for, such as sm_86; the one here by default.", show_default=False),
    ] = None,
    tf32: Annotated[bool, typer.Option("--tf32", help="tensorrt: allow TensorFloat-32, faster and with three digits less.")] = False,
    out: Annotated[Path, typer.Option(help="The folder, or the .onnx file, to write.")] = Path(),
    image_size: Annotated[int | None, typer.Option(min=1, help="The side that images are resized to; the model's own by default.")] = None,
) -> None:
    """Write networks as a file that other runtimes execute, with their gradients or their maps inside, checked against PyTorch."""
    from kdx.commands import export as command

    named = {"network": model, "student": student, "base": base, "teacher": teacher}
    batches = None if batch is None else command.parse_batch(batch)
    options = command.ExportOptions(at, precision, image_size, to, batches, arch, tf32)
    with console.status("") as status:

        def announce(step: str) -> None:
            status.update(step)
            if not console.is_terminal:
                _say(step)

        exported = command.export(
            {role: reference for role, reference in named.items() if reference is not None},
            layer or (),
            "explainer" if explainer else kind,
            out,
            options,
            announce=announce,
        )
    for each in exported:
        console.print(_exported(each))


@app.command()
def explain(
    data: Annotated[str, typer.Argument(help="A folder of class folders, cifar10:FOLDER, or digits.")],
    models: Annotated[
        Path, typer.Option(help="The models file that names student and base, and the teacher where there is one; or an explainer file.")
    ],
    out: Annotated[Path, typer.Option(help="The run's folder; a stopped run there is taken up again.")],
    layer: LayerOption = None,
    batch: Annotated[int, typer.Option(min=4, help="Images whose pairwise geometry makes one set of maps.")] = 64,
    chunk: Annotated[int | None, typer.Option(min=1, help="Images through a network at once, to save memory; changes no result.")] = None,
    runtime: Annotated[RuntimeName, typer.Option(help="What executes the networks.")] = "auto",
    device: DeviceOption = "auto",
    precision: Annotated[Precision, typer.Option(help="Of the networks; bfloat16 is openvino's, on a CPU that has it.")] = "float32",
    objective: Annotated[ObjectiveName, typer.Option(help="What the maps raise.")] = "relevance",
    weighting: Annotated[Weighting, typer.Option(help="One weight a channel, or one a position (HiRes).")] = "gap",
    features: Annotated[
        Features, typer.Option(help="What the scores are of: whole images, or those pixels that matter most to each network.")
    ] = "raw",
    keep: Annotated[float, typer.Option(help="Salient features: the share of pixels to keep; the rest is imputed.")] = 0.5,
    noise: Annotated[float, typer.Option(help="Salient features: the deviation of noise on imputed pixels.")] = 0.0,
    reference: Annotated[int, typer.Option(min=0, help="Map every image among this many fixed images; 0: among its batch mates.")] = 0,
    split: Annotated[
        str | None, typer.Option(help="test, validation, train or all; by default test of the models' own data, all of other data.")
    ] = None,
    permutations: Annotated[int, typer.Option(min=0, help="Permutations for p-values.")] = 999,
    confidence: Annotated[float, typer.Option(min=0.5, max=0.999, help="Of the intervals.")] = 0.95,
    max_unreadable: Annotated[
        float,
        typer.Option(min=0, max=1, help="The share of corrupt images past which the run fails; one image always passes, unless this is 0."),
    ] = 0.01,
    workers: Annotated[
        int | None,
        typer.Option(
            min=0, help="Threads that decode ahead of the networks; by default one a core; changes no result.", show_default=False
        ),
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Explain a data set: two or four maps an image and layer, and scores with intervals, stored with a page that shows them."""
    from kdx.commands.explain import run
    from kdx.report.terminal import scores_table
    from kdx.runs.run import RunOptions

    options = RunOptions(
        batch=batch,
        chunk=chunk,
        runtime=runtime,
        device=device,
        precision=precision,
        objective=objective,
        weighting=weighting,
        features=features,
        keep=keep,
        noise=noise,
        reference_images=reference,
        split=split,
        permutations=permutations,
        confidence=confidence,
        max_unreadable=max_unreadable,
        workers=workers,
        seed=seed,
    )
    page = run(data, models, out, layer or (), options, command=["kdx", *sys.argv[1:]], announce=_say)
    console.print(scores_table(out))
    _say(f"The page: {page}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run's folder.")]) -> None:
    """Write the page again, from what the run stored."""
    from kdx.report.page import write_page

    _say(f"The page: {write_page(run)}")


@app.command()
def doctor() -> None:
    """What this machine can run, and what to install for the rest."""
    from rich.markup import escape
    from rich.table import Table

    from kdx.commands.doctor import probe

    table = Table("", "", "found", "hint", box=None, pad_edge=False)
    for finding in probe():
        mark = "[green]yes[/]" if finding.works else "[yellow]no[/]"
        table.add_row(mark, finding.name, escape(finding.found), "" if finding.works else escape(finding.hint))
    console.print(table)


def _exported(file: Any) -> Any:
    """A file that was written as a table: a line a fact."""
    from rich.table import Table
    from rich.text import Text

    def shapes(named: dict[str, tuple[int | str, ...]]) -> str:
        return "\n".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in named.items())

    table = Table(box=None, show_header=False, pad_edge=False)
    facts = {
        "file": str(file.path),
        "size": f"{file.bytes / 1e6:.1f} MB",
        "inputs": shapes(file.inputs),
        "outputs": shapes(file.outputs),
        "parity": "that of the ONNX file" if file.parity is None else file.parity.summary(),
        "time": f"{file.seconds:.1f} s",
    }
    for name, value in facts.items():
        table.add_row(name, Text(value, overflow="fold"))
    return table


def _say(line: str) -> None:
    console.print(line, markup=False, soft_wrap=True)


def _complain(line: str, style: str | None = None) -> None:
    from rich.console import Console

    Console(stderr=True, highlight=False).print(line, style=style, markup=False, soft_wrap=True)


def main() -> None:
    """The entry point: a KdxError is two sentences and exit status 2, Ctrl-C is 130, anything else is a bug and shows itself."""
    try:
        app()
    except KdxError as error:
        _complain(f"Error: {error.problem}", style="bold red")
        _complain(error.hint)
        sys.exit(2)
