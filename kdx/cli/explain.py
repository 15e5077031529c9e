"""`kdx explain`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kdx import progress
from kdx.choices import (
    DATA_KINDS,
    DecoderName,
    Features,
    GeometryName,
    Interpolation,
    ObjectiveName,
    Precision,
    PresetName,
    RatioName,
    ResizeMode,
    RuntimeName,
    SalientClass,
    SalientImage,
    SalientScore,
    StoredPrecision,
    Weighting,
)
from kdx.cli.interruption import is_first_process
from kdx.cli.options import (
    ClusterOption,
    CpusPerWorkerOption,
    DeviceOption,
    GalleryOption,
    ImagesOption,
    InterpolationHelp,
    LayerOption,
    OrderOption,
    ResizeHelp,
    SeedOption,
    UnreadableOption,
    WorkersPerGpuOption,
    announce_line,
    image_names,
    is_given,
    with_preset,
)
from kdx.cluster.options import cluster_options
from kdx.remote import as_path

if TYPE_CHECKING:
    from kdx.cluster.executor import Executor
    from kdx.cluster.options import ClusterOptions
    from kdx.runs.run import RunOptions


def explain(
    context: typer.Context,
    data: Annotated[
        list[str],
        typer.Argument(help=f"The data set: {DATA_KINDS}. Or a few image files, together with --data."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            parser=as_path,
            metavar="FOLDER",
            help="The folder of the run, or of the runs of several students. A run that was stopped there is resumed. The folder of one "
            "run may be a URL such as s3://bucket/run.",
        ),
    ],
    models: Annotated[
        Path | None,
        typer.Option(
            help="The models file, which names the student and optionally base and teacher. Or an exported explainer file.",
            show_default=False,
        ),
    ] = None,
    student: Annotated[
        list[str] | None,
        typer.Option(
            help="In place of --models, one of several students: NAME=REFERENCE, where REFERENCE is a model reference, an "
            "exported file or a models file. "
            "Teacher and base run once for all students.",
            show_default=False,
        ),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="With --student: the teacher of all students, a model reference.", show_default=False)
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="none: leave out the base of the models file. With --student: the base of all students, a model reference.",
            show_default=False,
        ),
    ] = None,
    layer: LayerOption = None,
    batch: Annotated[
        int,
        typer.Option(min=4, help="Images that the networks process at once. It changes results only with --geometry batch or reference."),
    ] = 64,
    chunk: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images per pass of a network, to save memory. --geometry whole rounds it up to a multiple of 16. It changes no result.",
        ),
    ] = None,
    geometry: Annotated[
        GeometryName,
        typer.Option(
            help="The images that each image is compared with. whole: all. reference: a fixed set in UniCAM's maps, otherwise the batch. "
            "batch: the batch, as in the authors' code. auto: whole within --max-disk and --max-minutes, otherwise reference."
        ),
    ] = "auto",
    runtime: Annotated[RuntimeName, typer.Option(help="What executes the networks.")] = "auto",
    device: DeviceOption = "auto",
    precision: Annotated[
        Precision,
        typer.Option(
            help="Number format of the networks. tf32: fewer digits, but faster on a GPU. bfloat16: for openvino on a CPU that supports it."
        ),
    ] = "float32",
    objective: Annotated[
        ObjectiveName,
        typer.Option(help="What the maps explain: relevance to the target, or what only the explained network has (uniqueness)."),
    ] = "relevance",
    weighting: Annotated[
        Weighting, typer.Option(help="gap: one weight per channel; elementwise: one weight per position (HiRes).")
    ] = "gap",
    pooled: Annotated[bool, typer.Option("--pooled", help="Measure distances between the spatial means of features.")] = False,
    features: Annotated[
        Features,
        typer.Option(
            help="What the scores compare: features of whole images (raw), or of the pixels that matter most to each network (salient)."
        ),
    ] = "raw",
    keep: Annotated[float, typer.Option(help="For salient: the share of pixels to keep. The other pixels are imputed.")] = 0.5,
    noise: Annotated[float, typer.Option(help="For salient: the standard deviation of the noise on imputed pixels.")] = 0.0,
    salient_class: Annotated[
        SalientClass,
        typer.Option(help="For salient: keep the pixels that matter for the class that each network predicts, or for the true class."),
    ] = "predicted",
    salient_score: Annotated[
        SalientScore, typer.Option(help="For salient: rank the pixels by the logit of that class, or by its probability (softmax).")
    ] = "logit",
    salient_image: Annotated[
        SalientImage,
        typer.Option(
            help="For salient: keep exactly the share of the pixels, or do as the authors' code does, with its contrast and noise."
        ),
    ] = "exact",
    ratios: Annotated[
        RatioName,
        typer.Option(
            help="For --geometry batch. summed: one score from all batches' inner products. mean: the biased mean of their scores."
        ),
    ] = "summed",
    preset: Annotated[
        PresetName | None,
        typer.Option(
            help="Use the options of the authors' code of December 2024. Options that are given take precedence.", show_default=False
        ),
    ] = None,
    reference: Annotated[
        int,
        typer.Option(
            min=0, help="The number of reference images, by default 256. This option selects --geometry reference.", show_default=False
        ),
    ] = 0,
    store: Annotated[
        StoredPrecision, typer.Option(help="For whole: the number format of the features on disk. float16 takes half the space.")
    ] = "float32",
    keep_features: Annotated[
        bool, typer.Option("--keep-features", help="For whole: keep the features in RUN/features after the run.")
    ] = False,
    project: Annotated[
        int,
        typer.Option(
            min=0, help="For whole: project the features to this many random channels before they are stored. Results become approximate."
        ),
    ] = 0,
    max_disk: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="For whole: the gigabytes that features and distances may take on disk; by default half of the free space. "
            "If they need more, auto selects reference.",
            show_default=False,
        ),
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="For auto: the minutes that whole may take, as estimated; by default 60. If it needs more, auto selects reference.",
            show_default=False,
        ),
    ] = None,
    random_baseline: Annotated[
        bool | None,
        typer.Option(
            help="Also compute the FSS of the student's architecture with random weights, in one more pass. By default only with a "
            "teacher and without a base.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="What relevance is measured against (docs/targets.md). labels: one-hot labels, the default. FILE: class embeddings "
            "(.npy with one row per class in order, or .npz, .csv or .parquet with class names). Or prototypes:NETWORK, soft:NETWORK "
            "or images:FILE.",
            show_default=False,
        ),
    ] = None,
    resize: Annotated[
        ResizeMode | None, typer.Option(help=f"{ResizeHelp} By default as the models file states, otherwise cover.", show_default=False)
    ] = None,
    interpolation: Annotated[
        Interpolation | None,
        typer.Option(help=f"{InterpolationHelp} By default as the models file states, otherwise bicubic.", show_default=False),
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(
            help="Also compute the scores of each group of images. The groups are the values of this column of the "
            "data's CSV file or of --groups-file.",
            show_default=False,
        ),
    ] = None,
    groups_file: Annotated[
        Path | None,
        typer.Option(help="A CSV file with the columns id (the image's name) and the group, for --groups.", show_default=False),
    ] = None,
    max_classes: Annotated[
        int, typer.Option(min=0, help="Compute scores per class if there are at most this many classes; 0 for none.")
    ] = 200,
    split: Annotated[
        str | None,
        typer.Option(
            help="The split: test, validation, train or all. By default test for the data that the networks were trained on, otherwise all."
        ),
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
    decoder: Annotated[
        DecoderName,
        typer.Option(
            help="The decoder of image files. pillow-draft decodes large JPEG files at a fraction of their size, which is faster; "
            "torchvision-cuda decodes JPEG files on the GPU. The pixels of both differ slightly."
        ),
    ] = "pillow",
    gallery: GalleryOption = 60,
    order: OrderOption = "balanced",
    images: ImagesOption = None,
    among: Annotated[
        str | None,
        typer.Option("--data", help="Explain a few image files, compared with reference images of this data set.", show_default=False),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            help="With --data: the class of each image, in the same order; by default the class that the student predicts.",
            show_default=False,
        ),
    ] = None,
    seed: SeedOption = 0,
    cluster: ClusterOption = None,
    workers_per_gpu: WorkersPerGpuOption = 1,
    cpus_per_worker: CpusPerWorkerOption = None,
) -> None:
    """Explain a data set: store maps of every image at every layer, scores with intervals, and a page that shows them."""
    from kdx.cluster import processes
    from kdx.commands import explain_images, explain_students
    from kdx.commands.explain import check_data_set, check_distributed, run
    from kdx.report.terminal import scores_table

    options = _options(
        context,
        preset,
        batch=batch,
        chunk=chunk,
        runtime=runtime,
        device=device,
        precision=precision,
        geometry=geometry,
        objective=objective,
        weighting=weighting,
        pooled=pooled,
        features=features,
        keep=keep,
        noise=noise,
        salient_class=salient_class,
        salient_score=salient_score,
        salient_image=salient_image,
        ratios=ratios,
        reference_images=reference,
        stored_precision=store,
        keep_features=keep_features,
        project=project,
        max_disk=max_disk,
        max_minutes=max_minutes,
        random_baseline=random_baseline,
        base=None if student else base,
        target=target,
        resize=resize,
        interpolation=interpolation,
        max_classes=max_classes,
        groups=groups,
        groups_file=groups_file,
        split=split,
        permutations=permutations,
        confidence=confidence,
        max_unreadable=max_unreadable,
        workers=workers,
        decoder=decoder,
        gallery=gallery,
        gallery_order=order,
        gallery_images=image_names(images),
        seed=seed,
    )
    distribution = cluster_options(cluster, workers_per_gpu, cpus_per_worker)
    if distribution is not None or processes.count() > 1:
        check_distributed(student, among)
    explain_students.check_options(data, models, student, teacher, among, label)
    if student:
        files = explain_students.student_files(explain_students.parse_students(student), teacher, base, out)
        comparison = explain_students.run(data[0], files, out, layer or (), options, command=["kdx", *sys.argv[1:]], announce=announce_line)
        typer.echo(f"The page: {comparison}")
        return
    assert models is not None
    if among is not None:
        explain_images.check_options([name for name in context.params if is_given(context, name)])
        images_page = explain_images.run(
            list(map(Path, data)), models, among, out, layer or (), options, labels=label or (), announce=announce_line
        )
        typer.echo(f"The page: {images_page}")
        return
    check_data_set(data, label)
    with _executor(distribution, device) as executor:
        if executor == "served":
            return
        page = run(data[0], models, out, layer or (), options, command=["kdx", *sys.argv[1:]], executor=executor, announce=announce_line)
    progress.console().print(scores_table(out))
    typer.echo(f"The page: {page}")


@contextmanager
def _executor(cluster: ClusterOptions | None, device: str) -> Iterator[Executor | Literal["served"] | None]:
    """The executor of the run; None to compute it in this process.

    "served" if this process has computed its part for the first of torchrun's processes and must do nothing else.
    """
    from kdx.cluster import processes

    if cluster is not None:
        from kdx.cluster.executor import RayExecutor

        yield RayExecutor(cluster, uses_gpus=device != "cpu")
    elif processes.count() == 1:
        yield None
    else:
        with processes.connected():
            if is_first_process():
                yield processes.ProcessExecutor()
            else:
                processes.serve()
                yield "served"


def _options(context: typer.Context, preset: PresetName | None, **values: Any) -> RunOptions:
    """The options of a run: those of the command line, and those of the preset where the command line gives none."""
    from kdx.runs.presets import PRESETS
    from kdx.runs.run import RunOptions

    return RunOptions(**with_preset(context, {} if preset is None else PRESETS[preset], values))
