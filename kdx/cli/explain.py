"""`kdx explain`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdx import progress
from kdx.choices import (
    DATA_KINDS,
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
from kdx.cli.options import (
    BaseOption,
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
    is_given,
)

if TYPE_CHECKING:
    from kdx.runs.run import RunOptions


def explain(
    context: typer.Context,
    data: Annotated[
        list[str],
        typer.Argument(help=f"The data set: {DATA_KINDS}; or a few image files, with --data."),
    ],
    models: Annotated[
        Path, typer.Option(help="The models file, which names the student and optionally the base and the teacher; or an explainer file.")
    ],
    out: Annotated[Path, typer.Option(help="The folder of the run. A stopped run there is resumed.")],
    base: BaseOption = None,
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
    pooled: Annotated[bool, typer.Option("--pooled", help="Measure distances between the spatial means of features.")] = False,
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
    salient_image: Annotated[
        SalientImage,
        typer.Option(help="salient: exactly the share of the pixels, or as in the authors' code, with its contrast and noise."),
    ] = "exact",
    ratios: Annotated[
        RatioName,
        typer.Option(
            help="batch: one score from the summed inner products of all batches, or the mean of the batches' scores, which is biased."
        ),
    ] = "summed",
    preset: Annotated[
        PresetName | None,
        typer.Option(
            help="Set all options to those of the authors' code of December 2024, except options that are given.", show_default=False
        ),
    ] = None,
    reference: Annotated[
        int,
        typer.Option(min=0, help="The number of reference images, by default 256. It selects --geometry reference.", show_default=False),
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
        float | None,
        typer.Option(
            min=0,
            help="auto: the estimated minutes that whole may take, by default 60. Beyond them, auto selects reference.",
            show_default=False,
        ),
    ] = None,
    random_baseline: Annotated[
        bool | None,
        typer.Option(
            help="Also compute the FSS of the student's architecture with random weights, in one more pass. By default only with a teacher "
            "and without a base.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="What relevance is measured against in place of one-hot labels: class embeddings in a file (.npy with one row per class "
            "in order, or .npz, .csv or .parquet with class names), prototypes:NETWORK, soft:NETWORK or images:FILE. labels: one-hot "
            "labels.",
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
    among: Annotated[
        str | None,
        typer.Option("--data", help="Explain a few image files among reference images of this data set.", show_default=False),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="With --data: the class of each image, in order; by default what the student predicts.", show_default=False),
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Explain a data set: store maps of every image at every layer, scores with intervals, and a page that shows them."""
    from kdx.commands import explain_images
    from kdx.commands.explain import check_data_set, run
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
        base=base,
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
    if among is not None:
        explain_images.check_options([name for name in context.params if is_given(context, name)])
        images_page = explain_images.run(
            list(map(Path, data)), models, among, out, layer or (), options, labels=label or (), announce=announce_line
        )
        typer.echo(f"The page: {images_page}")
        return
    check_data_set(data, label)
    page = run(data[0], models, out, layer or (), options, command=["kdx", *sys.argv[1:]], announce=announce_line)
    progress.console().print(scores_table(out))
    typer.echo(f"The page: {page}")


def _options(context: typer.Context, preset: PresetName | None, **values: Any) -> RunOptions:
    """The options of a run: those of the command line, and those of the preset where the command line gives none."""
    from kdx.runs.presets import PRESETS
    from kdx.runs.run import RunOptions

    for name, value in ({} if preset is None else PRESETS[preset]).items():
        if not is_given(context, name):
            values[name] = value
    return RunOptions(**values)
