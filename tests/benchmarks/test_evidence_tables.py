"""The tables of the evidence contain the means of the record that they state."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from benchmarks import evidence_claims, evidence_summary, evidence_tables
from benchmarks.evidence_claims import CONDITIONAL, DIFFERENCE, PUBLISHED_MAPS
from benchmarks.evidence_design import DATA, LAYERS, METHODS, STUDENTS, TEACHERS, Student
from benchmarks.evidence_evaluation import METRICS
from benchmarks.evidence_measuring import BATCHES, PUBLISHED, REFERENCES, SCORINGS, SUBSETS

SEEDS = 3
KINDS = ("constant", PUBLISHED_MAPS, "UniCAM", CONDITIONAL, DIFFERENCE)
SCORES = ("FSS(S,T)", "FSS(B,T)", "RS(S|B)", "RS(B|S)")
WIDTHS = ("RS(S)", "RS(S|B)", "FSS(S,T)", "FSS(S,T) - FSS(B,T)", "RS(S|B) - RS(B|S)")


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """A complete record of random numbers."""
    rng = np.random.default_rng(0)

    def place() -> dict[str, float]:
        return {name: float(rng.random()) for name in ("density", "distance", "background", "empty")}

    def pair() -> dict[str, dict[str, float]]:
        return {"distilled": place(), "residual": place()}

    def layer() -> dict[str, Any]:
        kinds = (*SCORINGS, PUBLISHED, "salient features")
        return {
            "scores": {kind: {name: float(rng.random()) for name in SCORES} for kind in kinds},
            "maps": {kind: pair() for kind in KINDS},
        }

    def details() -> dict[str, Any]:
        batches = {f"batches of {batch}": {**pair(), "agreement": float(rng.random())} for batch in BATCHES}
        references = {f"{size} references": {"distilled": place(), "agreement": float(rng.random())} for size in REFERENCES}
        return {
            "maps": batches | references,
            "smoothed": {kind: place() for kind in ("UniCAM", "UniCAM residual", DIFFERENCE)},
            "widths": {name: {str(count): float(rng.random()) for count in SUBSETS} for name in WIDTHS},
            "evaluated": {name: {metric: float(rng.random()) for metric in METRICS} for name in ("UniCAM", "uniform")},
        }

    runs = [
        {
            "data": data,
            "seed": seed,
            "images": 30,
            "machine": {"processor": "P", "torch": "2", "gpu": "G", "commit": "c"},
            "accuracy": {name: float(rng.random()) for name in ("base", *TEACHERS, *(student.name for student in STUDENTS))},
            "students": {student.name: {name: layer() for name in LAYERS} for student in STUDENTS},
            "detailed": {name: details() for name in LAYERS},
        }
        for data in DATA
        for seed in range(SEEDS)
    ]
    parameters = {data: {"teachers": {name: 1000 * (place + 1) for place, name in enumerate(TEACHERS)}} for data in DATA}
    return {"runs": runs, "parameters": parameters, "commit": "c"}


def cells(table: str, *start: str) -> list[str]:
    """The cells of the row that begins with these cells."""
    rows = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in table.splitlines() if line.startswith("| ")]
    (row,) = (row for row in rows if tuple(row[: len(start)]) == start)
    return row


def test_every_table_has_a_row_per_case(record: dict[str, Any]) -> None:
    rows = {name: sum(line.startswith("| ") for line in table(record).splitlines()) - 2 for name, table in evidence_tables.TABLES.items()}
    assert rows == {
        **dict.fromkeys(("verdict", "gains", "advice"), -2),  # sentences
        "claims": 6 * len(DATA),
        "networks": 1 + len(TEACHERS) + len(STUDENTS),
        "capacity": len(DATA) * (len(TEACHERS) + 1),
        "methods": len(DATA) * len(STUDENTS),
        "accuracy": 2 * len(DATA),
        "layers": 6 * len(DATA),
        "estimators": 4 * len(DATA),
        "maps": len(KINDS) * len(DATA),
        "batches": (len(BATCHES) + len(REFERENCES)) * len(DATA),
        "smoothing": 3 * len(DATA),
        "widths": len(WIDTHS) * len(DATA),
        "evaluated": 2 * len(LAYERS),
    }


def test_capacity_has_the_means_of_seeds_and_methods(record: dict[str, Any]) -> None:
    runs = [run for run in record["runs"] if run["data"] == "digits"]
    names = [Student(method, "large", assisted=True).name for method in METHODS]
    row = cells(evidence_tables.capacity(record), "digits", "large and assistant")
    assert row[2] == "3,000"
    accuracy = np.mean([run["accuracy"][name] for run in runs for name in names])
    likeness = np.mean([run["students"][name]["layer3"]["scores"]["whole"]["FSS(S,T)"] for run in runs for name in names])
    assert row[4].startswith(f"{accuracy:.2f} (±")
    assert row[6].startswith(f"{likeness:.2f} (±")


def test_metrics_of_evaluate_are_means_over_seeds_of_composites(record: dict[str, Any]) -> None:
    runs = [run for run in record["runs"] if run["data"] == "composites"]
    row = cells(evidence_tables.evaluated(record), "layer2", "UniCAM")
    for cell, metric in zip(row[2:], METRICS, strict=True):
        assert cell.startswith(f"{np.mean([run['detailed']['layer2']['evaluated']['UniCAM'][metric] for run in runs]):.2f} (±")


def test_the_verdict_names_each_test_once(record: dict[str, Any]) -> None:
    text = evidence_summary.verdict(record)
    counts = [int(part) for part in re.findall(r"(\d+) (?:of the|are contradicted|are not settled)", text)]
    judged = [entry.word for entry in evidence_claims.verdicts(record).values()]
    assert counts == [judged.count(word) for word in ("holds", "**contradicted**", "not settled")]
    named = sum(text.count(part) for part in ("(as published)", "(decomposition and the whole set)"))
    assert named + 4 * text.count("in all four tests") == len(judged)


def test_gains_count_every_student(record: dict[str, Any]) -> None:
    text = evidence_summary.gains(record)
    counts = [
        [int(number) for number in re.findall(r"in (\d+) of (\d+) students of digits", line)[0]]
        for line in text.splitlines()
        if "digits" in line
    ]
    scores = [
        (run["accuracy"][student.name] > run["accuracy"]["base"], run["students"][student.name]["layer3"]["scores"]["whole"])
        for run in record["runs"]
        if run["data"] == "digits"
        for student in STUDENTS
    ]
    for (positive, number), better in zip(counts, (True, False), strict=True):
        selected = [entry for is_better, entry in scores if is_better is better]
        assert number == len(selected)
        assert positive == sum(entry["RS(S|B)"] > entry["RS(B|S)"] for entry in selected)


def test_advice_has_the_images_for_an_interval(record: dict[str, Any]) -> None:
    widths = [run["detailed"]["layer3"]["widths"]["RS(S)"]["300"] for run in record["runs"] if run["data"] == "digits"]
    needed = 300 * (np.mean(widths) / 0.05) ** 2
    assert f"{round(needed, -1 if needed < 1000 else -2):,.0f} on digits; RS(S|B)" in evidence_summary.advice(record)
