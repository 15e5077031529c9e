"""The sentences of docs/evidence.md that follow from its record: the verdicts in words, and the advice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.evidence_claims import CLAIMS, CONDITIONAL, DIRECT, LAST, VARIANTS, Record, Run, runs, verdicts
from benchmarks.evidence_design import DATA, LAYERS, STUDENTS
from benchmarks.evidence_measuring import BATCHES, PUBLISHED, REFERENCES, SUBSETS

WORDS = {"holds": "Holds", "**contradicted**": "Contradicted", "not settled": "Not settled"}


def verdict(record: Record) -> str:
    """How many tests of each claim hold, are contradicted, and are not settled, and which."""
    judged = verdicts(record)
    words = [entry.word for entry in judged.values()]
    seeds = " and ".join(f"{len(runs(record, data))} seeds of {data}" for data in DATA)
    lines = [
        f"**Verdict: with {seeds}, {words.count('holds')} of the {len(words)} tests hold, {words.count('**contradicted**')} are "
        f"contradicted, and {words.count('not settled')} are not settled.**",
        "",
    ]
    for word, title in WORDS.items():
        for number, claim in enumerate(CLAIMS):
            places = [
                f"{data} ({variant.title})"
                for data in DATA
                for place, variant in enumerate(VARIANTS)
                if judged[number, data, place].word == word
            ]
            if places:
                where = "in all four tests" if len(places) == len(DATA) * len(VARIANTS) else f"on {_listed(places)}"
                text = claim.text.replace("\\|", "|")
                lines.append(f"- {title}: *{text}* {where}.")
    return "\n".join(lines) + "\n"


def gains(record: Record) -> str:
    """How often students that are more accurate than their base, and those that are not, have RS(S|B) > RS(B|S)."""
    lines = []
    for data in DATA:
        for title, better in (("more accurate than their base", True), ("not more accurate than their base", False)):
            selected = [
                run["students"][student.name][LAST]["scores"]
                for run in runs(record, data)
                for student in STUDENTS
                if (run["accuracy"][student.name] > run["accuracy"]["base"]) is better
            ]
            if selected:
                whole, published = (sum(s[kind]["RS(S|B)"] > s[kind]["RS(B|S)"] for s in selected) for kind in ("whole", PUBLISHED))
                lines.append(
                    f"- RS(S|B) > RS(B|S) in {whole} of {len(selected)} students of {data} that are {title}, by the scores of the whole "
                    f"set, and in {published} by the published ones."
                )
    return "\n".join(lines) + "\n"


def advice(record: Record) -> str:
    """The advice, with the figures of the record from which it follows."""
    densities = {data: _densities(runs(record, data)) for data in DATA}
    best = [f"{LAYERS[int(np.argmax(densities[data]))]} on {data} ({max(densities[data]):.2f})" for data in DATA]
    agreement = {name: _agreement(record, name) for name in _COMPARED}
    small, large = (agreement[f"batches of {batch}"] for batch in (BATCHES[0], BATCHES[-1]))
    references = ", ".join(f"{_span(agreement[f'{size} references'])} with {size}" for size in REFERENCES)
    bases = " and ".join(f"{_span([run['accuracy']['base'] for run in runs(record, data)])} on {data}" for data in DATA)
    needed = "; ".join(
        f"{name.replace(' - ', ' − ')}: " + ", ".join(f"{_rounded(images_needed(record, data, name))} on {data}" for data in DATA)
        for name in ("RS(S)", "RS(S|B)", "FSS(S,T) - FSS(B,T)", "RS(S|B) - RS(B|S)")
    )
    lines = [
        "- **Layer.** Compare layers before you interpret positions: the distilled map of the decomposition is densest on the object at",
        f"  {' and '.join(best)}. Report more than one layer, and choose the layer of a claim before the measurement.",
        f"- **Batch.** Use the whole set. Maps in batches of {BATCHES[0]} have a rank correlation of {_span(small)} with those of the",
        f"  whole set, and in batches of {BATCHES[-1]} one of {_span(large)}. Do not interpret maps of batches of {BATCHES[0]}.",
        "- **Reference set.** The maps with two disjoint class-balanced sets have a rank correlation of",
        f"  {references} images. Use the largest set that you can afford.",
        f"- **Images.** About so many images make a 95% interval at {LAST} 0.05 wide: {needed}.",
        f"- **Seeds.** Compare within a seed, because students of one seed share their base. The accuracy of the base alone is {bases}.",
        "- **Scores.** Show accuracies next to scores. Prefer whole features to salient ones for statements about what a student",
        "  learned, because each network has salient images of its own.",
    ]
    return "\n".join(lines) + "\n"


_COMPARED = (*(f"batches of {batch}" for batch in BATCHES), *(f"{size} references" for size in REFERENCES))


def images_needed(record: Record, data: str, name: str) -> float:
    """The images at which the interval of a score at the last layer is 0.05 wide, if its width falls with the square root."""
    width = np.mean([run["detailed"][LAST]["widths"][name][str(SUBSETS[-1])] for run in runs(record, data)])
    return float(SUBSETS[-1] * (width / 0.05) ** 2)


def _densities(selected: Sequence[Run]) -> list[float]:
    """By layer: the density at the object of the distilled maps of the decomposition, as a mean over seeds and students."""
    return [
        float(
            np.mean(
                [
                    run["students"][student.name][layer]["maps"][CONDITIONAL]["distilled"]["density"]
                    for run in selected
                    for student in DIRECT
                ]
            )
        )
        for layer in LAYERS
    ]


def _agreement(record: Record, name: str) -> list[float]:
    """By data set and layer, as means over seeds."""
    return [
        float(np.mean([run["detailed"][layer]["maps"][name]["agreement"] for run in runs(record, data)]))
        for data in DATA
        for layer in LAYERS
    ]


def _span(values: Sequence[float]) -> str:
    return f"{min(values):.2f} to {max(values):.2f}".replace("-", "−")


def _rounded(count: float) -> str:
    return f"{round(count, -1 if count < 1000 else -2):,.0f}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
