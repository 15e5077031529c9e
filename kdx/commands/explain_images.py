"""`kdx explain IMAGE ... --data DATA`: maps of a few images, each compared with reference images of a data set."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import kdx
from kdx.commands.references import ChosenReferences, choose_references
from kdx.data.class_embeddings import ClassEmbeddings
from kdx.data.inputs import as_pixels
from kdx.disk import write_atomic
from kdx.errors import KdxError
from kdx.explain.class_targets import class_table
from kdx.explain.explainer import Explainer
from kdx.explain.explainer_file import describe_explainer, no_reference_mode
from kdx.explain.graph import largest_size
from kdx.explain.networks import networks_of
from kdx.features.target import ClassNames
from kdx.maps.overlays import overlay
from kdx.models.models_file import read_models
from kdx.remote import is_url
from kdx.roles import MAPS, maps_among
from kdx.runs.collected import check_classes
from kdx.runs.plan import REFERENCE_IMAGES, RunOptions
from kdx.runs.schema import IMAGES_PAGE, MANIFEST, layer_file_names
from kdx.runtimes.choice import is_file

OPTIONS = frozenset(
    (
        *("data", "among", "label", "models", "base", "out", "layer", "reference", "seed", "resize", "interpolation"),
        *("runtime", "device", "precision", "chunk", "objective", "weighting", "pooled", "target"),
    )
)
"""The options of `kdx explain`, by their names in Python, that apply to a few images."""

_STYLE = (
    ":root{color-scheme:light dark}body{font-family:sans-serif;margin:1.5em}p{max-width:60em}div{overflow-x:auto}dt{font-weight:bold}"
    "td{vertical-align:top}td img{width:224px}th{text-align:left;padding-top:1em}"
)

_PASS = 32
"""Reference images per pass."""


@dataclass(frozen=True, eq=False)
class ImageMaps:
    """What is known of the images: their pixels [n, 3, h, w], the classes that were explained [n], each role's predictions, and the maps
    [n, h, w] by layer and kind."""

    pixels: Tensor
    labels: NDArray[np.int64]
    predictions: Mapping[str, NDArray[np.int64]]
    maps: Mapping[str, Mapping[str, NDArray[np.float32]]]


def run(
    paths: Sequence[Path],
    models: Path,
    data: str,
    out: Path,
    layers: Sequence[str] = (),
    options: RunOptions = RunOptions(),
    *,
    labels: Sequence[str] = (),
    announce: Callable[[str], None] = print,
) -> Path:
    """Explain the images in these files among reference images of ``data``, and write pictures and a page into ``out``; the page's path.

    The maps are UniCAM's: ``kdx.unicam(..., reference=...)`` of each image among ``options.reference_images`` (by default 256)
    class-balanced images of the train split. A map depends on its own image and on the reference images alone. labels: the classes of the
    images by name, in order; by default those that the student predicts. Of ``options``, those in
    OPTIONS apply. Scores need a set of images and are not computed.

    Raises KdxError for files, networks, data and labels that do not work, and for an explainer file.
    """
    if is_url(out):
        raise KdxError("The maps of a few images can only be written into a local folder.", "Give a local --out.")
    if is_file(models):
        raise no_reference_mode(describe_explainer(models))
    if labels and len(labels) != len(paths):
        raise KdxError(f"There are {len(labels)} labels and {len(paths)} images.", "Give --label once per image, or leave it out.")
    file = read_models(models).with_base(options.base)
    options = replace(options, geometry="reference")
    _check_folder(out)
    with Explainer.of(networks_of(file), layers or file.layers, options, classes=file.classes) as explainer:
        size = largest_size(record.image_size for record in explainer.networks().values())
        resizing = options.resizing(file.resizing)
        pixels = as_pixels(list(paths), replace(explainer.input_format, size=size, resizing=resizing))
        references = choose_references(data, options.reference_images or REFERENCE_IMAGES, options.seed, file, size, resizing)
        explainer.open(size, len(paths) + len(references.ids))
        announce(f"Runtime {explainer.choice.why}.")
        context = f"Every image is compared with {len(references.ids)} reference images of {data}."
        announce(context)
        embeddings = class_table(options.target, file, references.classes)
        maps = _maps(explainer, pixels, references, labels, embeddings)
    return _write(out, paths, maps, references.classes, context)


def check_options(given: Collection[str]) -> None:
    """Raise KdxError for options of `kdx explain`, by their names in Python, that do not apply to a few images."""
    others = [f"--{name.replace('_', '-')}" for name in given if name not in OPTIONS]
    if others:
        verb, them = ("does", "it") if len(others) == 1 else ("do", "them")
        raise KdxError(
            f"{', '.join(others)} {verb} not apply to a few images.", f"Leave {them} out, or explain the data set without --data."
        )


def _check_folder(out: Path) -> None:
    """KdxError for the folder of a run, whose files are not to be mixed with these."""
    if (out / MANIFEST).exists():
        raise KdxError(f"{out} contains a run over a data set.", "Choose another --out.")


def _maps(
    explainer: Explainer, pixels: Tensor, references: ChosenReferences, labels: Sequence[str], embeddings: ClassEmbeddings | None
) -> ImageMaps:
    logits, features = explainer.features(pixels)
    check_classes(logits, len(references.classes))
    predictions = {role: rows.argmax(1).numpy(force=True) for role, rows in logits.items()}
    given = ClassNames(list(references.classes), known=True).target(list(labels)) if labels else predictions["student"]
    parts = [explainer.features(part)[1] for part in references.images.images.split(_PASS)]
    settings, maps = explainer.settings, {}
    own_target, their_target = (
        numbers if embeddings is None else embeddings.of(numbers) for numbers in (given, references.images.labels.numpy())
    )
    for layer in explainer.layers:
        known = {role: torch.cat([part[layer][role] for part in parts]) for role in explainer.roles}
        kinds = {}
        for kind, (explained, other) in maps_among(explainer.roles).items():
            own, theirs = features[layer], None if other is None else features[layer][other]
            context = kdx.ReferenceSet(
                known[explained], None if other is None else known[other], torch.from_numpy(their_target), pooled=settings.pooled
            )
            result = kdx.unicam(
                own[explained],
                theirs,
                torch.from_numpy(own_target),
                objective=settings.objective,
                weighting=settings.weighting,
                pooled=settings.pooled,
                reference=context,
            )
            kinds[kind] = result.maps.float().numpy(force=True)
        maps[layer] = kinds
    return ImageMaps(pixels, given, predictions, maps)


def _write(out: Path, paths: Sequence[Path], images: ImageMaps, classes: Sequence[str], context: str) -> Path:
    """One picture per image, and per image, layer and kind of map; and a page that shows them. context: a sentence for the page about what
    the images are compared with."""
    files = layer_file_names(list(images.maps))
    columns = [(layer, kind) for layer, kinds in images.maps.items() for kind in kinds]
    head = "".join(f"<th>{html.escape(layer)}<br>{html.escape(kind)}</th>" for layer, kind in columns)
    kinds = dict.fromkeys(kind for _, kind in columns)
    meanings = "".join(f"<dt>{kind} ({html.escape(MAPS[kind].symbol)})</dt><dd>{html.escape(MAPS[kind].meaning)}</dd>" for kind in kinds)
    rows = []
    for number, path in enumerate(paths):
        picture = images.pixels[number].mul(255).round().byte().permute(1, 2, 0).numpy(force=True)
        name = f"{number + 1:03d}_{path.stem}"
        cells = [_cell(out, f"{name}.png", picture)]
        for layer, kind in columns:
            drawn = overlay(picture, images.maps[layer][kind][number])
            empty = not images.maps[layer][kind][number].any()
            cells.append(_cell(out, f"{name}_{files[layer]}_{kind}.png", drawn, "empty" if empty else ""))
        predicted = ", ".join(f"{role}: {classes[predictions[number]]}" for role, predictions in images.predictions.items())
        facts = html.escape(f"{path.name}, explained as {classes[images.labels[number]]} ({predicted})")
        rows.append(f'<tr><th colspan="{len(cells)}">{facts}</th></tr><tr>{"".join(cells)}</tr>')
    page = out / IMAGES_PAGE
    title = f"UniCAM’s maps of {len(paths)} {'image' if len(paths) == 1 else 'images'}"
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>kdx: {title}</title><style>{_STYLE}</style><h1>{title}</h1><p>{html.escape(context)} A map is transparent where it is "
        "zero, and yellow at its own highest value: two maps have no common scale.</p>"
        f"<dl>{meanings}</dl><div><table><tr><th>image</th>{head}</tr>{''.join(rows)}</table></div></html>\n"
    )
    write_atomic(page, text.encode())
    return page


def _cell(out: Path, name: str, pixels: NDArray[np.uint8], note: str = "") -> str:
    """Write a picture, and return the cell of the page that shows it."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    write_atomic(out / name, content.getvalue())
    return f'<td><img src="{quote(name)}" alt="{html.escape(name)}">{f"<br>{note}" if note else ""}</td>'
