"""The scores of a run in plain words: which differences they support, which they do not settle, and what they cannot show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdx.roles import BALANCE, CONTRASTS, GAIN, LIKENESS, MAPS, ROLES, MapKind
from kdx.runs.number_text import number as number
from kdx.runs.record import Entry, RunRecord
from kdx.runs.split import training_warning
from kdx.scores.uncertainty import sign_test

FEW_IMAGES = 64
"""With fewer images than this, the page warns that the intervals are wide."""

_DIFFERENCE_INTERVAL = "interval of the difference"

_LIKENESS_SCORES, _BALANCE_SCORES, *_ = CONTRASTS


@dataclass(frozen=True)
class Figure:
    """A number beside a statement, as text. ``interval`` and ``p`` are empty where the number does not have them."""

    name: str
    value: str
    interval: str = ""
    p: str = ""


@dataclass(frozen=True)
class Statement:
    """A sentence about the scores, with the numbers it is based on. ``settled``: whether it states a direction."""

    topic: str
    verdict: str
    figures: tuple[Figure, ...]
    settled: bool

    @property
    def text(self) -> str:
        """Words and numbers in one line."""
        numbers = (" ".join(part for part in (f.name, f.value, f"({f.interval})" if f.interval else "", f.p) if part) for f in self.figures)
        return f"{self.verdict} {'; '.join(numbers)}".strip()


@dataclass(frozen=True)
class LayerReading:
    """The statements about one layer."""

    layer: str
    statements: tuple[Statement, ...]


@dataclass(frozen=True)
class Reading:
    """The statements about a run: a headline, the accuracies, each layer, and what a reader must not conclude."""

    headline: str
    accuracy: tuple[Statement, ...]
    layers: tuple[LayerReading, ...]
    cautions: tuple[str, ...]


def span(entry: Entry, digits: int | None = None, sign: bool = False) -> tuple[str, str]:
    """Value and interval as text, such as ``("0.91", "0.89 to 0.93")``.

    Without ``digits`` there are two decimals, or up to four where a narrow interval would otherwise have equal bounds, or where a
    bound close to zero would otherwise be printed as zero.
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
    """A p-value with three decimals, or with two from 0.1 on; never printed as zero."""
    if p < 0.0005:
        return "p < 0.001"
    return f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def percent(x: float, digits: int = 1) -> str:
    """A share in [0, 1] as a percentage."""
    return f"{number(100 * x, digits)}%"


def direction(entry: Entry, confidence: float) -> int:
    """1 where the images settle that the number is above zero, -1 where they settle that it is below, 0 where they settle neither.

    Below zero the interval alone decides: the permutation test is one-sided, so it cannot reject chance for a negative score.
    """
    return entry.sign if entry.sign < 0 or entry.settled(confidence) else 0


def training_notice(run: RunRecord) -> str | None:
    """The notice near the top of the page of a run whose images were or may have been used in training; None where none of them was."""
    return training_warning(run.trained_on, run.explained)


def kept_pixels(keep: float, noise: float, of_class: str = "predicted", score: str = "logit") -> str:
    """How a salient image is made, as a clause."""
    with_noise = f" with noise of standard deviation {noise:g}" if noise else ""
    plain = (of_class, score) == ("predicted", "logit")
    ranking = "" if plain else f" of the {score} of the {of_class} class"
    return f"the top {100 * keep:.4g}% of pixels by HiResCAM{ranking} are kept and the rest are imputed{with_noise}"


def read(
    layers: Mapping[str, tuple[str, Mapping[str, Entry], Mapping[str, Entry]]],
    accuracy: Mapping[str, Entry],
    discordant: tuple[int, int],
    confidence: float,
    salient: str = "",
) -> Reading:
    """The scores of one run in plain words.

    layers: each student layer -> (teacher layer, scores, contrasts). accuracy: role -> accuracy. discordant: the number of images that
    only the student, and that only the base, classifies correctly. salient: how salient images are made (`kept_pixels`) where the
    scores describe them, else empty.

    A run without a teacher has no score or contrast of a teacher; its statements compare student and base. A statement has a direction
    only where `direction` has one. Every other statement is that these images do not settle the question. No sentence claims a cause.
    """
    scores_of_layers = [scores for _, scores, _ in layers.values()]
    entries = [entry for scores in scores_of_layers for entry in scores.values()]
    images = [entry.n for entry in entries if entry.n is not None]
    adjusted = any(entry.p_adjusted != entry.p_value for entry in entries)  # runs of kdx 0.1.0 have p-values of single scores
    teacher = "teacher" in accuracy
    return Reading(
        _headline(
            {name: contrasts[LIKENESS if teacher else BALANCE] for name, (_, _, contrasts) in layers.items()},
            _CLOSER if teacher else _MORE_RELEVANT,
            confidence,
        ),
        _accuracy(accuracy, discordant, confidence),
        tuple(LayerReading(name, _layer(name, *rest, confidence)) for name, rest in layers.items()),
        _cautions(min(images, default=None), len(layers), max(map(len, scores_of_layers)), adjusted, teacher, salient),
    )


@dataclass(frozen=True)
class _Question:
    """The question that the headline answers per layer, as clauses.

    above, below: the answers where the contrast is above or below zero. unsettled: the question itself, where no layer answers it.
    unsettled_rest: the question in short, after an answer for other layers.
    """

    above: str
    below: str
    unsettled: str
    unsettled_rest: str


_CLOSER = _Question(
    "the student’s features are closer to the teacher’s than the base’s are",
    "the student’s features are further from the teacher’s than the base’s are",
    "whether the student’s or the base’s features are closer to the teacher’s",
    "which of the two is closer",
)

_MORE_RELEVANT = _Question(
    "what the student has beyond the base is more relevant to the labels than what the base has beyond the student",
    "what the base has beyond the student is more relevant to the labels than what the student has beyond the base",
    "whether the student or the base is more relevant to the labels beyond the other",
    "which of the two is more relevant beyond the other",
)


def _headline(contrasts: Mapping[str, Entry], question: _Question, confidence: float) -> str:
    above = [name for name, entry in contrasts.items() if direction(entry, confidence) > 0]
    below = [name for name, entry in contrasts.items() if direction(entry, confidence) < 0]
    unsettled = [name for name in contrasts if name not in above and name not in below]
    parts = []
    if above:
        parts.append(f"{_at(above, contrasts)} {question.above}")
    if below:
        parts.append(f"{_at(below, contrasts)} {question.below}")
    if unsettled and not parts:
        return f"{_at(unsettled, contrasts)} these images do not settle {question.unsettled}."
    if unsettled:
        parts.append(f"{_at(unsettled, contrasts)} these images do not settle {question.unsettled_rest}")
    return "; ".join(part if i == 0 else part[0].lower() + part[1:] for i, part in enumerate(parts)) + "."


def _at(names: Sequence[str], among: Mapping[str, Entry]) -> str:
    if len(names) <= 2:
        return f"At {' and '.join(names)}"
    return f"At all {len(among)} layers" if len(names) == len(among) else f"At {len(names)} of {len(among)} layers"


def _accuracy(accuracy: Mapping[str, Entry], discordant: tuple[int, int], confidence: float) -> tuple[Statement, ...]:
    figures = [
        Figure(role, percent(accuracy[role].value), " to ".join(map(percent, accuracy[role].interval)))
        for role in ROLES
        if role in accuracy
    ]
    gained, lost = discordant
    if gained + lost == 0:
        verdict = "The student and the base are right and wrong on the same images, so these images do not settle which is more accurate."
        return (Statement("Accuracy", verdict, tuple(figures), False),)
    p = sign_test(gained, lost)
    figures.append(Figure("exact sign test", "", "", probability(p)))
    split = f"only the student is right on {_images(gained)}, only the base on {lost:,}"
    settled = p <= 1 - confidence + 1e-12
    if settled:
        better, worse = ("student", "base") if gained > lost else ("base", "student")
        verdict = f"On images like these the {better} is more accurate than the {worse}: {split}."
    else:
        verdict = f"These images do not settle whether the student or the base is more accurate: {split}."
    return (Statement("Accuracy", verdict, tuple(figures), settled),)


def _layer(
    layer: str, teacher_layer: str, scores: Mapping[str, Entry], contrasts: Mapping[str, Entry], confidence: float
) -> tuple[Statement, ...]:
    """The statements about a layer. The statement about a contrast is next to those about its two scores."""
    likeness = [_likeness(layer, teacher_layer, scores, contrasts[LIKENESS], confidence)] if LIKENESS in contrasts else []
    present = [kind for kind in MAPS.values() if kind.score in scores]
    compared = [_beyond(kind, scores, confidence) for kind in present if kind.score in _BALANCE_SCORES]
    others = [_beyond(kind, scores, confidence) for kind in present if kind.score not in _BALANCE_SCORES]
    gain = [_gain(contrasts[GAIN], confidence)] if GAIN in contrasts else []  # older versions did not have this contrast
    return (*likeness, *gain, *compared, _balance(contrasts[BALANCE], confidence), *others)


def _likeness(layer: str, teacher_layer: str, scores: Mapping[str, Entry], contrast: Entry, confidence: float) -> Statement:
    student, base = (scores[name] for name in _LIKENESS_SCORES)
    figures = (*(_figure(name, scores[name]) for name in _LIKENESS_SCORES), _figure("difference", contrast, sign=True))
    if not (student.known and base.known and contrast.known):
        return Statement("Likeness", f"The likeness of the features at {layer} to the teacher’s could not be computed.", figures, False)
    theirs = "the teacher’s" if layer == teacher_layer else f"the teacher’s at {teacher_layer}"
    settled = direction(contrast, confidence) != 0
    if settled:
        relation = "closer to" if contrast.sign > 0 else "further from"
        verdict = f"The student’s features at {layer} are {relation} {theirs} than the base’s are."
    else:
        verdict = f"These images do not settle whether the student’s or the base’s features at {layer} are closer to {theirs}."
    verdict = f"{verdict} {_why(contrast, confidence, _DIFFERENCE_INTERVAL)}"
    unsettled = [f"the {role}’s" for role, entry in (("student", student), ("base", base)) if not entry.settled(confidence)]
    if unsettled:
        verdict += f" These images do not settle whether {' and '.join(unsettled)} features are like the teacher’s at all."
    return Statement("Likeness", verdict, figures, settled)


def _beyond(kind: MapKind, scores: Mapping[str, Entry], confidence: float) -> Statement:
    topic, explained, given = kind.name.capitalize(), kind.explained, kind.given
    entry = scores[kind.score]
    figures = (_figure(kind.score, entry),)
    if not entry.known:
        return Statement(topic, f"{kind.score} could not be computed from these images.", figures, False)
    settled = direction(entry, confidence)
    if not settled:
        verdict = (
            f"These images do not settle whether the {explained}’s features are relevant to the labels beyond the {given}’s. "
            f"{_why(entry, confidence)}"
        )
    elif settled > 0:
        verdict = f"The {explained}’s features are relevant to the labels beyond the {given}’s. {_why(entry, confidence)}"
    else:
        level = percent(confidence, 0)
        verdict = (
            f"The {explained} falls short of the {given}: the part of the {explained}’s features that the {given}’s do not explain is "
            f"negatively related to the labels. The {level} interval lies below zero."
        )
    return Statement(topic, verdict, figures, settled != 0)


def _gain(contrast: Entry, confidence: float) -> Statement:
    figures = (_figure("difference", contrast, sign=True),)
    if not contrast.known:
        return Statement("Gain", "The difference between RS(S) and RS(B) could not be computed from these images.", figures, False)
    settled = direction(contrast, confidence)
    if settled:
        more, less = ("student", "base") if settled > 0 else ("base", "student")
        verdict = f"The {more}’s features are more relevant to the labels than the {less}’s."
    else:
        verdict = "These images do not settle whether the student’s or the base’s features are more relevant to the labels."
    return Statement("Gain", f"{verdict} {_why(contrast, confidence, _DIFFERENCE_INTERVAL)}", figures, settled != 0)


def _balance(contrast: Entry, confidence: float) -> Statement:
    figures = (_figure("difference", contrast, sign=True),)
    if not contrast.known:
        verdict = f"The difference between {' and '.join(_BALANCE_SCORES)} could not be computed from these images."
        return Statement("Balance", verdict, figures, False)
    settled = direction(contrast, confidence) != 0
    if settled:
        more, less = ("student", "base") if contrast.sign > 0 else ("base", "student")
        verdict = f"What the {more} has beyond the {less} is more relevant to the labels than what the {less} has beyond the {more}."
    else:
        verdict = "These images do not settle whether the student or the base is more relevant to the labels beyond the other."
    verdict = f"{verdict} {_why(contrast, confidence, _DIFFERENCE_INTERVAL)}"
    return Statement("Balance", verdict, figures, settled)


def _figure(name: str, entry: Entry, sign: bool = False) -> Figure:
    return Figure(name, *span(entry, sign=sign), "" if entry.p_value is None else probability(entry.p_value))


def _why(entry: Entry, confidence: float, interval: str = "interval") -> str:
    """The reason why a statement has a direction or not."""
    subject = f"The {percent(confidence, 0)} {interval}"
    if entry.sign == 0:
        return f"{subject} includes zero."
    if not entry.settled(confidence):
        return f"{subject} excludes zero, but the permutation test is not significant."
    return f"{subject} excludes zero."


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count:,} images"


def _cautions(images: int | None, layers: int, scores: int, adjusted: bool, teacher: bool, salient: str) -> tuple[str, ...]:
    cautions = []
    if salient:
        cautions.append(
            f"The scores describe salient features: for each image, network and layer, {salient}. They do not describe the other "
            "pixels. The maps describe the whole images."
        )
    if images is not None and images < FEW_IMAGES:
        cautions.append(
            f"The scores are based on {_images(images)}. Intervals from so few images are wide, and their width is itself uncertain. "
            "More images would narrow them."
        )
    where = f"over {layers} {'layer' if layers == 1 else 'layers'} with {scores} scores each"
    if adjusted:
        cautions.append(
            f"Each interval refers to one score alone: {where}, some can exclude zero by chance. The p-values behind the statements are "
            "adjusted for the number of layers, not for that of scores."
        )
    else:
        cautions.append(f"Each interval and p-value refers to one score alone: {where}, some can exclude zero or be significant by chance.")
    if teacher:
        cautions.append(
            "The numbers describe one teacher, one base and one student on these images. A base and a student also differ because "
            "training is random, so a difference here does not show, by itself, that the teacher caused it."
        )
    else:
        cautions.append(
            "The numbers describe one base and one student on these images. Any two networks differ because training is random, so a "
            "difference here does not show, by itself, what caused it."
        )
    return tuple(cautions)
