"""The tables of docs/evidence.md, from the stored results of `benchmarks.evidence` and `benchmarks.evidence_imagenet`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from benchmarks.evidence_claims import (
    CLAIMS,
    CONDITIONAL,
    DIFFERENCE,
    DIRECT,
    LAST,
    VARIANTS,
    Record,
    Run,
    Variant,
    likeness,
    runs,
    verdicts,
)
from benchmarks.evidence_design import ASSISTED_TEACHER, DATA, LAYERS, METHODS, STUDENTS, TEACHERS, Student
from benchmarks.evidence_evaluation import METRICS
from benchmarks.evidence_measuring import EVALUATED, PUBLISHED, SCORINGS, SUBSETS
from benchmarks.markdown import header, joined, row
from benchmarks.record import RESULTS
from kdx.study.statistics import over_seeds

PATH, IMAGENET_PATH = RESULTS / "evidence.json", RESULTS / "evidence_imagenet.json"


@cache
def stored() -> Record:
    record: Record = json.loads(PATH.read_text())
    return record


# ---- tables ----


def claims(record: Record) -> str:
    """The verdict of every claim, data set and variant."""
    lines = header("claim", "data", *(variant.title for variant in VARIANTS))
    judged = verdicts(record)
    for number, claim in enumerate(CLAIMS):
        for data in DATA:
            cells = []
            for variant in range(len(VARIANTS)):
                verdict = judged[number, data, variant]
                low, high = verdict.interval
                cells.append(
                    f"{verdict.word}: {_number(verdict.mean, 3)} ({_number(low, 3)} to {_number(high, 3)}), p {_p(verdict.p_adjusted)}, "
                    f"{verdict.positive} of {verdict.seeds} seeds"
                )
            lines.append(row(claim.text, data, *cells))
    return joined(lines) + "\n\n" + origin(record)


def networks(record: Record) -> str:
    """The accuracies of all networks."""
    names = [*TEACHERS, "base", *(student.name for student in STUDENTS)]
    titles = {name: f"{name} teacher" for name in TEACHERS}
    lines = header("network", *DATA)
    for name in names:
        title = titles.get(name, name if name == "base" else f"student: {name}")
        lines.append(row(title, *(_range([run["accuracy"][name] for run in runs(record, data)]) for data in DATA)))
    return joined(lines) + "\n"


def estimators(record: Record) -> str:
    """The claims about scores at the last layer, by how the scores are computed."""
    kinds = [PUBLISHED, "batches of 5, mean of ratios", "batches of 5, summed", "salient features", "biased", "whole"]
    if set(kinds) != {*SCORINGS, PUBLISHED, "salient features"}:
        raise ValueError("the table does not have all kinds of scores")
    lines = header("claim", "data", *kinds)
    for claim in CLAIMS[2:]:
        for data in DATA:
            cells = [_seeds([claim.value(run, LAST, Variant("", kind, "")) for run in runs(record, data)]) for kind in kinds]
            lines.append(row(claim.text, data, *cells))
    return joined(lines) + "\n"


def by_layer(record: Record) -> str:
    """All claims by layer, with both variants."""
    lines = header("claim", "data", *(f"{layer}: {variant.title}" for variant in VARIANTS for layer in LAYERS))
    for claim in CLAIMS:
        for data in DATA:
            cells = [_seeds([claim.value(run, layer, variant) for run in runs(record, data)]) for variant in VARIANTS for layer in LAYERS]
            lines.append(row(claim.text, data, *cells))
    return joined(lines) + "\n"


def by_method(record: Record) -> str:
    """Differences of whole-set scores and places of maps at the last layer, for each student."""
    lines = header(
        "student", "data", "accuracy: S − B", "RS(S\\|B) − RS(B\\|S)", "FSS(S,T) − FSS(B,T)", "FSS(S,T)", "distance: B\\|S − S\\|B"
    )
    for student in STUDENTS:
        for data in DATA:
            selected = runs(record, data)
            whole = [run["students"][student.name][LAST]["scores"]["whole"] for run in selected]
            places = [run["students"][student.name][LAST]["maps"][CONDITIONAL] for run in selected]
            cells = [
                _seeds([run["accuracy"][student.name] - run["accuracy"]["base"] for run in selected]),
                _seeds([scores["RS(S|B)"] - scores["RS(B|S)"] for scores in whole]),
                _seeds([scores["FSS(S,T)"] - scores["FSS(B,T)"] for scores in whole]),
                _number(float(np.mean([scores["FSS(S,T)"] for scores in whole])), 3),
                _seeds([place["residual"]["distance"] - place["distilled"]["distance"] for place in places]),
            ]
            lines.append(row(student.name, data, *cells))
    return joined(lines) + "\n"


def accuracy_and_scores(record: Record) -> str:
    """Spearman's correlation, over all students and seeds, of the accuracy gained over the base with two differences of scores."""
    kinds = ["whole", "salient features", PUBLISHED]
    names = {"RS(S\\|B) − RS(B\\|S)": ("RS(S|B)", "RS(B|S)"), "FSS(S,T) − FSS(B,T)": ("FSS(S,T)", "FSS(B,T)")}
    lines = header("score", "data", *kinds)
    for title, (first, second) in names.items():
        for data in DATA:
            pairs = [(run, student) for run in runs(record, data) for student in STUDENTS]
            gains = [run["accuracy"][student.name] - run["accuracy"]["base"] for run, student in pairs]
            cells = []
            for kind in kinds:
                scores = [run["students"][student.name][LAST]["scores"][kind] for run, student in pairs]
                cells.append(_number(float(stats.spearmanr(gains, [entry[first] - entry[second] for entry in scores])[0])))
            lines.append(row(title, data, *cells))
    return joined(lines) + "\n"


def kinds_of_maps(record: Record) -> str:
    """The density at the object of distilled and residual maps, per kind and layer, as means over seeds and students."""
    names = list(record["runs"][0]["students"][DIRECT[0].name][LAST]["maps"])
    lines = header("map", "data", *LAYERS)
    for name in names:
        for data in DATA:
            cells = []
            for layer in LAYERS:
                pairs = np.array([_densities(run, layer, name) for run in runs(record, data)])
                higher = int((pairs[:, 0] > pairs[:, 1]).sum())
                cells.append(
                    "1 / 1"
                    if name == "constant"
                    else f"{_number(pairs[:, 0].mean())} / {_number(pairs[:, 1].mean())} ({higher} of {len(pairs)})"
                )
            lines.append(row(name.replace("|", "\\|"), data, *cells))
    return joined(lines) + "\n"


def _densities(run: Run, layer: str, name: str) -> NDArray[np.float64]:
    """The density of the distilled and of the residual maps of a kind, as means over all students without assistant."""
    places = [run["students"][student.name][layer]["maps"][name] for student in DIRECT]
    return np.asarray(np.mean([[place[which]["density"] for which in ("distilled", "residual")] for place in places], 0))


def batches(record: Record) -> str:
    """The place of UniCAM's maps and their agreement, by the images with which an image is compared."""
    names = list(record["runs"][0]["detailed"][LAST]["maps"])
    lines = header("compared with", "data", *(f"{layer}: density; agreement" for layer in LAYERS))
    for name in names:
        for data in DATA:
            cells = []
            for layer in LAYERS:
                entries = [run["detailed"][layer]["maps"][name] for run in runs(record, data)]
                density, agreement = (
                    np.mean([values]) for values in ([e["distilled"]["density"] for e in entries], [e["agreement"] for e in entries])
                )
                cells.append(f"{_number(float(density))}; {_number(float(agreement))}")
            lines.append(row(name, data, *cells))
    return joined(lines) + "\n"


def smoothing(record: Record) -> str:
    """The density at the object without and with the mean over four views."""
    kinds = {"UniCAM": ("UniCAM", "distilled"), "UniCAM residual": ("UniCAM", "residual"), DIFFERENCE: (DIFFERENCE, "distilled")}
    lines = header("map", "data", *(f"{layer}: one view; four views" for layer in LAYERS))
    for name, (kind, which) in kinds.items():
        for data in DATA:
            cells = []
            for layer in LAYERS:
                selected = runs(record, data)
                plain = [run["students"]["kd, large teacher"][layer]["maps"][kind][which]["density"] for run in selected]
                smooth = [run["detailed"][layer]["smoothed"][name]["density"] for run in selected]
                better = sum(b > a for a, b in zip(plain, smooth, strict=True))
                cells.append(f"{_number(float(np.mean(plain)))}; {_number(float(np.mean(smooth)))} ({better} of {len(plain)})")
            lines.append(row(name, data, *cells))
    return joined(lines) + "\n"


def widths(record: Record) -> str:
    """The width of 95% intervals by the number of images, and the number at which it is 0.05 if it falls with the square root."""
    names = ["RS(S)", "RS(S|B)", "FSS(S,T)", "FSS(S,T) - FSS(B,T)", "RS(S|B) - RS(B|S)"]
    lines = header("score", "data", *(f"{count} images" for count in SUBSETS), "images for 0.05")
    for name in names:
        for data in DATA:
            selected = [run["detailed"][LAST]["widths"] for run in runs(record, data)]
            means = [float(np.mean([entry[name][str(count)] for entry in selected])) for count in SUBSETS]
            needed = SUBSETS[-1] * (means[-1] / 0.05) ** 2
            rounded = f"{round(needed, -1 if needed < 1000 else -2):,.0f}"
            lines.append(row(name.replace("|", "\\|").replace(" - ", " − "), data, *(f"{mean:.3f}" for mean in means), rounded))
    return joined(lines) + "\n"


def evaluated(record: Record) -> str:
    """The metrics of kdx evaluate on composites, as means over seeds: a row per layer and map."""
    selected = [run["detailed"] for run in runs(record, "composites")]
    lines = header("layer", "map", *METRICS)
    for layer in LAYERS:
        for name in selected[0][layer]["evaluated"]:
            series = ([entry[layer]["evaluated"][name][metric] for entry in selected] for metric in METRICS)
            lines.append(row(layer, name.replace("|", "\\|"), *(_with_spread(values) for values in series)))
    note = f"{EVALUATED} images of each of {len(selected)} seeds; means, and half widths of 95% intervals, over seeds."
    return f"{joined(lines)}\n\n{note}\n"


def capacity(record: Record) -> str:
    """Accuracy and FSS(S,T) of the students by teacher, as means over seeds, with the numbers of parameters of the teachers."""
    lines = header("data", "teacher", "parameters", "accuracy of the teacher", "accuracy of students", *(v.title for v in VARIANTS))
    for data in DATA:
        selected = runs(record, data)
        for teacher, assisted in [*((teacher, False) for teacher in TEACHERS), (ASSISTED_TEACHER, True)]:
            students = [Student(method, teacher, assisted) for method in METHODS]
            accuracies = [float(np.mean([run["accuracy"][student.name] for student in students])) for run in selected]
            scores = ([likeness(run, LAST, variant, teacher, assisted=assisted) for run in selected] for variant in VARIANTS)
            lines.append(
                row(
                    data,
                    f"{teacher} and assistant" if assisted else teacher,
                    f"{record['parameters'][data]['teachers'][teacher]:,}",
                    _with_spread([run["accuracy"][teacher] for run in selected]),
                    _with_spread(accuracies),
                    *map(_with_spread, scores),
                )
            )
    return joined(lines) + "\n"


def imagenet() -> str:
    """Scores of the run with ImageNet weights."""
    if not IMAGENET_PATH.exists():
        return "No result is stored.\n"
    record = json.loads(IMAGENET_PATH.read_text())
    names = ["FSS(S,T)", "FSS(B,T)", "RS(T)", "RS(S)", "RS(B)", "RS(S|B)", "RS(B|S)", "FSS(S,T) - FSS(B,T)", "RS(S|B) - RS(B|S)"]
    lines = header("score", *record["layers"])
    for name in names:
        cells = []
        for entries in record["layers"].values():
            low, high = entries[name]["interval"]
            cells.append(f"{_number(entries[name]['value'])} ({_number(low)} to {_number(high)})")
        lines.append(row(name.replace("|", "\\|").replace(" - ", " − "), *cells))
    environment = record["environment"]
    accuracies = ", ".join(f"{role} {value:.3f}" for role, value in record["accuracy"].items())
    note = (
        f"{record['images']} crops of {record['side']} pixels; 95% intervals over images. Accuracies: {accuracies}. "
        f"{environment['processor']}, PyTorch {environment['torch']}; commit {record['commit']}."
    )
    return f"{joined(lines)}\n\n{note}\n"


def origin(record: Record) -> str:
    """Where the figures come from."""
    seeds = " and ".join(f"{len(runs(record, data))} seeds of {data} ({runs(record, data)[0]['images']} test images)" for data in DATA)
    machines = "; ".join(dict.fromkeys(_machine(run["machine"]) for run in record["runs"]))
    return (
        f"Differences at {LAST}, as means over {seeds}, with 95% intervals (Student's t); p-values of two-sided t tests over seeds, after "
        f"Holm's correction for all {len(CLAIMS) * len(DATA) * len(VARIANTS)} tests of the table. {machines}.\n"
    )


def _machine(machine: Mapping[str, Any]) -> str:
    gpu = f"{machine['gpu']}, " if machine.get("gpu") else ""
    return f"{machine['processor']}, {gpu}PyTorch {machine['torch']}, commit {machine['commit']}"


TABLES: dict[str, Callable[[Record], str]] = {
    "claims": claims,
    "networks": networks,
    "capacity": capacity,
    "methods": by_method,
    "accuracy": accuracy_and_scores,
    "layers": by_layer,
    "estimators": estimators,
    "maps": kinds_of_maps,
    "batches": batches,
    "smoothing": smoothing,
    "widths": widths,
    "evaluated": evaluated,
}


def _seeds(values: Sequence[float]) -> str:
    """The mean, and in how many seeds the value is positive."""
    return f"{_number(float(np.mean(values)), 3)} ({sum(value > 0 for value in values)} of {len(values)})"


def _with_spread(values: Sequence[float]) -> str:
    """The mean, and half the width of its 95% interval over seeds."""
    estimate = over_seeds(list(values), 0.95)
    low, high = estimate.interval
    return f"{_number(estimate.value)} (±{(high - low) / 2:.2f})" if len(values) > 1 else _number(estimate.value)


def _range(values: Sequence[float]) -> str:
    return f"{_number(float(np.mean(values)))} ({_number(min(values))} to {_number(max(values))})"


def _number(value: float, decimals: int = 2) -> str:
    text = f"{value:.{decimals}f}"
    zero = f"{0:.{decimals}f}"
    return text.replace(f"-{zero}", zero).replace("-", "−")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
