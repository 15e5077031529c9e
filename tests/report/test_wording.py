"""The text of the page, from hand-made scores."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from kdx.report import wording
from kdx.roles import BALANCE, LIKENESS, READING_ORDER, SCORES
from kdx.runs.measured import Entry
from kdx.runs.record import read_run
from kdx.scores import uncertainty
from tests.made_runs import edit, entry, make_run

ACCURACY = {role: Entry.of(entry(0.9, 0.02, None, n=450)) for role in READING_ORDER}


def _numbers(difference: tuple[float, float], **changes: Entry) -> dict[str, tuple[str, dict[str, Entry], dict[str, Entry]]]:
    scores = {name: Entry.of(entry(0.5, 0.1)) for name in SCORES} | changes
    contrasts = {name: Entry.of(entry(*difference, None)) for name in (LIKENESS, BALANCE)}
    return {"layer3": ("layer4", scores, contrasts)}


def _without_teacher(numbers: Any) -> Any:
    return {
        layer: (layer, *({name: number for name, number in table.items() if "T" not in name} for table in (scores, contrasts)))
        for layer, (_, scores, contrasts) in numbers.items()
    }


def _statement(numbers: Any, topic: str = "Similarity") -> wording.Statement:
    (layer,) = wording.read(numbers, ACCURACY, (12, 5), 0.95).layers
    return next(statement for statement in layer.statements if statement.topic == topic)


def test_a_difference_is_stated_only_where_its_interval_excludes_zero() -> None:
    closer = _statement(_numbers((0.08, 0.03), **{"FSS(S,T)": Entry.of(entry(0.91, 0.02)), "FSS(B,T)": Entry.of(entry(0.83, 0.03))}))
    assert closer.settled
    assert closer.verdict == (
        "The student’s features at layer3 are closer to the teacher’s at layer4 than the base’s are. "
        "The 95% interval of the difference excludes zero."
    )
    assert "FSS(S,T) 0.91 (0.89 to 0.93) p = 0.001; FSS(B,T) 0.83 (0.80 to 0.86) p = 0.001; difference +0.08 (0.05 to 0.11)" in closer.text
    assert "further from the teacher’s" in _statement(_numbers((-0.08, 0.03))).verdict
    unsettled = _statement(_numbers((0.01, 0.03)))
    assert not unsettled.settled
    assert "These images do not settle whether" in unsettled.verdict
    assert "includes zero" in unsettled.verdict
    assert "are closer to the teacher’s at layer4 than" not in unsettled.verdict


def test_a_score_needs_both_interval_and_permutation_test() -> None:
    for value, half, p, settled, words in (
        (0.3, 0.1, 0.001, True, "features are relevant to the labels beyond the base’s. The 95% interval excludes zero"),
        (
            0.3,
            0.4,
            0.001,
            False,
            "do not settle whether the student’s features are relevant to the labels beyond the base’s. The 95% interval includes zero",
        ),
        (0.3, 0.1, 0.2, False, "excludes zero, but the permutation test is not significant"),
        (-0.3, 0.1, 1.0, True, "The student falls short of the base: the part of the student’s features that the base’s do not explain is"),
        (0.3, 0.1, None, True, "are relevant to the labels"),
    ):
        statement = _statement(_numbers((0.1, 0.01), **{"RS(S|B)": Entry.of(entry(value, half, p))}), "Distilled")
        assert statement.settled is settled
        assert words in statement.verdict


def test_likeness_itself_may_be_unsettled() -> None:
    statement = _statement(_numbers((0.08, 0.03), **{"FSS(B,T)": Entry.of(entry(0.02, 0.1, 0.4))}))
    assert "These images do not settle whether the base’s features are like the teacher’s at all." in statement.verdict


def test_a_score_that_could_not_be_computed_is_stated() -> None:
    missing = Entry.of({"value": None, "interval": [None, None], "p_value": None})
    numbers = _numbers((0.1, 0.01), **{"FSS(S,T)": missing, "RS(T|S)": missing})
    assert "could not be computed" in _statement(numbers).verdict
    assert "could not be computed" in _statement(numbers, "Missed").verdict
    assert "nan" not in _statement(numbers).text


def test_accuracy_is_compared_image_by_image() -> None:
    def statement(gained: int, lost: int) -> wording.Statement:
        return wording.read(_numbers((0.1, 0.01)), ACCURACY, (gained, lost), 0.95).accuracy[0]

    assert uncertainty.sign_test(12, 5) == pytest.approx(0.143463, abs=1e-6)  # scipy.stats.binomtest(5, 17).pvalue
    assert "These images do not settle whether the student or the base is more accurate" in statement(12, 5).verdict
    assert "the student is more accurate than the base" in statement(20, 3).verdict
    assert "the base is more accurate than the student" in statement(3, 20).verdict
    assert "do not settle which is more accurate" in statement(0, 0).verdict


def test_headline_counts_layers() -> None:
    def headline(*differences: tuple[float, float]) -> str:
        layers = {f"layer{i}": _numbers(d)["layer3"] for i, d in enumerate(differences)}
        return wording.read(layers, ACCURACY, (1, 0), 0.95).headline

    up, down, unsettled = (0.1, 0.05), (-0.1, 0.05), (0.0, 0.05)
    assert headline(up) == "At layer0 the student’s features are closer to the teacher’s than the base’s are."
    assert headline(up, up, up).startswith("At all 3 layers the student’s")
    assert headline(up, up, up, unsettled).startswith("At 3 of 4 layers the student’s")
    assert "; at layer3 these images do not settle which of the two is closer" in headline(up, up, up, unsettled)
    assert "; at layer1 the student’s features are further" in headline(up, down)
    assert "do not settle" in headline(unsettled, unsettled, unsettled)


def test_without_a_teacher_student_and_base_are_compared() -> None:
    accuracy = {role: ACCURACY[role] for role in ("base", "student")}

    def read(*differences: tuple[float, float]) -> wording.Reading:
        layers = {f"layer{i}": _numbers(d)["layer3"] for i, d in enumerate(differences)}
        return wording.read(_without_teacher(layers), accuracy, (1, 0), 0.95)

    up, down, unsettled = (0.1, 0.05), (-0.1, 0.05), (0.0, 0.05)
    more = "what the student has beyond the base is more relevant to the labels than what the base has beyond the student"
    assert read(up).headline == f"At layer0 {more}."
    assert (
        read(up, unsettled).headline
        == f"At layer0 {more}; at layer1 these images do not settle which of the two is more relevant beyond the other."
    )
    assert read(down).headline.startswith("At layer0 what the base has beyond the student is more relevant")
    assert "do not settle whether the student or the base is more relevant" in read(unsettled).headline
    (layer,) = read(up).layers
    assert [statement.topic for statement in layer.statements] == ["Distilled", "Residual", "Balance"]
    text = repr(read(up, unsettled, down))
    assert "teacher" not in text and "4 scores each" in text


def test_cautions() -> None:
    def cautions(images: int) -> str:
        scores = {name: Entry.of(entry(0.5, 0.1, n=images)) for name in SCORES}
        return " ".join(wording.read(_numbers((0.1, 0.01), **scores), ACCURACY, (1, 0), 0.95).cautions)

    assert "are based on 7 images" in cautions(7)
    assert "are based on" not in cautions(200)
    assert "does not show, by itself, that the teacher caused it" in cautions(200)
    assert "some can exclude zero or be significant by chance" in cautions(200) and "adjusted" not in cautions(200)
    adjusted = {"RS(S)": Entry.of({**entry(0.5, 0.1), "p_adjusted": 0.002})}
    assert "adjusted for the number of layers" in wording.read(_numbers((0.1, 0.01), **adjusted), ACCURACY, (1, 0), 0.95).cautions[1]


@pytest.mark.parametrize(
    ("value", "interval", "expected"),
    [
        (0.91, (0.89, 0.93), ("0.91", "0.89 to 0.93")),
        (-0.0001, (-0.05, 0.06), ("0.00", "−0.05 to 0.06")),
        (0.02, (0.003, 0.05), ("0.020", "0.003 to 0.050")),
        (0.9981, (0.9975, 0.9987), ("0.9981", "0.9975 to 0.9987")),
        (math.nan, (math.nan, math.nan), ("–", "– to –")),
    ],
)
def test_numbers_never_round_a_bound_to_zero(value: float, interval: tuple[float, float], expected: tuple[str, str]) -> None:
    assert wording.span(Entry(value, interval)) == expected


@pytest.mark.parametrize(
    ("keep", "noise", "clause"),
    [
        (0.5, 0.0, "the top 50% of pixels by HiResCAM are kept and the rest are imputed"),
        (0.125, 0.01, "the top 12.5% of pixels by HiResCAM are kept and the rest are imputed with noise of standard deviation 0.01"),
    ],
)
def test_the_clause_about_salient_images(keep: float, noise: float, clause: str) -> None:
    assert wording.kept_pixels(keep, noise) == clause
    assert wording.kept_pixels(keep, noise, "true", "probability") == clause.replace(
        "HiResCAM", "HiResCAM of the probability of the true class"
    )


def test_the_notice_about_training_images_is_that_of_the_run(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", images=8, gallery=0)
    assert wording.training_notice(read_run(folder)) is None
    edit(folder / "manifest.json", images__trained_on=8)
    assert (wording.training_notice(read_run(folder)) or "").startswith("All 8 images explained were used in training")
    edit(folder / "manifest.json", images={"planned": 8, "explained": 8, "unreadable": []})  # as kdx 0.1.0 wrote it
    assert (wording.training_notice(read_run(folder)) or "").startswith("It is not known whether the 8 images")


def test_a_single_score_has_no_caution_about_several() -> None:
    """One interval cannot exclude zero by the choice among several; two can."""

    def cautions(*layers: str) -> str:
        scores = {"RS(S)": Entry.of(entry(0.5, 0.1))}
        return " ".join(wording.read({name: (name, scores, {}) for name in layers}, {"student": ACCURACY["student"]}, None, 0.95).cautions)

    assert "refers to one score alone" not in cautions("layer1")
    assert "over 2 layers with 1 score each" in cautions("layer1", "layer2")
