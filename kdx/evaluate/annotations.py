"""Masks from annotations: a folder of mask images, COCO (boxes, polygons and run lengths), and Pascal VOC (boxes)."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdx.data.image_types import is_image_type
from kdx.data.pixels import orientation_of, turned
from kdx.disk import parse_json
from kdx.errors import KdxError, first_line

T = TypeVar("T")

Mask = NDArray[np.bool_]

_LARGEST = 178_956_970
"""The most pixels of an annotated image: those that Pillow opens."""


@dataclass(frozen=True)
class Annotations:
    """Masks of images by name. description: for the terminal. masks: a function per annotated image, from the (height, width) of the image
    and the name of its class to a mask [h, w]; the size is None where it is not known."""

    description: str
    masks: Mapping[str, Callable[[tuple[int, int] | None, str], Mask | None]] = field(repr=False)

    def match(self, images: Sequence[str]) -> dict[str, str]:
        """The annotated name of each of these images that has one.

        Names are compared without suffixes of image files. An image matches the annotation with its name; else the one whose name is the
        end of its own after a slash, or whose end its own name is. Raises KdxError if several could be meant.
        """
        full = {_stem(name): name for name in self.masks}
        ends: dict[str, list[str]] = defaultdict(list)
        for stem, name in full.items():
            for end in _ends(stem)[1:]:
                ends[end].append(name)
        matches = {}
        for image in images:
            own = _ends(_stem(image))
            longer = ends.get(own[0], [])
            if len(longer) > 1 and own[0] not in full:
                raise KdxError(
                    f"The image {image} has several masks: {', '.join(longer[:3])}.", "Name the masks like the images, folders included."
                )
            exact = next((full[end] for end in own if end in full), None)
            if exact is not None or longer:
                matches[image] = exact or longer[0]
        _check_unique(matches)
        return matches


def _check_unique(matches: Mapping[str, str]) -> None:
    images: dict[str, str] = {}
    for image, mask in matches.items():
        if mask in images:
            raise KdxError(
                f"The mask {mask} could be that of {images[mask]} and of {image}.", "Name the masks like the images, folders included."
            )
        images[mask] = image


def _stem(name: str) -> str:
    path = PurePosixPath(name.replace("\\", "/"))
    return str(path.with_suffix("") if is_image_type(path.suffix.lower()) else path)


def _ends(stem: str) -> list[str]:
    """The name, then its ends after each slash, the longest first."""
    parts = stem.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]


def read_annotations(path: Path) -> Annotations:
    """The annotations in a folder of mask images, a folder of Pascal VOC's XML files, or a JSON file of COCO.

    Raises KdxError for a path that is neither, and for a file that is damaged.
    """
    path = path.expanduser()
    if path.is_file():
        return _coco(path)
    if not path.is_dir():
        raise KdxError(f"There are no masks at {path}.", "Give a folder of mask images or of VOC's XML files, or a JSON file of COCO.")
    boxes = sorted(path.rglob("*.xml"))
    if boxes:
        return _voc(path, boxes)
    files = sorted(file for file in path.rglob("*") if is_image_type(file.suffix.lower()) and file.is_file())
    if not files:
        raise KdxError(f"{path} contains neither mask images nor XML files.", "Give the folder with the masks.")
    return Annotations(f"mask images of {path}", {file.relative_to(path).as_posix(): _of_file(file) for file in files})


# ---------------------------------------------------------------- mask images


def _of_file(file: Path) -> Callable[[tuple[int, int] | None, str], Mask]:
    def mask(_size: tuple[int, int] | None, _class_name: str) -> Mask:
        try:
            with Image.open(file) as image:
                return _marked(image)
        except Exception as error:  # decoders raise SyntaxError, struct.error and more on damaged files
            raise KdxError(f"The mask {file} cannot be read: {first_line(error)}.", "Repair it, or remove it.") from error

    return mask


def _marked(image: Image.Image) -> Mask:
    """Where a mask image, turned upright, is not zero; at least 128 in a JPEG file, which is not exact.

    In an image with a palette the index 255 is not marked if there are other indices: Pascal VOC marks borders that belong to no class.
    """
    is_exact = image.format != "JPEG"
    upright = turned(image, orientation_of(image))
    if upright.mode == "P":
        indices = np.asarray(upright)
        void = 255 if ((indices > 0) & (indices < 255)).any() else 0
        return np.asarray((indices != 0) & (indices != void))
    if upright.mode in ("LA", "RGBA", "PA"):
        rgba = np.asarray(upright.convert("RGBA"))
        return np.asarray(rgba[..., :3].any(2) & (rgba[..., 3] > 0))
    levels = np.asarray(upright if upright.mode in ("1", "L", "I", "F") or upright.mode.startswith("I;16") else upright.convert("RGB"))
    levels = levels.max(2) if levels.ndim == 3 else levels
    return np.asarray(levels != 0 if is_exact else levels >= 128)


# ---------------------------------------------------------------- COCO


def _coco(path: Path) -> Annotations:
    """Instances of COCO: segmentations where there are some, else boxes. Crowds, which contain many objects, are left out."""
    try:
        content = parse_json(path.read_text("utf-8"))
        images = {int(image["id"]): image for image in content["images"]}
        categories = {int(entry["id"]): str(entry["name"]) for entry in content.get("categories", [])}
        objects: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
        for annotation in content["annotations"]:
            if not annotation.get("iscrowd"):
                objects[int(annotation["image_id"])].append(annotation)
        masks = {str(images[number]["file_name"]): _instances(path, images[number], known, categories) for number, known in objects.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise KdxError(f"{path} is not a JSON file of COCO: {reason}.", "Give a file with images, annotations and categories.") from error
    return Annotations(f"objects of {path} (COCO)", masks)


def _instances(
    path: Path, image: Mapping[str, Any], objects: Sequence[Mapping[str, Any]], categories: Mapping[int, str]
) -> Callable[[tuple[int, int] | None, str], Mask | None]:
    stated = (int(image["height"]), int(image["width"])) if "height" in image and "width" in image else None
    if stated is not None and (min(stated) < 1 or stated[0] * stated[1] > _LARGEST):
        raise ValueError(f"the size of {image['file_name']} is {stated[0]} x {stated[1]}")

    def mask(size: tuple[int, int] | None, class_name: str) -> Mask | None:
        own = stated or size
        if own is None:
            return None
        try:
            named = [(categories.get(int(entry.get("category_id", -1)), ""), entry) for entry in objects]
            parts = [_coco_object(entry, own) for entry in _of_class(named, class_name, categories.values())]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
            raise KdxError(f"{path} has a damaged object in {image['file_name']}: {first_line(error)}.", "Repair the file.") from error
        return np.asarray(np.any(parts, axis=0)) if parts else None

    return mask


def _of_class(named: Iterable[tuple[str, T]], class_name: str, known: Iterable[str]) -> list[T]:
    """The objects of the image's class; all objects if its class is not among the known names."""
    wanted = class_name.casefold()
    if wanted not in {name.casefold() for name in known}:
        return [entry for _, entry in named]
    return [entry for name, entry in named if name.casefold() == wanted]


def _coco_object(entry: Mapping[str, Any], size: tuple[int, int]) -> Mask:
    """The mask of an object: its polygons or run lengths, else its box."""
    segmentation = entry.get("segmentation")
    if isinstance(segmentation, Mapping):
        counts = segmentation["counts"]
        return run_lengths(_decompressed(counts) if isinstance(counts, str) else counts, (segmentation["size"][0], segmentation["size"][1]))
    if segmentation:
        return np.asarray(np.any([_polygon(points, size) for points in segmentation], axis=0))
    x, y, width, height = entry["bbox"]
    return _box(x, y, x + width, y + height, size)


def _polygon(points: Sequence[float], size: tuple[int, int]) -> Mask:
    """The pixels whose centres lie in a polygon x0, y0, x1, y1, ...; where it overlaps itself, by the even-odd rule."""
    height, width = size
    x, y = (np.asarray(values, dtype=np.float64) for values in (points[::2], points[1::2]))
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a polygon with coordinates that are not finite")
    crossings = np.zeros((height, width + 1), dtype=np.int64)  # at the first pixel whose centre is to the right of an edge
    centres = np.arange(height) + 0.5
    for x0, y0, x1, y1 in zip(x, y, np.roll(x, -1), np.roll(y, -1), strict=True):
        rows = np.flatnonzero((y0 <= centres) != (y1 <= centres))
        at = x0 + (centres[rows] - y0) * (x1 - x0) / (y1 - y0) if len(rows) else centres[rows]
        crossings[rows, np.clip(np.ceil(at - 0.5), 0, width).astype(np.int64)] += 1
    return np.asarray(crossings.cumsum(1)[:, :width] % 2 == 1)


def _box(left: float, top: float, right: float, bottom: float, size: tuple[int, int]) -> Mask:
    """The pixels whose centres lie in a box, from its left and top edge to its right and bottom edge."""
    mask = np.zeros(size, dtype=bool)
    rows, columns = (slice(max(0, math.ceil(low - 0.5)), max(0, math.ceil(high - 0.5))) for low, high in ((top, bottom), (left, right)))
    mask[rows, columns] = True
    return mask


def run_lengths(counts: Sequence[int], size: tuple[int, int]) -> Mask:
    """The mask of COCO's run lengths: zeros and ones in turn, beginning with zeros, down one column after another."""
    values = np.arange(len(counts)) % 2 == 1
    total = sum(counts)  # before memory is allocated
    if total != size[0] * size[1] or total > _LARGEST:
        raise ValueError(f"run lengths of {total} pixels in a mask of {size[0]} x {size[1]}")
    flat = np.repeat(values, counts)
    return flat.reshape(size[1], size[0]).T


def _decompressed(text: str) -> list[int]:
    """The run lengths in COCO's compressed form: base 32 with 5 bits per character, and from the fourth run on the difference from the
    run before the last."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            if bits & 0x10:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


# ---------------------------------------------------------------- Pascal VOC


def _voc(folder: Path, files: Sequence[Path]) -> Annotations:
    """The boxes of one image per file. They count pixels from 1, both ends included."""
    objects = {file.relative_to(folder).with_suffix("").as_posix(): _read_voc(file) for file in files}
    known = {name for boxes, _ in objects.values() for name, _ in boxes}
    masks = {image: _voc_mask(boxes, stated, known) for image, (boxes, stated) in objects.items()}
    return Annotations(f"boxes of {folder} (Pascal VOC)", masks)


def _voc_mask(
    boxes: Sequence[tuple[str, Sequence[float]]], stated: tuple[int, int] | None, known: Collection[str]
) -> Callable[[tuple[int, int] | None, str], Mask | None]:
    def mask(size: tuple[int, int] | None, class_name: str) -> Mask | None:
        own = stated or size
        chosen = _of_class(boxes, class_name, known)
        if own is None or not chosen:
            return None
        parts = [_box(left - 1, top - 1, right, bottom, own) for left, top, right, bottom in chosen]
        return np.asarray(np.any(parts, axis=0))

    return mask


def _read_voc(file: Path) -> tuple[list[tuple[str, list[float]]], tuple[int, int] | None]:
    """The name and the ends of each box in a file, and the (height, width) of the image if the file states it."""
    try:
        text = file.read_text("utf-8")
        if "<!ENTITY" in text:  # which can expand without limit
            raise ValueError("it declares entities")
        root = ElementTree.fromstring(text)
        ends = ("xmin", "ymin", "xmax", "ymax")
        boxes = [(_text(entry, "name"), [float(_text(entry, f"bndbox/{end}")) for end in ends]) for entry in root.iter("object")]
        size = (0, 0) if root.find("size") is None else (int(_text(root, "size/height")), int(_text(root, "size/width")))
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise KdxError(f"{file} is not a file of Pascal VOC: {first_line(error)}.", "Repair it, or remove it.") from error
    return boxes, size if all(size) else None


def _text(element: ElementTree.Element, path: str) -> str:
    value = element.findtext(path)
    if value is None:
        raise ValueError(f"it has no {path}")
    return value.strip()
