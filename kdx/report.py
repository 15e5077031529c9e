"""The page and the pictures of a run: one self-contained HTML file, and composites under ``overlays/``."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdx import pictures, reading
from kdx.errors import KdxError
from kdx.reading import CONTRASTS, Entry

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = 1
ROLES = ("teacher", "base", "student")
SCORES = ("FSS(S,T)", "FSS(B,T)", "RS(T)", "RS(S)", "RS(B)", "RS(S|B)", "RS(B|S)", "RS(T|S)", "RS(S|T)")

_TEMPLATES = Path(__file__).parent / "templates"
_COLUMNS = ("row", "id", "label", *(f"{role}_{what}" for role in ROLES for what in ("prediction", "confidence")))
_LONGEST_EDGE = 320  # of an image on the page, in pixels
_PIXELATED = 96  # an image no larger than this is shown with its pixels as squares
_PICTURE_EDGE = 112  # composites of smaller images are enlarged by a whole factor to about this
_MAP_EDGE = 64  # of a map on the page; larger maps are averaged down to it
_LOSSLESS = 24_000  # bytes up to which an image stays PNG on the page

_AGAIN = "Run the same kdx explain command again; it resumes where it stopped and writes what is missing."

_TABLES = (
    ("Likeness to the teacher", "FSS", ("FSS(S,T)", "FSS(B,T)", CONTRASTS[0])),
    ("Relevance to the labels", "RS", ("RS(T)", "RS(S)", "RS(B)")),
    ("Relevance beyond another network", "RS(·|·)", ("RS(S|B)", "RS(B|S)", "RS(T|S)", "RS(S|T)", CONTRASTS[1])),
)
_PLOTS = (
    ("fss", "Likeness to the teacher (FSS)", pictures.SIMILARITY),
    ("rs", "Relevance to the labels (RS)", pictures.RELEVANCE),
    ("beyond", "Relevance beyond another network", pictures.BEYOND),
)
_MEANINGS = {
    "FSS(S,T)": "student and teacher",
    "FSS(B,T)": "base and teacher",
    CONTRASTS[0]: "difference",
    "RS(T)": "teacher",
    "RS(S)": "student",
    "RS(B)": "base",
    "RS(S|B)": "distilled: student beyond base",
    "RS(B|S)": "residual: base beyond student",
    CONTRASTS[1]: "difference",
    "RS(T|S)": "missed: teacher beyond student",
    "RS(S|T)": "new: student beyond teacher",
}
_LEGEND = (
    ("distilled", "S | B", "What the student has and the base has not."),
    ("residual", "B | S", "What the base has and the student has dropped."),
    ("missed", "T | S", "What the teacher has and the student has missed."),
    ("new", "S | T", "What the student has and the teacher has not."),
)


@dataclass(frozen=True)
class _Run:
    """A complete run as its folder holds it."""

    folder: Path
    manifest: dict[str, Any]
    accuracy: dict[str, Entry]
    correct: dict[str, tuple[int, int]]  # role -> (correct, n)
    layers: dict[str, str]  # student layer -> teacher layer
    scores: dict[str, dict[str, Entry]]
    contrasts: dict[str, dict[str, Entry]]
    samples: list[dict[str, Any]]

    @property
    def configuration(self) -> dict[str, Any]:
        configuration: dict[str, Any] = self.manifest["configuration"]
        return configuration

    @property
    def confidence(self) -> float:
        return float(self.configuration["confidence"])

    def class_name(self, index: int) -> str:
        """A class by number; a network may predict one that the data set has no name for."""
        names = self.manifest["classes"]
        return str(names[index]) if 0 <= index < len(names) else f"class {index}"


def write(run: Path) -> Path:
    """Write ``RUN/report.html`` and the composites under ``RUN/overlays/`` from what the run's folder holds; return the page's path.

    The page is one file that opens from disk and asks the network for nothing. Each file is written beside its place and moved there,
    so an interrupted call leaves an older page whole. The composites are ``overlays/ROW_LAYER_KIND.png`` for every image that
    the run kept a picture of; a layer name that a file system might refuse is shortened and carries a digest.

    Raises KdxError where the folder is missing or incomplete, where the run has not finished, or where a newer kdx wrote it.
    """
    run = Path(run)
    with _mending(run):
        loaded = _load(run)
        cards, classes = _gallery(loaded)
        page = _page(loaded, cards, classes)
    target = run / "report.html"
    # A lone surrogate, which JSON can carry from a file name, has no UTF-8 form.
    _replace(target, page.encode("utf-8", "replace"))
    return target


def table(run: Path) -> Table:
    """The run's scores for a terminal: a line a score or contrast, a column a layer, each value with its interval.

    Raises KdxError as ``write`` does.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    run = Path(run)
    with _mending(run):
        loaded = _load(run)
    title = f"Scores with {reading.percent(loaded.confidence, 0)} intervals"
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column("score", no_wrap=True)
    for layer in loaded.layers:
        out.add_column(Text(layer), justify="right")  # Text: a layer's name is no markup
    for name in (*SCORES, *CONTRASTS):
        cells = []
        for layer in loaded.layers:
            value, interval = reading.span((loaded.scores[layer] | loaded.contrasts[layer])[name], 3, sign=name in CONTRASTS)
            # No-break spaces: a narrow terminal breaks between value and interval, not inside it.
            cells.append(Text.assemble((value, "bold"), f" ({interval})".replace(" to ", "\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}")))
        out.add_row(name.replace(" - ", " − "), *cells, end_section=name in ("FSS(B,T)", "RS(B)", "RS(S|T)"))
    return out


# ---------------------------------------------------------------- reading the folder


@contextlib.contextmanager
def _mending(run: Path) -> Iterator[None]:
    """What is missing inside a run's files is the folder's fault, not the program's: say so with the mend."""
    try:
        yield
    except (KeyError, TypeError, ValueError, OSError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise KdxError(f"The run in {run} cannot be read: {what}.", _AGAIN) from error


def _load(run: Path) -> _Run:
    if not run.is_dir():
        raise KdxError(f"There is no run folder at {run}.", "Give the folder that kdx explain wrote, the one named with --out.")
    manifest = _json(run, "manifest.json")
    written = manifest.get("format")
    if isinstance(written, int) and written > FORMAT:
        raise KdxError(
            f"The run in {run} was written in format {written}, and this kdx reads format {FORMAT}.",
            "Upgrade kdx: pip install --upgrade kdx",
        )
    if written != FORMAT:
        raise KdxError(f"{run / 'manifest.json'} is not the manifest of a run.", "Give the folder that kdx explain wrote.")
    if manifest.get("status") != "complete":
        images = manifest.get("images") or {}
        done = f": {images['explained']} of {images['planned']} images are explained" if {"explained", "planned"} <= set(images) else ""
        raise KdxError(f"The run in {run} is not finished{done}.", "Run the same kdx explain command again; it resumes where it stopped.")
    stored = _json(run, "scores.json")
    for name in ("samples.parquet", "maps.zarr"):
        if not (run / name).exists():
            raise KdxError(f"The run in {run} has no {name}.", _AGAIN)
    layers = {str(student): str(teacher) for student, teacher in manifest["configuration"]["layers"].items()}
    return _Run(
        run,
        manifest,
        {role: Entry.of(stored["accuracy"][role]) for role in ROLES},
        {role: (int(stored["accuracy"][role]["correct"]), int(stored["accuracy"][role]["n"])) for role in ROLES},
        layers,
        {layer: {name: Entry.of(stored["layers"][layer]["scores"][name]) for name in SCORES} for layer in layers},
        {layer: {name: Entry.of(stored["layers"][layer]["contrasts"][name]) for name in CONTRASTS} for layer in layers},
        _samples(run),
    )


def _json(run: Path, name: str) -> dict[str, Any]:
    path = run / name
    if not path.is_file():
        raise KdxError(f"The run in {run} has no {name}.", _AGAIN)
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise KdxError(f"{path} is not readable as JSON ({error}).", _AGAIN) from error
    if not isinstance(held, dict):
        raise KdxError(f"{path} does not hold what a run writes there.", _AGAIN)
    return held


def _samples(run: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        held = pyarrow.parquet.read_table(run / "samples.parquet", columns=list(_COLUMNS))
    except pyarrow.ArrowException as error:
        raise ValueError(f"samples.parquet: {error}") from error
    missing = [name for name in _COLUMNS if name not in held.column_names]
    if missing:
        raise ValueError(f"samples.parquet has no column {missing[0]}")
    rows: list[dict[str, Any]] = held.to_pylist()
    return rows


# ---------------------------------------------------------------- the gallery


@dataclass(frozen=True)
class _Card:
    """One image of the gallery."""

    id: str
    label: int
    label_name: str
    image: str  # data URI
    width: int
    height: int
    verdicts: list[dict[str, Any]]  # a dict a network: role, prediction, right, confidence
    maps: list[list[list[Any] | None]]  # [layer][kind] -> [h, w, base64 of h*w bytes], None where the map is zero everywhere


def _gallery(run: _Run) -> tuple[list[_Card], Counter[int]]:
    """The cards of the images that the run kept pictures of, in the run's order; their composites are written on the way."""
    import zarr

    kept = sorted((run.folder / "overlays").glob("*.png"))
    wanted = {int(path.stem): path for path in kept if re.fullmatch(r"[0-9]{5,}", path.stem)}
    samples = {int(sample["row"]): sample for sample in run.samples}
    rows = [row for row in sorted(wanted) if row in samples]
    group = zarr.open_group(run.folder / "maps.zarr", mode="r")
    maps: dict[tuple[str, str], NDArray[np.float32]] = {}
    for layer in run.layers:
        for kind in pictures.KINDS:
            array = group[f"{layer}/{kind}"]
            if not isinstance(array, zarr.Array) or array.ndim != 3:
                raise ValueError(f"maps.zarr holds no maps [N, h, w] at {layer}/{kind}")
            if rows and rows[-1] >= array.shape[0]:
                raise ValueError(f"maps.zarr holds {array.shape[0]} maps at {layer}/{kind}, and there is a picture for row {rows[-1]}")
            maps[layer, kind] = pictures.scaled(np.asarray(array.oindex[np.array(rows)])) if rows else np.empty((0, 1, 1), np.float32)
    names = _file_names(list(run.layers))
    cards = []
    for place, row in enumerate(rows):
        with Image.open(wanted[row]) as opened:
            image = opened.convert("RGB")
        large = _enlarged(image)
        for (layer, kind), scaled in maps.items():
            picture = Image.fromarray(pictures.composite(np.asarray(large), scaled[place]))
            _replace(run.folder / "overlays" / f"{wanted[row].stem}_{names[layer]}_{kind}.png", _encoded(picture, "PNG", compress_level=1))
        sample = samples[row]
        label = int(sample["label"])
        verdicts = [
            {
                "role": role,
                "prediction": run.class_name(int(sample[f"{role}_prediction"])),
                "right": int(sample[f"{role}_prediction"]) == label,
                "confidence": float(sample[f"{role}_confidence"]),
            }
            for role in ROLES
        ]
        shown = _shrunk(image)
        packed = [[_packed(maps[layer, kind][place]) for kind in pictures.KINDS] for layer in run.layers]
        cards.append(_Card(str(sample["id"]), label, run.class_name(label), _data_uri(shown), *shown.size, verdicts, packed))
    return cards, Counter(card.label for card in cards)


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


# ---------------------------------------------------------------- the page


def _page(run: _Run, cards: list[_Card], classes: Counter[int]) -> str:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = reading.percent
    style = (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    gained, lost = (
        sum(s[f"{right}_prediction"] == s["label"] and s[f"{wrong}_prediction"] != s["label"] for s in run.samples)
        for right, wrong in (("student", "base"), ("base", "student"))
    )
    spoken = reading.read(
        {layer: (teacher, run.scores[layer], run.contrasts[layer]) for layer, teacher in run.layers.items()},
        run.accuracy,
        (gained, lost),
        run.confidence,
    )
    payload = {
        "colours": base64.b64encode(pictures.colours().tobytes()).decode("ascii"),
        "layers": list(run.layers),
        "kinds": list(pictures.KINDS),
        "maps": [card.maps for card in cards],
    }
    images = run.manifest["images"]
    return environment.get_template(
        "report.html.j2"
    ).render(
        style=Markup(style),  # our own files, never text from a run
        script=Markup(script),
        script_digest=digest,
        payload=script_json(payload),
        title=_title(run),
        configuration=run.configuration,
        method=run.manifest.get("method"),
        version=str(run.manifest["kdx"]),
        finished=str(run.manifest.get("finished") or run.manifest["created"])[:10],
        confidence=reading.percent(run.confidence, 0),
        reading=spoken,
        networks=_networks(run),
        pairs=list(run.layers.items()),
        tables=_tables(run),
        plots=_drawings(run, Markup),
        permutations=run.configuration.get("permutations"),
        batches=run.manifest["batches"],
        explained=int(images["explained"]),
        unreadable=list(images.get("unreadable") or []),
        depends=_depends(run.configuration.get("reference_images")),
        legend=_LEGEND,
        gradient=_gradient(),
        opacity=round(100 * pictures.OPACITY),
        cards=cards,
        classes=[(index, run.class_name(index), count) for index, count in sorted(classes.items())],
        pixelated=all(max(card.width, card.height) <= _PIXELATED for card in cards),
        command=shlex.join(str(part) for part in run.manifest["command"]),
        facts=[*_facts(run.manifest["configuration"]), *_facts({"environment": run.manifest.get("environment") or {}})],
        manifest=json.dumps(run.manifest, indent=2, ensure_ascii=False),
    )


def script_json(held: object) -> Any:
    """JSON that is safe inside a ``<script>`` element: no ``<``, ``>`` or ``&`` and ASCII alone, so no tag, comment or line separator."""
    from markupsafe import Markup

    text = json.dumps(held, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _depends(reference_images: int | None) -> str:
    if reference_images is None:
        return "A map also depends on the other images of its batch."
    return f"A map depends on its image and on the run’s {reference_images:,} reference images alone."


def _title(run: _Run) -> str:
    data, split = str(run.configuration["data"]), run.configuration.get("split")
    return f"{data}, {split}" if split else data


def _networks(run: _Run) -> list[dict[str, Any]]:
    said = {
        "teacher": "The network whose knowledge was to be passed on.",
        "base": "The student’s architecture, trained without the teacher.",
        "student": "The same architecture, trained under the teacher.",
    }
    models = run.configuration["models"]
    largest = models["teacher"].get("parameters")
    out = []
    for role in ROLES:
        accuracy, (correct, n) = run.accuracy[role], run.correct[role]
        low, high = accuracy.interval
        parameters = models[role].get("parameters")
        share = f"{reading.number(100 * parameters / largest, 1)}% of the teacher’s" if largest and parameters and role != "teacher" else ""
        out.append(
            {
                "role": role,
                "said": said[role],
                "reference": str(models[role]["reference"]),
                "parameters": f"{parameters:,}" if parameters else "not recorded",
                "share": share,
                "accuracy": reading.percent(accuracy.value),
                "interval": f"{reading.percent(low)} to {reading.percent(high)}",
                "count": f"{correct:,} of {n:,} images",
            }
        )
    return out


def _tables(run: _Run) -> list[dict[str, Any]]:
    out = []
    for title, symbol, names in _TABLES:
        rows = []
        for layer in run.layers:
            held = run.scores[layer] | run.contrasts[layer]
            cells = []
            for name in names:
                entry = held[name]
                value, interval = reading.span(entry, 3, sign=name in CONTRASTS)
                p = "" if entry.p_value is None else reading.probability(entry.p_value)
                cells.append({"name": name, "value": value, "interval": interval, "p": p, "settled": entry.settled(run.confidence)})
            rows.append((layer, cells))
        heads = [(name.replace(" - ", " − "), _MEANINGS[name], name in CONTRASTS) for name in names]
        out.append({"title": title, "symbol": symbol, "heads": heads, "rows": rows})
    return out


def _drawings(run: _Run, markup: Any) -> list[dict[str, Any]]:
    points = {layer: {name: (entry.value, entry.interval) for name, entry in scores.items()} for layer, scores in run.scores.items()}
    return [
        {"title": title, "series": series, "svg": markup(pictures.plot(points, series, prefix))}  # escaped by matplotlib
        for prefix, title, series in _PLOTS
    ]


def _gradient() -> str:
    """The colour scale as the stops of a CSS gradient, laid over grey as a map is laid over an image."""
    grey = np.full((1, 1, 3), 128, np.uint8)
    steps = [pictures.composite(grey, np.full((1, 1), t))[0, 0] for t in np.linspace(0, 1, 13)]
    return ", ".join(f"rgb({r} {g} {b})" for r, g, b in steps)


def _facts(held: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """A nested mapping as lines of name and value."""
    for name, value in held.items():
        path = f"{above}{name}"
        if isinstance(value, Mapping):
            yield from _facts(value, f"{path} · ")
        elif value is not None:
            yield path, " × ".join(map(str, value)) if isinstance(value, list) else str(value)


# ---------------------------------------------------------------- writing


def _replace(target: Path, held: bytes) -> None:
    """Write beside the target, then move over it: a reader finds the old file or the new one, never half of one."""
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        beside.write_bytes(held)
        beside.replace(target)
    except OSError as error:
        raise KdxError(f"{target} cannot be written: {error.strerror}.", "Make room on the disk, or make the folder writable.") from error
    finally:
        beside.unlink(missing_ok=True)
