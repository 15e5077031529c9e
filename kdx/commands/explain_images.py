"""`kdx explain IMAGE ... --data DATA`: maps of a few images, each compared with reference images of a data set."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Mapping, Sequence
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
from kdx.data.inputs import as_pixels
from kdx.disk import write_atomic
from kdx.errors import KdxError
from kdx.explain.explainer import Explainer
from kdx.explain.explainer_file import describe_explainer, no_reference_mode
from kdx.explain.graph import largest_size
from kdx.explain.networks import networks_of
from kdx.features.target import ClassNames
from kdx.maps.overlays import overlay
from kdx.models.models_file import read_models
from kdx.roles import maps_among
from kdx.runs.collected import check_classes
from kdx.runs.plan import REFERENCE_IMAGES, RunOptions
from kdx.runs.schema import layer_file_names
from kdx.runtimes.choice import is_file

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
    images by name, in order; by default those that the student predicts. Scores need a set of images and are not computed.

    Raises KdxError for files, networks, data and labels that do not work, and for an explainer file.
    """
    if is_file(models):
        raise no_reference_mode(describe_explainer(models))
    if labels and len(labels) != len(paths):
        raise KdxError(f"There are {len(labels)} labels and {len(paths)} images.", "Give --label once per image, or leave it out.")
    file = read_models(models)
    options = replace(options, geometry="reference")
    with Explainer.of(networks_of(file), layers or file.layers, options, classes=file.classes) as explainer:
        size = largest_size(record.image_size for record in explainer.networks().values())
        pixels = as_pixels(list(paths), replace(explainer.input_format, size=size))
        references = choose_references(data, options.reference_images or REFERENCE_IMAGES, options.seed, file, size)
        explainer.open(size, len(paths) + len(references.ids))
        announce(f"Runtime {explainer.choice.why}.")
        announce(f"Every image is compared with {len(references.ids)} reference images of {data}.")
        maps = _maps(explainer, pixels, references, labels)
    return _write(out, paths, maps, references.classes)


def _maps(explainer: Explainer, pixels: Tensor, references: ChosenReferences, labels: Sequence[str]) -> ImageMaps:
    logits, features = explainer.features(pixels)
    check_classes(logits, len(references.classes))
    predictions = {role: rows.argmax(1).numpy(force=True) for role, rows in logits.items()}
    given = ClassNames(list(references.classes), known=True).target(list(labels)) if labels else predictions["student"]
    parts = [explainer.features(part)[1] for part in references.images.images.split(_PASS)]
    settings, maps = explainer.settings, {}
    for layer in explainer.layers:
        known = {role: torch.cat([part[layer][role] for part in parts]) for role in explainer.roles}
        kinds = {}
        for kind, (explained, other) in maps_among(explainer.roles).items():
            own, theirs = features[layer], None if other is None else features[layer][other]
            context = kdx.ReferenceSet(
                known[explained], None if other is None else known[other], references.images.labels, pooled=settings.pooled
            )
            result = kdx.unicam(
                own[explained],
                theirs,
                given,
                objective=settings.objective,
                weighting=settings.weighting,
                pooled=settings.pooled,
                reference=context,
            )
            kinds[kind] = result.maps.float().numpy(force=True)
        maps[layer] = kinds
    return ImageMaps(pixels, given, predictions, maps)


def _write(out: Path, paths: Sequence[Path], images: ImageMaps, classes: Sequence[str]) -> Path:
    """One picture per image, and per image, layer and kind of map; and a page that shows them."""
    files = layer_file_names(list(images.maps))
    columns = [(layer, kind) for layer, kinds in images.maps.items() for kind in kinds]
    head = "".join(f"<th>{html.escape(f'{layer} {kind}')}</th>" for layer, kind in columns)
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
    page = out / "images.html"
    style = "body{font-family:sans-serif}td{vertical-align:top}img{max-width:224px}th{text-align:left;padding-top:1em}"
    text = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>kdx: maps of {len(paths)} images</title><style>{style}</style>'
        f"<table><tr><th>image</th>{head}</tr>{''.join(rows)}</table></html>\n"
    )
    write_atomic(page, text.encode())
    return page


def _cell(out: Path, name: str, pixels: NDArray[np.uint8], note: str = "") -> str:
    """Write a picture, and return the cell of the page that shows it."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    write_atomic(out / name, content.getvalue())
    return f'<td><img src="{quote(name)}" alt="{html.escape(name)}">{f"<br>{note}" if note else ""}</td>'
