"""A run's numbers in plain words: what they say, what they leave open, and what they cannot say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdx.roles import BALANCE, LIKENESS
from kdx.runs.record import Entry
from kdx.scores.uncertainty import sign_test

FEW_BATCHES = 20

_OF_DIFFERENCE = "interval of the difference"


@dataclass(frozen=True)
class Figure:
    """A number under a statement, as text: its name, value, interval, and p-value or nothing."""

    name: str
    value: str
    interval: str = ""
    p: str = ""


@dataclass(frozen=True)
class Statement:
    """One thing the numbers say, or leave open: the words, and the numbers they rest on."""

    topic: str
    verdict: str
    figures: tuple[Figure, ...]
    settled: bool

    @property
    def text(self) -> str:
        """Words and numbers in one line."""
        held = (" ".join(part for part in (f.name, f.value, f"({f.interval})" if f.interval else "", f.p) if part) for f in self.figures)
        return f"{self.verdict} {'; '.join(held)}".strip()


@dataclass(frozen=True)
class LayerReading:
    layer: str
    statements: tuple[Statement, ...]


@dataclass(frozen=True)
class Reading:
    headline: str
    accuracy: tuple[Statement, ...]
    layers: tuple[LayerReading, ...]
    cautions: tuple[str, ...]


def number(value: float, digits: int = 2, sign: bool = False) -> str:
    """A number with a true minus sign and no negative zero; an en dash where it is not finite."""
    if not math.isfinite(value):
        return "–"
    value = float(round(value, digits)) or 0.0
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def span(entry: Entry, digits: int | None = None, sign: bool = False) -> tuple[str, str]:
    """Value and interval as text, such as ``("0.91", "0.89 to 0.93")``.

    Without ``digits`` two decimals, or as many (at most four) as it takes that a narrow interval has a width and that a bound
    beside zero does not read as zero.
    """
    if digits is None:
        low, high = entry.interval
        digits = 2
        while entry.known and digits < 4:
            if high - low >= 4 * 10**-digits and all(x == 0 or abs(x) >= 0.5 * 10**-digits for x in (low, high)):
                break
            digits += 1
    low_text, high_text = (number(x, digits) for x in entry.interval)
    return number(entry.value, digits, sign), f"{low_text} to {high_text}"


def probability(p: float) -> str:
    """A p-value to three decimals, or two from 0.1 on; never as zero."""
    if p < 0.0005:
        return "p < 0.001"
    return f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def percent(x: float, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage."""
    return f"{number(100 * x, digits)}%"


def kept_pixels(keep: float, noise: float) -> str:
    """What a salient image is, in words."""
    noisy = f" with noise of standard deviation {noise:g}" if noise else ""
    return f"the top {100 * keep:.4g}% of pixels by HiResCAM kept, the rest imputed{noisy}"


def read(
    layers: Mapping[str, tuple[str, Mapping[str, Entry], Mapping[str, Entry]]],
    accuracy: Mapping[str, Entry],
    discordant: tuple[int, int],
    confidence: float,
    salient: str = "",
) -> Reading:
    """The plain-words reading of one run.

    ``layers`` maps each student layer to its teacher layer, its scores and its contrasts; ``accuracy`` maps the run's roles;
    ``discordant`` counts the images that only the student and only the base named correctly; ``salient`` says what salient images
    are, where the scores are of those (`kept_pixels`). A run without a teacher has no score or
    contrast that names one, and is read as a comparison of student and base. A direction is stated only where the
    interval excludes zero and the permutation p-value, where there is one, is at most 1 - confidence; everything else is said to be not
    settled by these images. No sentence claims a cause.
    """
    every = [scores for _, scores, _ in layers.values()]
    batches = [e.batches for scores in every for e in scores.values() if e.batches is not None]
    teacher = "teacher" in accuracy
    return Reading(
        _headline(
            {name: contrasts[LIKENESS if teacher else BALANCE] for name, (_, _, contrasts) in layers.items()},
            _CLOSER if teacher else _SAYS_MORE,
            confidence,
        ),
        _accuracy(accuracy, discordant, confidence),
        tuple(LayerReading(name, _layer(name, *rest, confidence)) for name, rest in layers.items()),
        _cautions(min(batches, default=None), len(layers), max(map(len, every)), teacher, salient),
    )


@dataclass(frozen=True)
class _Question:
    """What the headline asks of every layer, as clauses: the answers above and below zero, and the open question twice."""

    above: str
    below: str
    open_: str
    rest: str


_CLOSER = _Question(
    "the student’s features are closer to the teacher’s than the base’s are",
    "the student’s features are further from the teacher’s than the base’s are",
    "whether the student’s or the base’s features are closer to the teacher’s",
    "which of the two is closer",
)

_SAYS_MORE = _Question(
    "the student says more about the labels beyond the base than the base does beyond the student",
    "the base says more about the labels beyond the student than the student does beyond the base",
    "whether the student or the base says more about the labels beyond the other",
    "which of the two says more",
)


def _headline(contrasts: Mapping[str, Entry], question: _Question, confidence: float) -> str:
    above = [name for name, e in contrasts.items() if e.settled(confidence) and e.sign > 0]
    below = [name for name, e in contrasts.items() if e.settled(confidence) and e.sign < 0]
    open_ = [name for name in contrasts if name not in above and name not in below]
    parts = []
    if above:
        parts.append(f"{_at(above, contrasts)} {question.above}")
    if below:
        parts.append(f"{_at(below, contrasts)} {question.below}")
    if open_ and not parts:
        return f"{_at(open_, contrasts)} these images do not settle {question.open_}."
    if open_:
        parts.append(f"{_at(open_, contrasts)} it is not settled by these images {question.rest}")
    return "; ".join(part if i == 0 else part[0].lower() + part[1:] for i, part in enumerate(parts)) + "."


def _at(names: Sequence[str], among: Mapping[str, Entry]) -> str:
    if len(names) <= 2:
        return f"At {' and '.join(names)}"
    return f"At all {len(among)} layers" if len(names) == len(among) else f"At {len(names)} of {len(among)} layers"


def _accuracy(accuracy: Mapping[str, Entry], discordant: tuple[int, int], confidence: float) -> tuple[Statement, ...]:
    figures = [
        Figure(role, percent(accuracy[role].value), " to ".join(map(percent, accuracy[role].interval)))
        for role in ("teacher", "student", "base")
        if role in accuracy
    ]
    gained, lost = discordant
    if gained + lost == 0:
        verdict = "The student and the base are right and wrong on the same images: which is more accurate is not settled by them."
        return (Statement("Accuracy", verdict, tuple(figures), False),)
    p = sign_test(gained, lost)
    figures.append(Figure("exact sign test", "", "", probability(p)))
    split = f"student alone is right on {_images(gained)}, the base alone on {lost:,}"
    settled = p <= 1 - confidence + 1e-12
    if settled:
        better, worse = ("student", "base") if gained > lost else ("base", "student")
        verdict = f"On images like these the {better} is more accurate than the {worse}: the {split}."
    else:
        verdict = f"Whether the student or the base is more accurate is not settled by these images: the {split}."
    return (Statement("Accuracy", verdict, tuple(figures), settled),)


def _layer(
    layer: str, teacher_layer: str, scores: Mapping[str, Entry], contrasts: Mapping[str, Entry], confidence: float
) -> tuple[Statement, ...]:
    between = (
        _beyond("Distilled", "student", "base", "RS(S|B)", scores, confidence),
        _beyond("Residual", "base", "student", "RS(B|S)", scores, confidence),
        _balance(contrasts[BALANCE], confidence),
    )
    if LIKENESS not in contrasts:
        return between
    return (
        _likeness(layer, teacher_layer, scores, contrasts[LIKENESS], confidence),
        *between,
        _beyond("Missed", "teacher", "student", "RS(T|S)", scores, confidence),
        _beyond("New", "student", "teacher", "RS(S|T)", scores, confidence),
    )


def _likeness(layer: str, teacher_layer: str, scores: Mapping[str, Entry], contrast: Entry, confidence: float) -> Statement:
    student, base = scores["FSS(S,T)"], scores["FSS(B,T)"]
    figures = (_figure("FSS(S,T)", student), _figure("FSS(B,T)", base), _figure("difference", contrast, sign=True))
    if not (student.known and base.known and contrast.known):
        return Statement("Likeness", f"How alike the features at {layer} are to the teacher’s could not be computed.", figures, False)
    theirs = "the teacher’s" if layer == teacher_layer else f"the teacher’s at {teacher_layer}"
    settled = contrast.settled(confidence)
    if settled:
        relation = "closer to" if contrast.sign > 0 else "further from"
        verdict = (
            f"The student’s features at {layer} are {relation} {theirs} than the base’s are. {_why(contrast, confidence, _OF_DIFFERENCE)}"
        )
    else:
        verdict = (
            f"Whether the student’s or the base’s features at {layer} are closer to {theirs} is not settled by these images. "
            f"{_why(contrast, confidence, _OF_DIFFERENCE)}"
        )
    unlike = [f"the {role}’s" for role, entry in (("student", student), ("base", base)) if not entry.settled(confidence)]
    if unlike:
        verdict += f" That {' and '.join(unlike)} features are like the teacher’s at all is not settled either."
    return Statement("Likeness", verdict, figures, settled)


def _beyond(topic: str, explained: str, given: str, score: str, scores: Mapping[str, Entry], confidence: float) -> Statement:
    entry = scores[score]
    figures = (_figure(score, entry),)
    if not entry.known:
        return Statement(topic, f"{score} could not be computed from these images.", figures, False)
    settled = entry.settled(confidence)
    if not settled:
        verdict = (
            f"Whether the {explained}’s features say something about the labels that the {given}’s do not is not settled by these images. "
            f"{_why(entry, confidence)}"
        )
    elif entry.sign > 0:
        verdict = f"The {explained}’s features say something about the labels that the {given}’s do not. {_why(entry, confidence)}"
    else:
        level = percent(confidence, 0)
        verdict = (
            f"What the {explained}’s features have beyond the {given}’s runs against the labels: the {level} interval lies below zero."
        )
    return Statement(topic, verdict, figures, settled)


def _balance(contrast: Entry, confidence: float) -> Statement:
    figures = (_figure("difference", contrast, sign=True),)
    if not contrast.known:
        return Statement("Balance", "The difference between the two could not be computed from these images.", figures, False)
    settled = contrast.settled(confidence)
    if settled:
        more, less = ("student", "base") if contrast.sign > 0 else ("base", "student")
        verdict = f"The {more} says more about the labels beyond the {less} than the {less} does beyond the {more}."
    else:
        verdict = "Which of the two says more about the labels beyond the other is not settled by these images."
    verdict = f"{verdict} {_why(contrast, confidence, _OF_DIFFERENCE)}"
    return Statement("Balance", verdict, figures, settled)


def _figure(name: str, entry: Entry, sign: bool = False) -> Figure:
    return Figure(name, *span(entry, sign=sign), "" if entry.p_value is None else probability(entry.p_value))


def _why(entry: Entry, confidence: float, what: str = "interval") -> str:
    level = f"The {percent(confidence, 0)} {what}"
    if entry.sign == 0:
        return f"{level} includes zero."
    if not entry.settled(confidence):
        return f"{level} excludes zero, but the permutation test does not speak against chance."
    return f"{level} excludes zero."


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def _cautions(batches: int | None, layers: int, scores: int, teacher: bool, salient: str) -> tuple[str, ...]:
    said = []
    if salient:
        said.append(
            f"The scores are of salient features: of each image, network and layer, {salient}. They say nothing of the other pixels. "
            "The maps are those of the whole images."
        )
    if batches is not None and batches < FEW_BATCHES:
        said.append(
            f"The scores rest on {batches} {'batch' if batches == 1 else 'batches'}. Intervals from so few are wide, and their own width "
            "is uncertain; more images would narrow them."
        )
    said.append(
        f"Every interval and p-value stands for one score alone. Over {layers} {'layer' if layers == 1 else 'layers'} with {scores} "
        "scores each, some can speak against zero by chance."
    )
    if teacher:
        said.append(
            "The numbers describe one teacher, one base and one student on these images. A base and a student also differ by the chance "
            "of their training, so a difference here does not show, by itself, that the teacher caused it."
        )
    else:
        said.append(
            "The numbers describe one base and one student on these images. Any two networks differ by the chance of their training, so "
            "a difference here does not show, by itself, what caused it."
        )
    return tuple(said)
