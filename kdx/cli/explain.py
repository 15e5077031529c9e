"""`kdx explain`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kdx import progress
from kdx.choices import (
    Features,
    GeometryName,
    Interpolation,
    ObjectiveName,
    Precision,
    ResizeMode,
    RuntimeName,
    SalientClass,
    SalientScore,
    StoredPrecision,
    Weighting,
)
from kdx.cli.options import (
    DataArgument,
    DeviceOption,
    GalleryOption,
    ImagesOption,
    InterpolationHelp,
    LayerOption,
    OrderOption,
    ResizeHelp,
    SeedOption,
    UnreadableOption,
    announce_line,
    image_names,
)


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
            "batch: its batch, as in the authors' code. auto: whole if it is within --max-disk and --max-minutes, else reference."
        ),
    ] = "auto",
    runtime: Annotated[RuntimeName, typer.Option(help="What executes the networks.")] = "auto",
    device: DeviceOption = "auto",
    precision: Annotated[
        Precision,
        typer.Option(
            help="Number format of the networks. tf32: fewer digits, faster on a GPU. bfloat16: for openvino on a CPU that supports it."
        ),
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
    salient_class: Annotated[
        SalientClass, typer.Option(help="salient: the class of which pixels are kept: the one that each network predicts, or the true one.")
    ] = "predicted",
    salient_score: Annotated[
        SalientScore, typer.Option(help="salient: what ranks the pixels: the logit of that class, or its probability (softmax).")
    ] = "logit",
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
    target: Annotated[
        Path | None,
        typer.Option(
            help="Class embeddings that relevance is measured against, in place of one-hot labels: .npy [classes, e] in the order of the "
            "classes, or .npz, .csv or .parquet with class names.",
            show_default=False,
        ),
    ] = None,
    resize: Annotated[
        ResizeMode | None, typer.Option(help=f"{ResizeHelp} By default as the models file states, else cover.", show_default=False)
    ] = None,
    interpolation: Annotated[
        Interpolation | None,
        typer.Option(help=f"{InterpolationHelp} By default as the models file states, else bicubic.", show_default=False),
    ] = None,
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
    gallery: GalleryOption = 60,
    order: OrderOption = "balanced",
    images: ImagesOption = None,
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
        salient_class=salient_class,
        salient_score=salient_score,
        reference_images=reference,
        stored_precision=store,
        keep_features=keep_features,
        project=project,
        max_disk=max_disk,
        max_minutes=max_minutes,
        target=target,
        resize=resize,
        interpolation=interpolation,
        split=split,
        permutations=permutations,
        confidence=confidence,
        max_unreadable=max_unreadable,
        workers=workers,
        gallery=gallery,
        gallery_order=order,
        gallery_images=image_names(images),
        seed=seed,
    )
    page = run(data, models, out, layer or (), options, command=["kdx", *sys.argv[1:]], announce=announce_line)
    progress.console().print(scores_table(out))
    typer.echo(f"The page: {page}")
