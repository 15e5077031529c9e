"""The gallery of a run: its images with their maps, for the page, and the composites under ``overlays/``."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdx.disk import write_atomic
from kdx.report import overlays
from kdx.roles import MAPS
from kdx.runs.record import FinishedRun

_LONGEST_EDGE = 320  # of an image on the page, in pixels

_PICTURE_EDGE = 112  # composites of smaller images are enlarged by a whole factor to about this

_MAP_EDGE = 64  # of a map on the page; larger maps are averaged down to it

_LOSSLESS = 24_000  # bytes up to which an image stays PNG on the page


@dataclass(frozen=True)
class Card:
    """One image of the gallery."""

    id: str
    label: int
    label_name: str
    image: str  # data URI
    width: int
    height: int
    verdicts: list[dict[str, Any]]  # a dict a network: role, prediction, right, confidence
    maps: list[list[list[Any] | None]]  # [layer][kind] -> [h, w, base64 of h*w bytes], None where the map is zero everywhere


def kinds(run: FinishedRun) -> tuple[str, ...]:
    """The maps that the run has."""
    return tuple(kind.name for kind in MAPS.values() if kind.score in run.score_names)


def cards(run: FinishedRun) -> tuple[list[Card], Counter[int]]:
    """The cards of the images that the run kept pictures of, in the run's order; their composites are written on the way."""
    import zarr

    kept = sorted((run.folder / "overlays").glob("*.png"))
    wanted = {int(path.stem): path for path in kept if re.fullmatch(r"[0-9]{5,}", path.stem)}
    samples = {int(sample["row"]): sample for sample in run.samples}
    rows = [row for row in sorted(wanted) if row in samples]
    group = zarr.open_group(run.folder / "maps.zarr", mode="r")
    maps: dict[tuple[str, str], NDArray[np.float32]] = {}
    for layer in run.layers:
        for kind in kinds(run):
            array = group[f"{layer}/{kind}"]
            if not isinstance(array, zarr.Array) or array.ndim != 3:
                raise ValueError(f"maps.zarr holds no maps [N, h, w] at {layer}/{kind}")
            if rows and rows[-1] >= array.shape[0]:
                raise ValueError(f"maps.zarr holds {array.shape[0]} maps at {layer}/{kind}, and there is a picture for row {rows[-1]}")
            maps[layer, kind] = (
                overlays.scaled_for_display(np.asarray(array.oindex[np.array(rows)])) if rows else np.empty((0, 1, 1), np.float32)
            )
    names = _file_names(list(run.layers))
    found = []
    for place, row in enumerate(rows):
        with Image.open(wanted[row]) as opened:
            image = opened.convert("RGB")
        large = _enlarged(image)
        for (layer, kind), scaled in maps.items():
            picture = Image.fromarray(overlays.composite(np.asarray(large), scaled[place]))
            write_atomic(
                run.folder / "overlays" / f"{wanted[row].stem}_{names[layer]}_{kind}.png", _encoded(picture, "PNG", compress_level=1)
            )
        sample = samples[row]
        label = int(sample["label"])
        verdicts = [
            {
                "role": role,
                "prediction": run.class_name(int(sample[f"{role}_prediction"])),
                "right": int(sample[f"{role}_prediction"]) == label,
                "confidence": float(sample[f"{role}_confidence"]),
            }
            for role in run.roles
        ]
        shown = _shrunk(image)
        packed = [[_packed(maps[layer, kind][place]) for kind in kinds(run)] for layer in run.layers]
        found.append(Card(str(sample["id"]), label, run.class_name(label), _data_uri(shown), *shown.size, verdicts, packed))
    return found, Counter(card.label for card in found)


def _file_names(layers: Sequence[str]) -> dict[str, str]:
    """A file-name part for each layer: its own name where every file system takes it, else a shortened one with a digest."""
    lower = Counter(layer.lower() for layer in layers)
    names = {}
    for layer in layers:
        # Two names that differ in case alone are one file on some systems.
        if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}", layer) and lower[layer.lower()] == 1:
            names[layer] = layer
        else:
            digest = hashlib.sha256(layer.encode("utf-8", "surrogatepass")).hexdigest()[:8]
            names[layer] = f"{re.sub(r'[^A-Za-z0-9]+', '-', layer)[:60].strip('-') or 'layer'}-{digest}"
    return names


def _enlarged(image: Image.Image) -> Image.Image:
    """A small image with its pixels repeated, so that a smooth map over it has room."""
    factor = math.ceil(_PICTURE_EDGE / max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST) if factor > 1 else image


def _shrunk(image: Image.Image) -> Image.Image:
    if max(image.size) <= _LONGEST_EDGE:
        return image
    small = image.copy()
    small.thumbnail((_LONGEST_EDGE, _LONGEST_EDGE), Image.Resampling.LANCZOS)
    return small


def _encoded(image: Image.Image, format_: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format=format_, **options)
    return out.getvalue()


def _data_uri(image: Image.Image) -> str:
    """The image as PNG where that is small, else as whichever of PNG and JPEG is smaller."""
    held, kind = _encoded(image, "PNG", optimize=True), "png"
    if len(held) > _LOSSLESS:
        jpeg = _encoded(image, "JPEG", quality=86)
        if len(jpeg) < len(held):
            held, kind = jpeg, "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(held).decode('ascii')}"


def _packed(map_: NDArray[np.float32]) -> list[Any] | None:
    """A scaled map for the page: height, width and one byte a place; None where nothing is there."""
    if not map_.any():
        return None
    height, width = map_.shape
    if max(height, width) > _MAP_EDGE:
        shrink = _MAP_EDGE / max(height, width)
        size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        map_ = np.asarray(Image.fromarray(map_).resize(size, Image.Resampling.BOX))
        height, width = map_.shape
    quantised = np.rint(np.clip(map_, 0, 1) * 255).astype(np.uint8)
    return [height, width, base64.b64encode(quantised.tobytes()).decode("ascii")]
