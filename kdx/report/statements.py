"""The matrix of statements: which statement about the networks the images settle, at which layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kdx.report import wording
from kdx.report.kinds import CLEARLY_ABOVE_CHANCE, PageKind, score_entry
from kdx.report.networks import discordant
from kdx.roles import BALANCE, EXCESS, GAIN, LEAD, LIKENESS, MAPS, counterpart
from kdx.runs.measured import Entry
from kdx.runs.record import RunRecord
from kdx.scores.uncertainty import sign_test

State = Literal["settled", "opposite", "open", "unknown"]
"""Whether the images settle the statement, settle its opposite, settle neither, or the number could not be computed."""


@dataclass(frozen=True)
class Claim:
    """A statement about a score or a contrast: ``above`` holds where it is above zero, ``below`` where it is below.

    unless: the contrast that makes the statement redundant where a run has it.
    """

    score: str
    above: str
    below: str
    unless: str = ""


CLAIMS = (
    Claim(LIKENESS, "The student is closer to the teacher than the base is", "The base is closer to the teacher than the student is"),
    Claim(
        "FSS(S,T)",
        "The student’s features are like the teacher’s",
        "The student’s features are negatively related to the teacher’s",
        unless=LIKENESS,
    ),
    Claim(
        EXCESS,
        "The student is closer to the teacher than random weights are",
        "Random weights of the student’s architecture are closer to the teacher than the student is",
    ),
    Claim(
        "RS(S)",
        "The student’s features are related to the labels",
        "The student’s features are negatively related to the labels",
        unless=GAIN,
    ),
    Claim(GAIN, "The student is more relevant to the labels than the base", "The base is more relevant to the labels than the student"),
    Claim(
        LEAD, "The student is more relevant to the labels than the teacher", "The teacher is more relevant to the labels than the student"
    ),
    Claim(MAPS["distilled"].score, "The student has relevance beyond the base", "The student falls short of the base"),
    Claim(MAPS["residual"].score, "The student lacks relevance that the base has", "The base falls short of the student"),
    Claim(
        BALANCE,
        "The student has more relevance beyond the base than the reverse",
        "The base has more relevance beyond the student than the reverse",
    ),
    Claim(MAPS["missed"].score, "The student lacks relevance that the teacher has", "The teacher falls short of the student"),
    Claim(MAPS["new"].score, "The student has relevance beyond the teacher", "The student falls short of the teacher"),
)


@dataclass(frozen=True)
class Mark:
    """A statement at a layer: its state, the number as text, and everything about it in one line, for a tooltip and a screen reader."""

    state: State
    value: str
    text: str


@dataclass(frozen=True)
class Row:
    """A statement with one mark per layer, or with a single mark where it does not depend on the layer."""

    statement: str
    marks: list[Mark]


def statement_matrix(run: RunRecord, kind: PageKind) -> list[Row]:
    """The statements that the run has scores for. ``kind`` is the page's first map, which the statement about maps describes."""
    rows = _accuracy(run)
    for claim in CLAIMS:
        if claim.unless in run.contrast_names:
            continue
        entries = [score_entry(run, layer, claim.score) for layer in run.layers]
        if any(entry is not None for entry in entries):
            rows.append(Row(claim.above, [mark(claim, entry, run.confidence) for entry in entries]))
    if any(_above_null(run, layer, kind) is not None for layer in run.layers):
        rows.append(Row(f"The maps of {kind.label} are stronger than chance", [_map_mark(run, layer, kind) for layer in run.layers]))
    return rows


def mark(claim: Claim, entry: Entry | None, confidence: float) -> Mark:
    """The mark of a statement about one number, by `Entry.direction`."""
    if entry is None or not entry.known:
        return Mark("unknown", "–", f"{_printed(claim.score)} could not be computed")
    value, interval = wording.span(entry, sign=True)
    figures = f"{_printed(claim.score)} {value} ({wording.percent(confidence, 0)} interval {interval}{_p_values(entry)})"
    direction = entry.direction(confidence)
    if direction > 0:
        return Mark("settled", value, f"settled: {figures}")
    if direction < 0:
        return Mark("opposite", value, f"the opposite is settled. {claim.below}: {figures}")
    return Mark("open", value, f"not settled: {figures}")


def _p_values(entry: Entry) -> str:
    if entry.p_value is None:
        return ""
    text = f", {wording.probability(entry.p_value)}"
    if entry.p_adjusted in (None, entry.p_value):
        return text
    return f"{text}, adjusted for the layers {wording.probability(entry.p_adjusted)}"


def _printed(score: str) -> str:
    return score.replace(" - ", " − ")


def _accuracy(run: RunRecord) -> list[Row]:
    """The row about accuracy, if there is another network."""
    other, images = counterpart(run.roles), discordant(run)
    if images is None:
        return []
    gained, lost = images
    p = sign_test(gained, lost)
    value = wording.number(100 * (gained - lost) / max(1, run.explained), 1, sign=True)
    figures = f"only the student is right on {gained:,} images, only the {other} on {lost:,}, exact sign test {wording.probability(p)}"
    state: State = "open"
    if p <= 1 - run.confidence + 1e-12:
        state = "settled" if gained > lost else "opposite"
    start = {"open": "not settled", "settled": "settled", "opposite": "the opposite is settled"}[state]
    return [Row(f"The student is more accurate than the {other}", [Mark(state, f"{value} points", f"{start}: {figures}")])]


def _above_null(run: RunRecord, layer: str, kind: PageKind) -> float | None:
    summary = run.map_summaries[layer].get(kind.name)
    return None if summary is None else summary.above_null


def _map_mark(run: RunRecord, layer: str, kind: PageKind) -> Mark:
    above = _above_null(run, layer, kind)
    if above is None:
        return Mark("unknown", "–", "not known: this run has no maps with permuted labels")
    value = wording.percent(above, 0)
    figures = f"{value} of the maps are stronger than 95% of maps with permuted labels; by chance 5% would be"
    return Mark("settled", value, f"settled: {figures}") if above > CLEARLY_ABOVE_CHANCE else Mark("open", value, f"not settled: {figures}")
