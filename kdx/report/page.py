"""The page of a run: one self-contained HTML file."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kdx.disk import remove_leftovers, write_atomic
from kdx.remote import as_path
from kdx.report import plots, wording
from kdx.report.evaluation import evaluation_section
from kdx.report.gallery import LEAST_STABILITY, MAP_SCRIPTS, Gallery, colour_tables, gradient, make_gallery
from kdx.report.groups import group_sections
from kdx.report.kinds import kinds_left_out
from kdx.report.layout import nested_facts, render, script_json
from kdx.report.map_facts import layer_facts
from kdx.report.networks import discordant, layer_table, network_cards, titles
from kdx.report.statements import statement_matrix
from kdx.report.tables import overview_table, score_tables
from kdx.report.training_plots import training_drawings
from kdx.runs import schema
from kdx.runs.record import RunRecord, read_run
from kdx.runs.target_names import target_phrase
from kdx.runs.training_scores import TrainingScores, read_training_scores

if TYPE_CHECKING:
    from markupsafe import Markup

_STYLES = ("statements.css", "gallery.css", "evaluation.css", "groups.css")

_SCRIPTS = (*MAP_SCRIPTS, "gallery.js", "sorting.js", "run.js")


def write_page(folder: Path) -> Path:
    """Write ``report.html`` and the composites under ``overlays/`` of the run in ``folder``; return the path of the page.

    Everything is read from the folder. The page is one file that opens from disk and sends no request. Each file is written under a
    temporary name and renamed, so an interrupted call leaves an older page intact. The composites are ``overlays/ROW_LAYER_KIND.png``
    for every image that the run has a picture of. A layer name that a file system might refuse is shortened and gets a digest.

    Raises KdxError where the folder is missing or incomplete, where the run is not complete, or where a newer kdx wrote it.
    """
    run = read_run(as_path(folder))
    for written_to in (run.folder, run.folder / schema.OVERLAYS):
        remove_leftovers(written_to)
    page = _page(run, make_gallery(run), read_training_scores(run.folder))
    target = run.folder / schema.PAGE
    # A lone surrogate, which JSON can carry from a file name, has no UTF-8 form.
    write_atomic(target, page.encode("utf-8", "replace"))
    return target


def _page(run: RunRecord, gallery: Gallery, training: TrainingScores | None) -> str:
    salient = wording.kept_pixels(*run.salient) if run.salient else ""
    return render(
        "report.html.j2",
        styles=_STYLES,
        scripts=_SCRIPTS,
        of_target=partial(wording.of_target, target=run.target_file) if run.target_file else str,
        kdx=run.kdx,
        run=run,
        target=target_phrase(run.target_file) if run.target_file else "",
        salient=salient,
        ranking=wording.ranking_map(*run.salient[2:]) if run.salient else "",
        reading=_reading(run, salient),
        notice=wording.training_notice(run),
        overview=overview_table(run),
        matrix=statement_matrix(run, gallery.kinds[0]),
        titles=titles(run),
        networks=network_cards(run),
        layers=layer_table(run),
        drawings=plots.drawings(run),
        training=training,
        training_drawings=[] if training is None else training_drawings(training),
        tables=score_tables(run),
        group_sections=group_sections(run, gallery.opening),
        gallery=gallery,
        least_stability=LEAST_STABILITY,
        facts=layer_facts(run, gallery.kinds, gallery.grids),
        left_out=kinds_left_out(run),
        gradients={signed: gradient(signed) for signed in (True, False)},
        payload=_payload(run, gallery),
        evaluation=evaluation_section(run),
        record=_Record.of(run),
    )


@dataclass(frozen=True)
class _Record:
    """How the run was made: its command, its configuration and environment as lines of name and value, and its manifest."""

    command: str
    facts: list[tuple[str, str]]
    manifest: str

    @classmethod
    def of(cls, run: RunRecord) -> _Record:
        facts = [*nested_facts(run.manifest["configuration"]), *nested_facts({"environment": run.manifest.get("environment") or {}})]
        return cls(shlex.join(run.command), facts, json.dumps(run.manifest, indent=2, ensure_ascii=False))


def _reading(run: RunRecord, salient: str) -> wording.Reading:
    return wording.read(
        {layer: (teacher, run.scores[layer], run.contrasts[layer]) for layer, teacher in run.layers.items()},
        {role: network.accuracy for role, network in run.networks.items()},
        discordant(run),
        run.confidence,
        salient,
    )


def _payload(run: RunRecord, gallery: Gallery) -> Markup:
    """What the script draws the maps from, and what it sorts and prints."""
    summaries = [[run.map_summaries[layer].get(kind.name) for kind in gallery.kinds] for layer in run.layers]
    return script_json(
        {
            "colours": colour_tables(),
            "layers": [{"name": layer, "grid": gallery.grids[layer]} for layer in run.layers],
            "opening": list(run.layers).index(gallery.opening),
            "kinds": [
                {"name": kind.name, "label": kind.label, "signed": kind.signed, "shown": kind in gallery.shown} for kind in gallery.kinds
            ],
            "limits": gallery.limits,
            "nulls": [[None if summary is None else summary.null_strength for summary in kinds] for kinds in summaries],
            "strip": gallery.strip,
            "numbers": {name: [card.numbers[name] for card in gallery.cards] for name in gallery.numbers},
            "figures": [card.figures for card in gallery.cards],
            "inside": gallery.inside,
            "maps": [card.maps for card in gallery.cards],
        }
    )
