"""The page and the pictures of a run: one self-contained HTML file, and composites under ``overlays/``."""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdx.disk import write_atomic
from kdx.report import gallery, overlays, plots, wording
from kdx.roles import BALANCE, CONDITIONAL, LIKENESS, MAPS, RELEVANCE, SCORES, SIMILARITY
from kdx.runs.record import FinishedRun, read_run, run_errors

if TYPE_CHECKING:
    from rich.table import Table

_TEMPLATES = Path(__file__).parent / "templates"

_PIXELATED = 96  # an image no larger than this is shown with its pixels as squares

_TABLES = (
    ("Likeness to the teacher", "FSS", (*SIMILARITY, LIKENESS)),
    ("Relevance to the labels", "RS", (*RELEVANCE,)),
    ("Relevance beyond another network", "RS(·|·)", (*CONDITIONAL, BALANCE)),
)
_PLOTS = (
    ("fss", "Likeness to the teacher (FSS)", plots.SIMILARITY, False),
    ("rs", "Relevance to the labels (RS)", plots.RELEVANCE, True),
    ("beyond", "Relevance beyond another network", plots.BEYOND, True),
)


def write_page(run: Path) -> Path:
    """Write ``RUN/report.html`` and the composites under ``RUN/overlays/`` from what the run's folder holds; return the page's path.

    The page is one file that opens from disk and asks the network for nothing. Each file is written beside its place and moved there,
    so an interrupted call leaves an older page whole. The composites are ``overlays/ROW_LAYER_KIND.png`` for every image that
    the run kept a picture of; a layer name that a file system might refuse is shortened and carries a digest.

    Raises KdxError where the folder is missing or incomplete, where the run has not finished, or where a newer kdx wrote it.
    """
    run = Path(run)
    with run_errors(run):
        loaded = read_run(run)
        cards, classes = gallery.cards(loaded)
        page = _page(loaded, cards, classes)
    target = run / "report.html"
    # A lone surrogate, which JSON can carry from a file name, has no UTF-8 form.
    write_atomic(target, page.encode("utf-8", "replace"))
    return target


def scores_table(run: Path) -> Table:
    """The run's scores for a terminal: a line a score or contrast, a column a layer, each value with its interval.

    Raises KdxError as ``write`` does.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    run = Path(run)
    with run_errors(run):
        loaded = read_run(run)
    title = f"Scores{' of salient features' if _salient(loaded) else ''} with {wording.percent(loaded.confidence, 0)} intervals"
    out = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column("score", no_wrap=True)
    for layer in loaded.layers:
        out.add_column(Text(layer), justify="right")  # Text: a layer's name is no markup
    ends = {[name for name in names if name in loaded.score_names][-1] for *_, names in _tables_of(loaded)}
    for name in (*loaded.score_names, *loaded.contrast_names):
        cells = []
        for layer in loaded.layers:
            value, interval = wording.span((loaded.scores[layer] | loaded.contrasts[layer])[name], 3, sign=name in loaded.contrast_names)
            # No-break spaces: a narrow terminal breaks between value and interval, not inside it.
            cells.append(Text.assemble((value, "bold"), f" ({interval})".replace(" to ", "\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}")))
        out.add_row(name.replace(" - ", " − "), *cells, end_section=name in ends)
    return out


# ---------------------------------------------------------------- the page


def _page(run: FinishedRun, cards: list[gallery.Card], classes: Counter[int]) -> str:
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = wording.percent
    style = (_TEMPLATES / "report.css").read_text(encoding="utf-8")
    script = (_TEMPLATES / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    gained, lost = (
        sum(s[f"{right}_prediction"] == s["label"] and s[f"{wrong}_prediction"] != s["label"] for s in run.samples)
        for right, wrong in (("student", "base"), ("base", "student"))
    )
    spoken = wording.read(
        {layer: (teacher, run.scores[layer], run.contrasts[layer]) for layer, teacher in run.layers.items()},
        run.accuracy,
        (gained, lost),
        run.confidence,
        _salient(run),
    )
    payload = {
        "colours": base64.b64encode(overlays.colours().tobytes()).decode("ascii"),
        "layers": list(run.layers),
        "kinds": gallery.kinds(run),
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
        teacher="teacher" in run.roles,
        configuration=run.configuration,
        method=run.manifest.get("method"),
        version=str(run.manifest["kdx"]),
        finished=str(run.manifest.get("finished") or run.manifest["created"])[:10],
        confidence=wording.percent(run.confidence, 0),
        reading=spoken,
        networks=_networks(run),
        pairs=list(run.layers.items()),
        tables=_tables(run),
        plots=_drawings(run, Markup),
        salient=_salient(run),
        permutations=run.configuration.get("permutations"),
        batches=run.manifest["batches"],
        explained=int(images["explained"]),
        unreadable=list(images.get("unreadable") or []),
        depends=_depends(run.configuration["reference_images"] or 0),
        legend=[kind for kind in MAPS.values() if kind.name in gallery.kinds(run)],
        gradient=_gradient(),
        opacity=round(100 * overlays.OPACITY),
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


def _salient(run: FinishedRun) -> str:
    """What the salient images are that the scores are of; nothing where they are of whole images."""
    features = run.configuration.get("features")
    return wording.kept_pixels(float(features["keep"]), float(features["noise"])) if features else ""


def _depends(reference_images: int) -> str:
    if not reference_images:
        return "A map also depends on the other images of its batch."
    return f"A map depends on its image and on the run’s {reference_images:,} reference images alone."


def _title(run: FinishedRun) -> str:
    data, split = str(run.configuration["data"]), run.configuration.get("split")
    return f"{data}, {split}" if split else data


def _networks(run: FinishedRun) -> list[dict[str, Any]]:
    said = {"base": "The network that the student is compared with.", "student": "The network under study."}
    if "teacher" in run.roles:
        said = {
            "teacher": "The network whose knowledge was to be passed on.",
            "base": "The student’s architecture, trained without the teacher.",
            "student": "The same architecture, trained under the teacher.",
        }
    models = run.configuration["models"]
    largest = models.get("teacher", {}).get("parameters")
    random = run.manifest.get("random_weights", [])
    out = []
    for role in run.roles:
        accuracy, (correct, n) = run.accuracy[role], run.correct[role]
        low, high = accuracy.interval
        parameters = models[role].get("parameters")
        share = f"{wording.number(100 * parameters / largest, 1)}% of the teacher’s" if largest and parameters and role != "teacher" else ""
        out.append(
            {
                "role": role,
                "said": f"{said[role]} Its weights are random, wholly or in part." if role in random else said[role],
                "reference": str(models[role]["reference"]),
                "parameters": f"{parameters:,}" if parameters else "not recorded",
                "share": share,
                "accuracy": wording.percent(accuracy.value),
                "interval": f"{wording.percent(low)} to {wording.percent(high)}",
                "count": f"{correct:,} of {n:,} images",
            }
        )
    return out


def _tables_of(run: FinishedRun) -> list[tuple[str, str, list[str]]]:
    """Those of _TABLES that the run has scores for, with the scores and contrasts that it has."""
    has = {*run.score_names, *run.contrast_names}
    held = [(title, symbol, [name for name in names if name in has]) for title, symbol, names in _TABLES]
    return [table for table in held if table[-1]]


def _tables(run: FinishedRun) -> list[dict[str, Any]]:
    out = []
    for title, symbol, names in _tables_of(run):
        rows = []
        for layer in run.layers:
            held = run.scores[layer] | run.contrasts[layer]
            cells = []
            for name in names:
                entry = held[name]
                value, interval = wording.span(entry, 3, sign=name in run.contrast_names)
                p = "" if entry.p_value is None else wording.probability(entry.p_value)
                cells.append({"name": name, "value": value, "interval": interval, "p": p, "settled": entry.settled(run.confidence)})
            rows.append((layer, cells))
        heads = [
            (name.replace(" - ", " − "), SCORES[name].label if name in SCORES else "difference", name in run.contrast_names)
            for name in names
        ]
        out.append({"title": title, "symbol": symbol, "heads": heads, "rows": rows})
    return out


def _drawings(run: FinishedRun, markup: Any) -> list[dict[str, Any]]:
    points = {layer: {name: (entry.value, entry.interval) for name, entry in scores.items()} for layer, scores in run.scores.items()}
    drawn = []
    for prefix, title, every, from_zero in _PLOTS:
        series = [one for one in every if one.score in run.score_names]
        if series:
            svg = markup(plots.plot(points, series, prefix, from_zero=from_zero))  # escaped by matplotlib
            zero = plots.limits(points, series, from_zero)[0] <= 0
            drawn.append({"title": title, "series": series, "svg": svg, "zero": zero})
    return drawn


def _gradient() -> str:
    """The colour scale as the stops of a CSS gradient, laid over grey as a map is laid over an image."""
    grey = np.full((1, 1, 3), 128, np.uint8)
    steps = [overlays.composite(grey, np.full((1, 1), t))[0, 0] for t in np.linspace(0, 1, 13)]
    return ", ".join(f"rgb({r} {g} {b})" for r, g, b in steps)


def _facts(held: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """A nested mapping as lines of name and value."""
    for name, value in held.items():
        path = f"{above}{name}"
        if isinstance(value, Mapping):
            yield from _facts(value, f"{path} · ")
        elif value is not None:
            yield path, " × ".join(map(str, value)) if isinstance(value, list) else str(value)
